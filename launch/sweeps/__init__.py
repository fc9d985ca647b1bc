"""Hyperparameter sweeps: search space, study, and the workers."""
