"""The families of `genft_kernels.reference` on Triton kernels: a file for each, the same functions, the plan as last
argument. A plan's passes are launched in `kernels`, one file for each kind.

Imported when an operation first runs a Triton algorithm, never by `import genft_kernels`.
"""
