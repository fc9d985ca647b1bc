"""Writing shard stores, and checking them byte by byte."""
