"""Commands that run training and everything around it on SLURM, or on this machine."""

from fmrl_dist.base.early_signals import end_while_importing

end_while_importing()
