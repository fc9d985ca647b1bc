"""Foundations: errors, files, locks, progress, URLs."""
