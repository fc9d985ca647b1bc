"""A run's files on disk: checkpoints, the run folder, exported models."""
