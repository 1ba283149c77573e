"""y = x W0ᵀ + b with an update of a few outputs, y[:,I] += s x Vᵀ, or inputs, y += s x[:,J] Vᵀ; and the sums of squares
of a weight gradient's rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .common import add_base_, add_update, cast, narrow, panels, total

_PANEL_ELEMENTS = 1 << 19  # of a weight's gradient


def sliced_linear_forward(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    columns: bool,
    scale: float,
) -> tuple[Tensor]:
    """y [M,N]; V is [k,K] for rows, [N,k] for columns. Nothing is saved: backward gathers again."""
    v_t = cast(values, x.dtype).t()
    if columns:
        return (add_update(x, weight, x.index_select(1, indices), v_t, bias, scale=scale),)
    return (_add_some(F.linear(x, weight, bias), indices, x @ v_t, scale, x, weight, bias),)


def sliced_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: bool,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Rows: u = s dY[:,I]; dX = dY W0 + u V, dV = uᵀ x. Columns: dX = dY W0, dX[:,J] += s dY V; dV = s dYᵀ x[:,J]."""
    need_x, need_values = needs
    dx = dv = None
    v = cast(values, dy.dtype)
    if columns:
        if need_x:
            dx = _add_some(dy @ weight, indices, dy @ v, scale, dy, weight.t())
        if need_values:
            dv = dy.t() @ (x.index_select(1, indices) * scale)
    elif need_x or need_values:
        u = dy.index_select(1, indices) * scale
        if need_x:
            dx = add_update(dy, weight.t(), u, v)
        if need_values:
            dv = u.t() @ x
    return dx, None if dv is None else dv.to(values.dtype)


def _add_some(
    result: Tensor,
    indices: Tensor,
    update: Tensor,
    scale: float,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`result` [M,N] = source @ weightᵀ + bias, with scale · `update` [M,k] added to the columns `indices`. In 16 bits
    those columns are recomputed on top of the update: k/N of a product."""
    if not narrow(result):
        return result.index_add_(1, indices, update, alpha=scale)
    part_bias = None if bias is None else bias.index_select(0, indices)
    chosen = columns_of(weight.t(), indices)
    return result.index_copy_(1, indices, add_base_(update.mul_(scale), source, chosen, part_bias))


def columns_of(matrix: Tensor, indices: Tensor) -> Tensor:
    """matrix[:, indices]; for a transposed matrix, gathers rows, which is 250 times faster on a CPU."""
    if matrix.stride(0) == 1:
        return matrix.t().index_select(0, indices).t()
    return matrix.index_select(1, indices)


def squared_gradient_sums_forward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
    """Sums over k of G[n,k]², G = dYᵀ x [N,K], computed one panel of rows at a time; float32 or wider [N].

    Panels are summed over M in float32, converting a bounded number of 16-bit rows at a time; float16 could overflow.
    """
    n, k = dy.shape[1], x.shape[1]
    sums = total(dy, n)
    for rows in panels(n, k, _PANEL_ELEMENTS):
        panel = total(dy, rows.stop - rows.start, k)
        stretches = [slice(None)] if panel.dtype == dy.dtype else panels(x.shape[0], k, _PANEL_ELEMENTS)
        for part in stretches:
            panel.addmm_(dy[part, rows].t().to(panel.dtype), x[part].to(panel.dtype))
        sums[rows] = panel.square_().sum(1)
    return (sums,)
