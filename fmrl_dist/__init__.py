"""fMRLRec at scale: train once, deploy any size."""

from fmrl_dist.base.command_start import start_command

__version__ = "0.1.0"

start_command()
