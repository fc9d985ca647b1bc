"""Hyperparameter sweeps: search space, study, workers and report."""
