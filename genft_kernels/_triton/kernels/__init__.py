"""Kernels and what launches them: matrices and blocks in, matrices out."""
