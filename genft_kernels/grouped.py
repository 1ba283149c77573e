"""A frozen linear layer with different low-rank updates for the samples of a batch, in one operation.

The updates are stacked, P [G, K, r] and Q [G, N, r], or in lists; `RowGroups` assigns them to the samples. It is
computed once per batch, on the device and without synchronisation, and used by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import (
    as_rows,
    autocast,
    autocasting,
    check_activations,
    check_factor,
    check_linear,
    check_tensor,
    choice_of,
    like_rows,
    number,
)
from .operation import Operation, eager, is_library
from .plan import LaunchPlan
from .reference import grouped as reference
from .reference.common import cast as in_dtype
from .rows import RowGroups, check_groups, check_rows, group_rows

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
    p: Tensor | Sequence[Tensor],
    q: Tensor | Sequence[Tensor],
    rows: RowGroups | list[int],
    bias: Tensor | None = None,
    *,
    scale: Sequence[float] | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update per sample: y_i = x_i (W0 + s_g Q_g P_gᵀ)ᵀ + b for sample i of group
    g, and y_i = x_i W0ᵀ + b for samples without a group.

    Lists of factors are stacked first, except on a CPU without gradients: there they are used as they are, which is
    faster for a single call. For several calls, use `stack_factors` once.

    Args:
        x: activations [S, ..., K] of S samples x[i].
        weight: frozen W0 [N, K], any strides, in the dtype of x; None for only the updates, y_i = s_g x_i P_g Q_gᵀ,
            which are 0 for samples without a group.
        p: factors [G, K, r], in the dtype of x or float32; zero-padded for updates of lower rank. Or G factors [K, r],
            each of its own rank.
        q: factors [G, N, r], likewise; including the scale. Or G factors [N, r].
        rows: the groups of the S samples, from `group_rows`; or a list of S numbers as it takes them.
        bias: [N] or None, in the dtype of x; None if weight is None.
        scale: with lists, s_g for each group; None for 1.
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
    n = None if weight is None else weight.shape[0]
    choice = choice_of(backend, plan)
    if not isinstance(p, Tensor) and not isinstance(q, Tensor):
        scale = _check_listed(p, q, scale, n, x)
        if isinstance(rows, list):
            check_groups(rows, len(p), x)
            if is_library(choice, x) and _runs_listed(x, weight, bias, *p, *q):
                y = reference.listed_lowrank_linear(as_rows(x), weight, p, q, scale, rows, bias)
                return like_rows(y, x)
        p, q = stack_factors(p, q, scale)
    elif scale is not None:
        raise ValueError("scale: got a list, expected None because p and q are no lists, so q includes it")
    p, q = _tensor("p", p), _tensor("q", q)
    if isinstance(rows, list):
        rows = group_rows(rows, len(p), x.device)
    check_rows(rows, x)
    r = check_factor("p", p, x, (rows.groups, x.shape[-1], None))
    if n is None and q.dim() != 3:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [{rows.groups}, N, {r}]")
    check_factor("q", q, x, (rows.groups, q.shape[1] if n is None else n, r))
    x, weight, bias = autocast(x, weight, bias)
    y = _grouped_lowrank_linear(as_rows(x), weight, p, q, *rows, bias, choice)
    return like_rows(y, x)


def stack_factors(p: Sequence[Tensor], q: Sequence[Tensor], scale: Sequence[float]) -> tuple[Tensor, Tensor]:
    """P [G, K, r] and Q [G, N, r] for `grouped_lowrank_linear`, from G factors [K, r_g] and [N, r_g] and their scales:
    in the widest of their dtypes, zero-padded to the largest rank, Q including the scale."""
    r = max(factor.shape[1] for factor in p)
    dtype = p[0].dtype
    for factor in (*p, *q):
        dtype = torch.promote_types(dtype, factor.dtype)
    if len(set(scale)) == 1:  # one pass instead of one per group
        return _stacked(p, r, dtype), _stacked(q, r, dtype).mul_(scale[0])
    return _stacked(p, r, dtype), _stacked([factor.to(dtype) * s for factor, s in zip(q, scale, strict=True)], r, dtype)


def _stacked(factors: Sequence[Tensor], r: int, dtype: torch.dtype) -> Tensor:
    """[G, C, r], laid out as the factors [C, r_g] are: transposing them takes several times as long as copying."""
    if not factors[0].is_contiguous():
        return torch.stack([_padded(factor.t(), (0, 0, 0, r - factor.shape[1]), dtype) for factor in factors]).mT
    return torch.stack([_padded(factor, (0, r - factor.shape[1]), dtype) for factor in factors])


def _padded(factor: Tensor, missing: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return F.pad(in_dtype(factor, dtype), missing) if any(missing) else in_dtype(factor, dtype)


def _check_listed(
    p: Sequence[Tensor], q: Sequence[Tensor], scale: Sequence[float] | None, n: int | None, x: Tensor
) -> Sequence[float]:
    """Check factors in lists. Returns the scales."""
    scale = [1.0] * len(p) if scale is None else [number("scale", value) for value in scale]
    if not len(p) == len(q) == len(scale) >= 1:
        raise ValueError(f"p, q, scale: got {len(p)}, {len(q)} and {len(scale)} groups, expected equally many")
    for p_g, q_g in zip(p, q, strict=True):
        r = check_factor("p", p_g, x, (x.shape[-1], None))
        if n is None:
            check_tensor("q", q_g)
            n = q_g.shape[0]
        check_factor("q", q_g, x, (n, r))
    return scale


def _tensor(name: str, value: Tensor | Sequence[Tensor]) -> Tensor:
    check_tensor(name, value)
    return cast(Tensor, value)


def _runs_listed(x: Tensor, *others: Tensor | None) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not autocasting(x) and eager(x, *others)
