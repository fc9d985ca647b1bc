"""Operators: nested linear and layer-norm, the packed scan. Plain tensors in, tensors out; each has a plain twin."""
