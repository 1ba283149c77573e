"""y = x W0ᵀ + s (drop(x) P) Qᵀ + b."""

from __future__ import annotations

from torch import Tensor

from .common import add_update, outer, project, scaled


def lowrank_linear_forward(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [M,N] and t = s drop(x) P [M,r]."""
    t = project(x, scaled(p, x.dtype, scale), dropout, seed)
    return add_update(x, weight.t(), t, q.to(x.dtype).t(), bias), t


def lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """u = s dY Q; dX = dY W0 + drop(u Pᵀ), dP = drop(x)ᵀ u, dQ = dYᵀ t."""
    need_x, need_p, need_q = needs
    dx = dp = dq = None
    # What reads dY and x comes first, while they are in the cache; the large product pushes them out.
    if need_q:
        dq = outer(t, dy).t().to(q.dtype)
    if need_x or need_p:
        u = dy @ scaled(q, dy.dtype, scale)
        if need_p:
            dp = outer(u, x, dropout, seed).t().to(p.dtype)
        if need_x:
            dx = add_update(dy, weight, u, p.to(dy.dtype).t(), None, dropout, seed)
    return dx, dp, dq
