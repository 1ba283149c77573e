"""A frozen linear layer with a low-rank update and a factor for each output."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    as_rows,
    autocast,
    check_dropout,
    check_factor,
    check_linear,
    check_weight,
    choice_of,
    like_rows,
    number,
)
from .operation import Operation
from .plan import LaunchPlan
from .reference import rescaled as reference
from .reference.common import parts

_rescaled_linear = Operation(
    "rescaled_linear",
    reference,
    sizes=lambda x, weight, p: (x.shape[0], *weight.shape, p.shape[1]),
    outputs={
        "y": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
        "t": lambda x, p: x.new_empty(x.shape[0], p.shape[1]),
        "z": lambda x, weight, save: x.new_empty(x.shape[0], weight.shape[0]) if save else x.new_empty(0),
    },
    gradients=("x", "p", "q", "gain"),
)


def rescaled_linear(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    gain: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update and a factor per output: y = c ⊙ (x (W0 + scale·Q Pᵀ)ᵀ) + b.

    With dropout, d = drop(x) replaces x in what c changes: y = x W0ᵀ + b + (c − 1) ⊙ (d W0ᵀ) + scale·c ⊙ (d P) Qᵀ, in
    two products with W0.

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, in the dtype of x.
        p: factor [K, r], in the dtype of x or float32.
        q: factor [N, r], likewise.
        gain: c [N], likewise.
        bias: [N] or None, in the dtype of x.
        scale: a finite number.
        dropout: dropout probability, 0 <= dropout < 1.
        seed: int64 [1] from `draw_seed`, required if dropout > 0; determines the mask.
        backend, plan: as in `lowrank_linear`.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable (first order) in x, p, q,
        gain and bias. If gain requires a gradient, [M, N] elements are saved for it, else [M, r].

    Source: DoRA (arXiv 2402.09353), equation 5, with c = magnitude / ‖W0 + ΔW‖ per row; dropout as in peft.
    """
    check_linear(x, weight, bias)
    r = check_factor("p", p, x, (weight.shape[1], None))
    check_factor("q", q, x, (weight.shape[0], r))
    check_factor("gain", gain, x, (weight.shape[0],))
    seed = check_dropout(dropout, seed, x)
    scale, choice = number("scale", scale), choice_of(backend, plan)
    save = torch.is_grad_enabled() and gain.requires_grad
    x, weight, bias = autocast(x, weight, bias)
    y = _rescaled_linear(as_rows(x), weight, p, q, gain, bias, scale, float(dropout), seed, save, choice)
    return like_rows(y, x)


@torch.no_grad()
def row_squares(weight: Tensor) -> Tensor:
    """‖W0[n]‖² of each row of W0 [N, K]: [N] in float32, for float64 in float64. Makes no tensor of N×K elements."""
    check_weight(weight)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return weight.to(wide).square().sum(1)  # one pass in a compiled graph
    squares = weight.new_empty(weight.shape[0], dtype=wide)
    for rows in parts(weight):
        squares[rows] = torch.linalg.vector_norm(weight[rows], dim=1, dtype=wide).square_()
    return squares
