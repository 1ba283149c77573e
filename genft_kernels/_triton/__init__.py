"""The families of `genft_kernels.reference` with Triton kernels: one file per family, with the same functions and the
plan as last argument. The kernels and their launchers are in `kernels`, one file per kind.

Imported when an operation first runs a Triton algorithm, never by `import genft_kernels`.
"""
