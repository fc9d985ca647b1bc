"""The shard store, and how training and evaluation read it."""
