"""Ranking the whole catalogue for every user, at every size."""
