"""x' = x + s (x ψᵀ) φ, and its product with W0."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..dither import add_dithered
from .common import cast, narrow, outer, parts, scaled
from .lowrank import lowrank_linear_backward, lowrank_linear_forward


def _edited(source: Tensor, left: Tensor, factor: Tensor, scale: float, *, overwrite: bool = False) -> Tensor:
    """source + scale · left @ factor: [M,C] + [M,r] @ [r,C], in place with `overwrite`; dithered in 16 bits."""
    if not narrow(source):
        return (source.addmm_ if overwrite else source.addmm)(left, factor, alpha=scale)
    out = source if overwrite else source.new_empty(source.shape)
    for rows in parts(source):
        # In float32, because the update may underflow in float16.
        update = left[rows].float() @ factor.float()
        add_dithered(source[rows], update.mul_(scale), range(source.shape[1]), out[rows])
    return out


def input_edit_forward(x: Tensor, psi: Tensor, phi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x' [M,K] and t = x ψᵀ [M,r]."""
    t = x @ cast(psi, x.dtype).t()
    return _edited(x, t, cast(phi, x.dtype), scale), t


def input_edit_backward(
    g: Tensor,
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    scale: float,
    needs: list[bool],
    *,
    overwrite: bool = False,
) -> tuple[Tensor | None, ...]:
    """From g = dL/dx': u = g φᵀ; dX = g + s u ψ, dψ = s uᵀ x, dφ = s tᵀ g. `overwrite`: dX may overwrite g."""
    need_x, need_psi, need_phi = needs
    dx = dpsi = dphi = None
    if need_phi:
        dphi = scaled(outer(t, g), phi.dtype, scale)
    if need_x or need_psi:
        u = g @ cast(phi, g.dtype).t()
        if need_psi:
            dpsi = scaled(outer(u, x), psi.dtype, scale)
        if need_x:
            dx = _edited(g, u, cast(psi, g.dtype), scale, overwrite=overwrite)
    return dx, dpsi, dphi


def edit_by_features(x: Tensor, weight: Tensor) -> bool:
    """Whether to compute y from the features Q = W0 φᵀ [N,r], y = x W0ᵀ + t Qᵀ + b, instead of from x'.

    In 16 bits always, because rounding x' (and dY W0 in backward) would discard the update. Else in forward if x' is
    larger than Q.
    """
    return narrow(x) or x.shape[0] > weight.shape[0]


def input_edit_linear_forward(
    x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x' W0ᵀ + b [M,N], t [M,r] and, in 16 bits, the features Q [N,r]; x' is not saved."""
    if not edit_by_features(x, weight):
        edited, t = input_edit_forward(x, psi, phi, scale)
        return F.linear(edited, weight, bias), t, None
    q = weight @ cast(phi, weight.dtype).t()
    y, t = lowrank_linear_forward(x, weight, psi.t(), q, bias, scale, 0.0, None)
    return y, t, q if narrow(x) else None


def input_edit_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    q: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """With features, the backward of a low-rank update and dφ = dQᵀ W0; else that of the edit with g = dY W0."""
    if not narrow(x):
        return input_edit_backward(dy @ weight, x, psi, phi, t, scale, needs, overwrite=True)
    dx, dp, dq = lowrank_linear_backward(dy, x, weight, psi.t(), q, t, scale, 0.0, None, needs)
    dphi = None if dq is None else cast(dq.t() @ weight, phi.dtype)
    return dx, None if dp is None else dp.t(), dphi
