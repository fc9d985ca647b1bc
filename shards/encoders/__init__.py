"""Item features: a precomputed array, or what an encoder makes of the items' texts or images."""
