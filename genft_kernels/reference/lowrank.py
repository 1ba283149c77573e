"""y = x W0ᵀ + s (drop(x) P) Qᵀ + b."""

from __future__ import annotations

from torch import Tensor

from ..dropout import Mask
from .common import add_product_, add_update, cast, outer, project, scaled, total


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
    """y [M,N] and t = drop(x) P [M,r]."""
    t = project(x, cast(p, x.dtype), dropout, seed)
    return add_update(x, weight, t, cast(q, x.dtype).t(), bias, scale=scale), t


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
    """u = s dY Q; dX = dY W0 + drop(u Pᵀ), dP = drop(x)ᵀ u, dQ = s dYᵀ t."""
    need_x, need_p, need_q = needs
    dx = dp = dq = None
    # Products that read dY and x come first, while they are in the cache; the large product evicts them.
    if need_q:
        dq = scaled(outer(t, dy).t(), q.dtype, scale)
    if need_x or need_p:
        u = dy @ scaled(q, dy.dtype, scale)
        p_t = cast(p, dy.dtype).t()
        if need_p and need_x and seed is not None:  # one mask for both
            sums = total(x, *p_t.shape)

            def add(mask: Mask, rows: slice, kept: Tensor) -> None:
                add_product_(sums, u[rows].t(), mask.drop(x[rows], rows, kept))

            dx = add_update(dy, weight.t(), u, p_t, dropout=dropout, seed=seed, each=add)
            return dx, cast(sums.t(), p.dtype), dq
        if need_p:
            dp = cast(outer(u, x, dropout, seed).t(), p.dtype)
        if need_x:
            dx = add_update(dy, weight.t(), u, p_t, dropout=dropout, seed=seed)
    return dx, dp, dq
