"""Clipping: what a policy means (reference), what users write (policies), how it runs on a CPU (kernels)."""
