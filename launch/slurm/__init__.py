"""SLURM jobs: submit, follow, and chain them."""
