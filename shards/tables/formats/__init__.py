"""Data sets as their publishers write them: what their columns are, and how their items become a plain table."""
