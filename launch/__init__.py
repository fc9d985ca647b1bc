"""Commands that run training and everything around it on SLURM, or on this machine."""

from fmrl_dist.base.command_start import start_command

start_command()
