"""y = c ⊙ (d W0ᵀ + s (d P) Qᵀ) + (x − d) W0ᵀ + b with d = drop(x): without dropout, c ⊙ (x (W0 + s Q Pᵀ)ᵀ) + b."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dither import add_dithered
from .common import add_base_, add_update, cast, mask_of, narrow, parts, scaled, total
from .lowrank import lowrank_linear_backward, lowrank_linear_forward


def rescaled_linear_forward(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [M,N], t = d P [M,r] and, with `save`, z = d W0ᵀ + s t Qᵀ [M,N], which the gradient of c needs."""
    d = x if seed is None else drop(x, dropout, seed)
    z, t = lowrank_linear_forward(d, weight, p, q, None, scale, 0.0, None)
    y = rescale(z, gain, bias, overwrite=not save)
    if seed is not None:
        add_base_(y, torch.sub(x, d, out=d), weight.t())
    return y, t, z if save else None


def rescaled_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    gain: Tensor,
    t: Tensor,
    z: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dz = c ⊙ dY and dc = Σ_m dY ⊙ z; then the gradients of the low-rank layer for dz, with drop's own in dX:
    dX = dY W0 + drop((dz − dY) W0 + s (dz Q) Pᵀ)."""
    need_x, need_p, need_q, need_gain = needs
    dx = dp = dq = None
    dgain = column_sums(dy, z, gain.dtype) if need_gain else None
    if need_x or need_p or need_q:
        dz = rescale(dy, gain)
        d = drop(x, dropout, seed) if seed is not None and need_p else x
        asked = [need_x and seed is None, need_p, need_q]
        dx, dp, dq = lowrank_linear_backward(dz, d, weight, p, q, t, scale, 0.0, None, asked)
        if need_x and seed is not None:
            u = dz @ scaled(q, dz.dtype, scale)
            dx = add_update(dz.sub_(dy), weight.t(), u, cast(p, dz.dtype).t())
            add_base_(drop(dx, dropout, seed, out=dx), dy, weight)
    return dx, dp, dq, dgain


def drop(source: Tensor, dropout: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """drop(source) [M,C], panel by panel; into `out`, which may be `source`."""
    out = source.new_empty(source.shape) if out is None else out
    mask = mask_of(source, dropout, seed)
    for rows in parts(source):
        out[rows] = mask.drop(source[rows], rows)
    return out


def rescale(source: Tensor, gain: Tensor, bias: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
    """gain ⊙ source + bias [M,N], in the memory of `source` with `overwrite`; dithered in 16 bits, where rounding to
    nearest would lose any gain that differs from 1 by less than half a unit in the last place."""
    out = source if overwrite else source.new_empty(source.shape)
    if not narrow(source):
        gain = cast(gain, source.dtype)
        return torch.mul(source, gain, out=out) if bias is None else torch.addcmul(bias, source, gain, out=out)
    change = gain.float() - 1.0
    for rows in parts(source):
        update = source[rows].float().mul_(change)
        add_dithered(source[rows], update if bias is None else update.add_(bias), range(source.shape[1]), out[rows])
    return out


def column_sums(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_m left ⊙ right [N] in `dtype`, panel by panel."""
    sums = total(left, left.shape[1])
    for rows in parts(left):
        sums += (left[rows].to(sums.dtype) * right[rows]).sum(0)
    return sums.to(dtype)
