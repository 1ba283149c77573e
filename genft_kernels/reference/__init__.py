"""All operations in plain PyTorch with explicit backward: the reference for the kernels, and the CPU implementation.

Notation: x [M,K] rows of activations, W0 [N,K] frozen weight, P [K,r], Q [N,r], ψ and φ [r,K], s scale. Nothing of N·K
elements is allocated: dropout is applied panel by panel, and all products have results [M,N], [M,K] or with a dimension
r. The derivations are in docs/mathematics.md.

In 16 bits, an update added to an already rounded result would be lost. So the update is written first, and the library
adds its product with W0 to it in float32 (`add_base_`).

Factors may have a wider dtype than the activations: products run in the activations' dtype (library products accumulate
in a wider one), gradients have the factor's dtype.

One file per family, two functions per operation. `<name>_forward` returns the result and the tensors to save for
backward; `<name>_backward` takes the gradient of the result first, and last `needs`, one flag per gradient; gradients
are None if not needed. The gradient of a bias is computed in `genft_kernels.operation`.
"""
