"""Shard-building jobs: raw tables in, shard store out (``python -m shards.build | verify | inspect``)."""

from fmrl_dist.base.command_start import start_command

start_command()
