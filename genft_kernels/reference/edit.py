"""x' = x + s (x ψᵀ) φ, and its product with W0."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..dither import add_dithered
from .common import narrow, outer, parts, scaled
from .lowrank import lowrank_linear_backward, lowrank_linear_forward


def _edited(source: Tensor, left: Tensor, factor: Tensor, *, overwrite: bool = False) -> Tensor:
    """source + left @ factor: [M,C] + [M,r] @ [r,C], in source's memory if it may; 16 bits keep the sum's mean."""
    if not narrow(source):
        return source.addmm_(left, factor) if overwrite else source.addmm(left, factor)
    out = source if overwrite else source.new_empty(source.shape)
    for rows in parts(source):
        # In float32: the update may be below what float16 can hold.
        add_dithered(source[rows], left[rows].float() @ factor.float(), range(source.shape[1]), out[rows])
    return out


def input_edit_forward(x: Tensor, psi: Tensor, phi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x' [M,K] and t = s x ψᵀ [M,r]."""
    t = x @ scaled(psi, x.dtype, scale).t()
    return _edited(x, t, phi.to(x.dtype)), t


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
    """From g = dL/dx': u = s g φᵀ; dX = g + u ψ, dψ = uᵀ x, dφ = tᵀ g. `overwrite`: dX may be written into g."""
    need_x, need_psi, need_phi = needs
    dx = dpsi = dphi = None
    if need_phi:
        dphi = outer(t, g).to(phi.dtype)
    if need_x or need_psi:
        u = g @ scaled(phi, g.dtype, scale).t()
        if need_psi:
            dpsi = outer(u, x).to(psi.dtype)
        if need_x:
            dx = _edited(g, u, psi.to(g.dtype), overwrite=overwrite)
    return dx, dpsi, dphi


def edit_by_features(x: Tensor, weight: Tensor) -> bool:
    """Whether an edited linear layer makes y from the features Q = W0 φᵀ [N,r], y = x W0ᵀ + t Qᵀ + b, and not from x'.

    In 16 bits always, forward and backward: x' would round the update away, and dY W0 that of dX. Else where x' is the
    larger of the two, forward.
    """
    return narrow(x) or x.shape[0] > weight.shape[0]


def input_edit_linear_forward(
    x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x' W0ᵀ + b [M,N], t [M,r] and, in 16 bits, the features Q [N,r]; x' is not kept."""
    if not edit_by_features(x, weight):
        edited, t = input_edit_forward(x, psi, phi, scale)
        return F.linear(edited, weight, bias), t, None
    q = weight @ phi.to(weight.dtype).t()
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
    """With the features, the backward of a low-rank update and dφ = dQᵀ W0; else that of the edit at g = dY W0."""
    if not narrow(x):
        return input_edit_backward(dy @ weight, x, psi, phi, t, scale, needs, overwrite=True)
    dx, dp, dq = lowrank_linear_backward(dy, x, weight, psi.t(), q, t, scale, 0.0, None, needs)
    dphi = None if dq is None else (dq.t() @ weight).to(phi.dtype)
    return dx, None if dp is None else dp.t(), dphi
