"""``python -m shards.demo``; see :mod:`shards.demo.shop`."""

from fmrl_dist.base.errors import run_command
from shards.demo.shop import main

run_command(main)
