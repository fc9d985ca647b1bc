"""Jobs without SLURM: processes of this machine, and the signals that end them."""
