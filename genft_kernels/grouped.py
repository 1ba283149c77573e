"""A frozen linear layer in which the rows of one batch take different low-rank updates, as one operation.

The updates are stacked, P [G, K, r] and Q [G, N, r]; `RowGroups` says which of them each sample of the batch takes. It
is made once for a batch, on the device and without a synchronisation, and serves every layer that the batch goes
through.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import autocast, check_activations, check_factor, check_linear, choice_of
from .operator import operator
from .ops import _resolve, present, wanted
from .plan import LaunchPlan
from .rows import RowGroups


@operator("grouped_lowrank_linear")
def _grouped_lowrank_linear(
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    index: Tensor,
    order: Tensor,
    bounds: Tensor,
    bias: Tensor | None,
    plan: str,
) -> tuple[Tensor, Tensor]:
    run, extra = _resolve(plan, "grouped_lowrank_linear", x, q.shape[1], p.shape[2])
    rows = RowGroups(index, order, bounds)
    return run.grouped_lowrank_linear_forward(x, weight, p, q, rows, bias, *extra)  # type: ignore[no-any-return]


@_grouped_lowrank_linear.register_fake
def _(x, weight, p, q, index, order, bounds, bias, plan):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], q.shape[1]), x.new_empty(x.shape[0], p.shape[2])


@operator("grouped_lowrank_linear_backward")
def _grouped_lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    index: Tensor,
    order: Tensor,
    bounds: Tensor,
    plan: str,
    needs: list[bool],
) -> list[Tensor]:
    run, extra = _resolve(plan, "grouped_lowrank_linear", x, q.shape[1], p.shape[2])
    rows = RowGroups(index, order, bounds)
    return present(run.grouped_lowrank_linear_backward(dy, x, weight, p, q, t, rows, tuple(needs), *extra), dy)


@_grouped_lowrank_linear_backward.register_fake
def _(dy, x, weight, p, q, t, index, order, bounds, plan, needs):  # type: ignore[no-untyped-def]
    shapes = (x.shape, p.shape, q.shape, (q.shape[1],))
    dtypes = (dy.dtype, p.dtype, q.dtype, dy.dtype)
    return [
        dy.new_empty(s if need else (0,), dtype=d if need else dy.dtype)
        for s, d, need in zip(shapes, dtypes, needs, strict=True)
    ]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, p, q, index, order, bounds, _, ctx.plan = inputs
    ctx.save_for_backward(x, weight, p, q, output[1], index, order, bounds)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    wants = ctx.needs_input_grad
    needs = [wants[0], wants[2], wants[3], wants[7]]
    dx, dp, dq, db = wanted(_grouped_lowrank_linear_backward(dy, *ctx.saved_tensors, ctx.plan, needs), needs)
    return dx, None, dp, dq, None, None, None, db, None


_grouped_lowrank_linear.register_autograd(_autograd, setup_context=_context)


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
    """A frozen linear layer whose samples take different low-rank updates: y_i = x_i (W0 + Q_g P_gᵀ)ᵀ + b for sample i
    of group g, and y_i = x_i W0ᵀ + b for a sample of no group.

    Args:
        x: activations [S, ..., K], a sample being x[i], whatever it holds.
        weight: frozen W0 [N, K], any strides, the dtype of x; None for the updates alone, y_i = x_i P_g Q_gᵀ, which are
            0 for a sample of no group.
        p: factors [G, K, r], the dtype of x or float32. Updates of lower rank are filled up with zeros.
        q: factors [G, N, r], likewise; a scale is part of them.
        rows: from `group_rows`, the groups of the S samples.
        bias: [N] or None, the dtype of x; None without a weight.
        backend, plan: as in `lowrank_linear`.

    Returns:
        y [S, ..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable once in x, p, q, bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits.

    Source: docs/mathematics.md, "Samples that take different updates".
    """
    if not isinstance(rows, RowGroups):
        raise TypeError(f"rows: got {type(rows).__name__}, expected what group_rows returns")
    if weight is not None:
        check_linear(x, weight, bias)
    else:
        check_activations(x)
        if bias is not None:
            raise ValueError("bias: got a tensor, expected None because weight is None")
    if x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected [S, ..., K]")
    if rows.group.shape[0] != x.shape[0]:
        raise ValueError(f"rows: groups of {rows.group.shape[0]} samples, expected S = {x.shape[0]} of x [S, ..., K]")
    if rows.group.device != x.device:
        raise ValueError(f"rows: on {rows.group.device}, expected the device of x, {x.device}")
    r = check_factor("p", p, x, (rows.groups, x.shape[-1], None))
    if weight is None and isinstance(q, Tensor) and q.dim() != 3:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [{rows.groups}, N, {r}]")
    n = q.shape[1] if weight is None else weight.shape[0]
    check_factor("q", q, x, (rows.groups, n, r))
    x, weight, bias = autocast(x, weight, bias)
    y: Tensor = _grouped_lowrank_linear(
        x.reshape(-1, x.shape[-1]), weight, p, q, *rows, bias, choice_of(backend, plan)
    )[0]
    return y.view(*x.shape[:-1], n)


__all__ = ["grouped_lowrank_linear"]
