"""Commands that run training and everything around it on SLURM, or on this machine."""
