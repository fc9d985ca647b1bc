"""Commands that put training and all around it onto SLURM, or onto this machine, through submitit."""
