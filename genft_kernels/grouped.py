"""A frozen linear layer with different low-rank updates for the samples of a batch, in one operation.

The updates are stacked, P [G, K, r] and Q [G, N, r]; `RowGroups` assigns them to the samples. It is computed once per
batch, on the device and without synchronisation, and used by all layers.
"""

from __future__ import annotations

from torch import Tensor

from .checks import as_rows, autocast, check_activations, check_factor, check_linear, choice_of, like_rows
from .operation import Operation
from .plan import LaunchPlan
from .reference import grouped as reference
from .rows import RowGroups, check_rows

_grouped_lowrank_linear = Operation(
    "grouped_lowrank_linear",
    reference,
    sizes=lambda x, q, p: (x.shape[0], q.shape[1], x.shape[1], p.shape[2]),
    outputs={
        "y": lambda x, q: x.new_empty(x.shape[0], q.shape[1]),
        "t": lambda x, p: x.new_empty(x.shape[0], p.shape[2]),
    },
    gradients=("x", "p", "q"),
)


def grouped_lowrank_linear(
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    rows: RowGroups,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update per sample: y_i = x_i (W0 + Q_g P_gᵀ)ᵀ + b for sample i of group g,
    and y_i = x_i W0ᵀ + b for samples without a group.

    Args:
        x: activations [S, ..., K] of S samples x[i].
        weight: frozen W0 [N, K], any strides, in the dtype of x; None for only the updates, y_i = x_i P_g Q_gᵀ, which
            are 0 for samples without a group.
        p: factors [G, K, r], in the dtype of x or float32; zero-padded for updates of lower rank.
        q: factors [G, N, r], likewise; including the scale.
        rows: the groups of the S samples, from `group_rows`.
        bias: [N] or None, in the dtype of x; None if weight is None.
        backend, plan: as in `lowrank_linear`.

    Returns:
        y [S, ..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable (first order) in x, p, q
        and bias.

    Source: docs/mathematics.md, "Samples that take different updates".
    """
    if weight is not None:
        check_linear(x, weight, bias)
    else:
        check_activations(x)
        if bias is not None:
            raise ValueError("bias: got a tensor, expected None because weight is None")
    if x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected [S, ..., K]")
    check_rows(rows, x)
    r = check_factor("p", p, x, (rows.groups, x.shape[-1], None))
    if weight is None and isinstance(q, Tensor) and q.dim() != 3:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [{rows.groups}, N, {r}]")
    n = q.shape[1] if weight is None else weight.shape[0]
    check_factor("q", q, x, (rows.groups, n, r))
    choice = choice_of(backend, plan)
    x, weight, bias = autocast(x, weight, bias)
    y = _grouped_lowrank_linear(as_rows(x), weight, p, q, *rows, bias, choice)
    return like_rows(y, x)
