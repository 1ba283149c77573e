"""Features of a frozen weight."""

from __future__ import annotations

from torch import Tensor

from . import sharded
from .activations import activation as activation_named
from .checks import check_dropout, check_factor, check_weight, choice_of, number
from .operation import Operation
from .plan import LaunchPlan
from .reference import features as reference
from .sharded import is_sharded

_weight_features = Operation(
    "weight_features",
    reference,
    sizes=lambda weight, a: (weight.shape[0], *weight.shape, a.shape[0]),
    outputs={"z": lambda weight, a: a.new_empty(weight.shape[0], a.shape[0])},
    gradients={"a": lambda dz, weight: dz.new_empty(dz.shape[1], weight.shape[1])},
    backward_sizes=lambda dz, weight: (weight.shape[0], *weight.shape, dz.shape[1]),
)


def weight_features(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    ratio: float = 1.0,
    activation: str = "none",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """Features of a frozen weight: h = σ(ratio·drop(W0) Aᵀ + bias), in one pass over W0.

    Args:
        weight: frozen W0 [N, K], any strides; or a DTensor sharded along one dimension, which needs a reduction of
            [N, r] only.
        a: A [r, K], in the dtype of W0 or float32.
        bias: [r] in the dtype of A, or None.
        ratio: ρ, a finite number.
        activation: σ, a name in `genft_kernels.activations.ACTIVATIONS`.
        dropout: dropout probability of the elements of W0, 0 <= dropout < 1; the mask is never stored.
        seed: int64 [1] from `draw_seed`, required if dropout > 0.
        backend, plan: as in `lowrank_linear`.

    Returns:
        h [N, r] in the dtype of A. Differentiable (first order) in a and bias.

    Source: the first stage of GIFT (arXiv 2312.00700) and GenFT (arXiv 2506.11042); docs/mathematics.md.
    """
    sigma = activation_named(activation)
    check_weight(weight)
    r = check_factor("a", a, weight, (None, weight.shape[1]))
    if bias is not None:
        check_factor("bias", bias, a, (r,))
    seed = check_dropout(dropout, seed, weight)
    ratio, choice = number("ratio", ratio), choice_of(backend, plan)
    if is_sharded(weight):
        options = {"ratio": ratio, "dropout": dropout, "backend": backend, "plan": plan}
        return sharded.features_of_parts(weight_features, weight, a, bias, sigma.forward, seed, **options)
    z = _weight_features(weight, a, bias, ratio, float(dropout), seed, choice)
    # σ acts on [N, r] only: torch's function is fast enough, and torch.compile can fuse it.
    return sigma.forward(z)
