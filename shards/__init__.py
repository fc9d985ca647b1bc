"""Shard-building jobs: raw tables in, shard store out (``python -m shards.build | verify | inspect``)."""
