"""y_i = x_i W0ᵀ + x_i P_g Q_gᵀ + b for sample i of group g."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import add_base_, panels, total

_GATHERED_ELEMENTS = 1 << 20  # number of elements of factors gathered at a time


def _per_sample(factor: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor [G,C,r] gathered per sample, [S,C,r]; zeros for samples without a group."""
    last = factor.shape[0] - 1
    taken = factor.index_select(0, index.clamp(0, last)).to(dtype)
    return taken.masked_fill_(((index < 0) | (index > last))[:, None, None], 0.0)


def _by_sample(group: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
    """Each matrix [M,C] as [S,M/S,C]."""
    samples = group.shape[0]
    return tuple(m.unflatten(0, (samples, m.shape[0] // max(samples, 1))) for m in matrices)


def grouped_lowrank_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    group: Tensor,
    order: Tensor,
    bounds: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [M,N] and t [M,r], t_i = x_i P_g."""
    y = x.new_empty(x.shape[0], q.shape[1])
    t = x.new_empty(x.shape[0], p.shape[2])
    xs, ys, ts = _by_sample(group, x, y, t)
    for part in panels(xs.shape[0], max(p.shape[1], q.shape[1]) * p.shape[2], _GATHERED_ELEMENTS):
        index = group[part]
        torch.bmm(xs[part], _per_sample(p, index, x.dtype), out=ts[part])
        torch.bmm(ts[part], _per_sample(q, index, x.dtype).mT, out=ys[part])
    return y if weight is None else add_base_(y, x, weight.t(), bias), t


def grouped_lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    group: Tensor,
    order: Tensor,
    bounds: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """u_i = dy_i Q_g; dX_i = dy_i W0 + u_i P_gᵀ, dP_g = Σ x_iᵀ u_i and dQ_g = Σ dy_iᵀ t_i over the group."""
    need_x, need_p, need_q = needs
    groups = p.shape[0]
    dx = dp = dq = None
    if need_x:
        dx = x.new_empty(x.shape)
    dp, dq = (total(like, groups + 1, *like.shape[1:]) if need else None for like, need in ((p, need_p), (q, need_q)))
    xs, dys, ts = _by_sample(group, x, dy, t)
    for part in panels(xs.shape[0], max(p.shape[1], q.shape[1]) * p.shape[2], _GATHERED_ELEMENTS):
        index = group[part]
        # Samples without a group are added to an extra group, which is discarded.
        slot = torch.where((index < 0) | (index > groups), groups, index)
        if need_x or need_p:
            u = torch.bmm(dys[part], _per_sample(q, index, dy.dtype))
            if dx is not None:
                torch.bmm(u, _per_sample(p, index, dy.dtype).mT, out=_by_sample(group, dx)[0][part])
            if dp is not None:
                dp.index_add_(0, slot, torch.bmm(xs[part].mT, u).to(dp.dtype))
        if dq is not None:
            dq.index_add_(0, slot, torch.bmm(dys[part].mT, ts[part]).to(dq.dtype))
    return (
        dx if dx is None or weight is None else add_base_(dx, dy, weight),
        None if dp is None else dp[:groups].to(p.dtype),
        None if dq is None else dq[:groups].to(q.dtype),
    )
