"""The shard store as a reader sees it: manifest, blocks, and where their bytes come from."""
