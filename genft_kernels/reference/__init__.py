"""Every operation in plain PyTorch, forward and backward written out: the truth in tests and the path taken on a CPU.

Notation: x [M,K] rows of activations, weight W0 [N,K] frozen, P [K,r], Q [N,r], ψ and φ [r,K], s scale. Nothing of
N·K elements is allocated: dropout goes panel by panel, everything else is products whose results are [M,N], [M,K] or
have a side of r. The derivations are in docs/mathematics.md.

In 16 bits an update is never added to a result that is rounded already, which would lose it: it is written first,
and the library adds its product with W0 to it in float32 (`add_base_`).

Factors may be in a wider dtype than the activations: products run in the activations' dtype (a library product
accumulates wider inside), gradients come back in the factor's dtype.

A file for each family, two functions for each operation. `<name>_forward` returns the result, and after it what the
backward pass asks for by name; `<name>_backward` takes the gradient of the result first, and last `needs`, one entry
for each of its gradients, which are None where that is False. A bias gets its gradient from `genft_kernels.operation`.
"""
