"""Operations on a generated matrix T = drop(σ(H Bᵀ + row + column)), which is never materialised in full."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activation as activation_named
from .checks import (
    FLOATS,
    as_rows,
    autocast,
    check_dropout,
    check_factor,
    check_linear,
    check_tensor,
    choice_of,
    like_rows,
    number,
)
from .operation import Operation
from .plan import LaunchPlan
from .reference import generated as reference

_generated_linear = Operation(
    "generated_linear",
    reference,
    sizes=lambda x, h, b: (x.shape[0], h.shape[0], *b.shape),
    outputs={"y": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0])},
    gradients=("x", "h", "b", "row", "column"),
)
_generated_features = Operation(
    "generated_features",
    reference,
    # Kernels hold each rank in one block: the larger one counts.
    sizes=lambda h, b, a: (0, h.shape[0], b.shape[0], max(h.shape[1], a.shape[0])),
    outputs={"z": lambda b, a: b.new_empty(b.shape[0], a.shape[0])},
    gradients=("h", "b", "a", "column"),
)


def generated_linear(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    row_bias: Tensor | None = None,
    column_bias: Tensor | None = None,
    combine: str = "add",
    scale: float = 1.0,
    activation: str = "none",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with a generated, full-rank update: y = x (W0 + ΔW)ᵀ + b.

    ΔW = scale·T or, modulated by the weight, scale·W0 ⊙ T, with T = drop(σ(H Bᵀ + row + column)).

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, in the dtype of x.
        h: H [N, r], in the dtype of x or float32; all factors and their biases have the same dtype.
        b: B [K, r].
        bias: the layer's bias [N] or None, in the dtype of x.
        row_bias: [N] or None, added to the rows of H Bᵀ.
        column_bias: [K] or None, added to its columns.
        combine: what x is multiplied by: "add", W0 + scale·T; "modulate", W0 + scale·W0 ⊙ T; "multiply", the update of
            "modulate" alone, scale·W0 ⊙ T, for a product with W0 that is computed elsewhere.
        scale: s, a finite number.
        activation: σ, a name in `genft_kernels.activations.ACTIVATIONS`.
        dropout: dropout probability of the elements of T; with "multiply", of the elements of x, as in
            `lowrank_linear`. 0 <= dropout < 1.
        seed: int64 [1] from `draw_seed`, required if dropout > 0.
        backend, plan: as in `lowrank_linear`.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable (first order) in x, h, b,
        bias, row_bias and column_bias. ΔW is generated tile by tile in forward and backward and not saved.

    Source: the last stage of GenFT (arXiv 2506.11042); for W0 ⊙ T, HiRA as in peft; docs/mathematics.md.
    """
    activation_named(activation)
    if not isinstance(combine, str) or combine not in reference.COMBINATIONS:
        raise ValueError(f"combine: got {combine!r}, expected one of {reference.COMBINATIONS}")
    check_linear(x, weight, bias)
    r = check_factor("h", h, x, (weight.shape[0], None))
    check_factor("b", b, x, (weight.shape[1], r))
    _check_companions(h, b=b, row_bias=(row_bias, weight.shape[0]), column_bias=(column_bias, weight.shape[1]))
    seed = check_dropout(dropout, seed, x)
    scale, choice = number("scale", scale), choice_of(backend, plan)
    x, weight, bias = autocast(x, weight, bias)
    if h.dtype != x.dtype == torch.float64:  # ΔW is generated in the dtype of its factors
        h, b = h.double(), b.double()
        row_bias, column_bias = (None if one is None else one.double() for one in (row_bias, column_bias))
    y = _generated_linear(
        as_rows(x),
        weight,
        h,
        b,
        bias,
        row_bias,
        column_bias,
        combine,
        scale,
        activation,
        float(dropout),
        seed,
        choice,
    )
    return like_rows(y, x)


def generated_features(
    h: Tensor,
    b: Tensor,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    column_bias: Tensor | None = None,
    inner_activation: str = "none",
    activation: str = "none",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """Features of a generated matrix: σ_in(Tᵀ Aᵀ + bias), where T = drop(σ(H Bᵀ + column)) [N, K] is not materialised.

    Args:
        h: H [N, r]; all tensors have the same floating dtype.
        b: B [K, r].
        a: A [r2, N].
        bias: [r2] or None.
        column_bias: [K] or None, added to the columns of H Bᵀ.
        inner_activation: σ_in, applied to the [K, r2] result.
        activation: σ, applied in T; both are names in `genft_kernels.activations.ACTIVATIONS`.
        dropout: dropout probability of the elements of T, 0 <= dropout < 1.
        seed: int64 [1] from `draw_seed`, required if dropout > 0.
        backend, plan: as in `lowrank_linear`.

    Returns:
        [K, r2] in the dtype of h. Differentiable (first order) in h, b, a, bias and column_bias.

    Source: between the stages of GenFT (arXiv 2506.11042); docs/mathematics.md.
    """
    sigma_in = activation_named(inner_activation, "inner_activation")
    activation_named(activation)
    check_tensor("h", h)
    if h.dtype not in FLOATS:
        raise TypeError(f"h: dtype {h.dtype}, expected one of {FLOATS}")
    if h.dim() != 2 or 0 in h.shape:
        raise ValueError(f"h: shape {tuple(h.shape)}, expected [N, r] with N, r >= 1")
    check_factor("b", b, h, (None, h.shape[1]))
    r2 = check_factor("a", a, h, (None, h.shape[0]))
    _check_companions(h, b=b, a=a, bias=(bias, r2), column_bias=(column_bias, b.shape[0]))
    seed = check_dropout(dropout, seed, h)
    z = _generated_features(h, b, a, bias, column_bias, activation, float(dropout), seed, choice_of(backend, plan))
    return sigma_in.forward(z)


def _check_companions(h: Tensor, **others: Tensor | tuple[Tensor | None, int]) -> None:
    """Check that factors and biases have the dtype of h, and biases, given as (tensor, size), their size."""
    for name, other in others.items():
        tensor, size = other if isinstance(other, tuple) else (other, None)
        if tensor is None:
            continue
        if size is not None:
            check_factor(name, tensor, h, (size,))
        if tensor.dtype != h.dtype:
            raise TypeError(f"{name}: dtype {tensor.dtype}, expected that of h, {h.dtype}")
