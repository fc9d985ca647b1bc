"""Shard-building jobs: raw tables in, shard store out (``python -m shards.build | verify | inspect``)."""

from fmrl_dist.base.early_signals import end_while_importing

end_while_importing()
