"""Clipping: what policies mean (reference), what users write (policies, limits …), how it is done (host, kernels)."""
