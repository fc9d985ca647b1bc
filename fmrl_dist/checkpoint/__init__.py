"""What a run leaves on disk: checkpoints, the run folder, exported models."""
