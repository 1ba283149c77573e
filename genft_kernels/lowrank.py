"""A frozen linear layer with a low-rank update."""

from __future__ import annotations

from torch import Tensor

from .checks import as_rows, autocast, check_dropout, check_factor, check_linear, choice_of, like_rows, number
from .operation import Operation
from .plan import LaunchPlan
from .reference import lowrank as reference

_lowrank_linear = Operation(
    "lowrank_linear",
    reference,
    sizes=lambda x, weight, p: (x.shape[0], *weight.shape, p.shape[1]),
    outputs={
        "y": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
        "t": lambda x, p: x.new_empty(x.shape[0], p.shape[1]),
    },
    gradients=("x", "p", "q"),
)


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update: y = x W0ᵀ + scale·(drop(x) P) Qᵀ + b.

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, in the dtype of x.
        p: factor [K, r], in the dtype of x or float32.
        q: factor [N, r], likewise. ΔW = scale·Q Pᵀ.
        bias: [N] or None, in the dtype of x.
        scale: s, a finite number.
        dropout: dropout probability of x in the low-rank branch, 0 <= dropout < 1.
        seed: int64 [1] from `draw_seed`, required if dropout > 0; determines the mask.
        backend: "auto" (Triton on a GPU, else the reference), "triton" or "reference".
        plan: a `LaunchPlan` that overrides the default choice.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable (first order) in x, p, q
        and bias.

    Source: derivation in docs/mathematics.md. LoRA, GIFT, PEANuT, SaS and GenFT with a linear outer activation have
    this form.
    """
    check_linear(x, weight, bias)
    r = check_factor("p", p, x, (weight.shape[1], None))
    check_factor("q", q, x, (weight.shape[0], r))
    seed = check_dropout(dropout, seed, x)
    scale, choice = number("scale", scale), choice_of(backend, plan)
    x, weight, bias = autocast(x, weight, bias)
    y = _lowrank_linear(as_rows(x), weight, p, q, bias, scale, float(dropout), seed, choice)
    return like_rows(y, x)
