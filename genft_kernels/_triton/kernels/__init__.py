"""Triton kernels and their launchers: matrices and block sizes in, matrices out."""
