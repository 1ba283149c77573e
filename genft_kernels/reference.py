"""Every operation in plain PyTorch, forward and backward written out: the truth in tests and the path taken on a CPU.

Notation: x [M,K] rows of activations, weight W0 [N,K] frozen, P [K,r], Q [N,r], ψ and φ [r,K], s scale. Nothing of
N·K elements is allocated: dropout goes panel by panel, everything else is products whose results are [M,N], [M,K] or
have a side of r. The derivations are in docs/mathematics.md.

Factors may be in a wider dtype than the activations: products run in the activations' dtype (a library product
accumulates wider inside), gradients come back in the factor's dtype.

A backward returns one entry per differentiable input, None where `needs` is False.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import keep_mask

_PANEL_ELEMENTS = 1 << 16  # a panel and its mask stay in a core's L2


# ---- skinny products, with dropout where a seed is given


def _panels(like: Tensor) -> Iterator[slice]:
    height = max(1, _PANEL_ELEMENTS // max(like.shape[1], 1))
    for start in range(0, like.shape[0], height):
        yield slice(start, min(start + height, like.shape[0]))


def _dropped(panel: Tensor, rows: slice, dropout: float, seed: Tensor) -> Tensor:
    """`panel`, the rows `rows` of a larger matrix, with dropped elements zero and survivors scaled by 1/(1-p)."""
    keep = keep_mask(seed, dropout, range(rows.start, rows.stop), range(panel.shape[1]))
    return torch.where(keep, panel / (1.0 - dropout), 0.0)


def _project(source: Tensor, factor: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(source) @ factor: [M,C] @ [C,r] -> [M,r]."""
    if seed is None:
        return source @ factor
    out = source.new_empty(source.shape[0], factor.shape[1])
    for rows in _panels(source):
        torch.mm(_dropped(source[rows], rows, dropout, seed), factor, out=out[rows])
    return out


def _outer(left: Tensor, source: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """leftᵀ @ drop(source): [r,M] @ [M,C] -> [r,C]."""
    if seed is None:
        return left.t() @ source
    out = source.new_zeros(left.shape[1], source.shape[1])
    for rows in _panels(source):
        out.addmm_(left[rows].t(), _dropped(source[rows], rows, dropout, seed))
    return out


def _add_(target: Tensor, left: Tensor, factor: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """target += drop(left @ factor) in place: [M,C] += [M,r] @ [r,C]."""
    if seed is None:
        return target.addmm_(left, factor)
    for rows in _panels(target):
        target[rows] += _dropped(left[rows] @ factor, rows, dropout, seed)
    return target


# ---- y = x W0ᵀ + s (drop(x) P) Qᵀ + b


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
    """Returns y [M,N] and t = s drop(x) P [M,r], which the backward wants."""
    t = _project(x, p.to(x.dtype) * scale, dropout, seed)
    y = F.linear(x, weight, bias)
    return y.addmm_(t, q.to(x.dtype).t()), t


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
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """u = s dY Q; dX = dY W0 + drop(u Pᵀ), dP = drop(x)ᵀ u, dQ = dYᵀ t, db = Σ dY."""
    need_x, need_p, need_q, need_bias = needs
    dx = dp = dq = None
    if need_x or need_p:
        u = dy @ (q.to(dy.dtype) * scale)
        if need_x:
            dx = _add_(dy @ weight, u, p.to(dy.dtype).t(), dropout, seed)
        if need_p:
            dp = _outer(u, x, dropout, seed).t().to(p.dtype)
    if need_q:
        dq = _outer(t, dy).t().to(q.dtype)
    return dx, dp, dq, dy.sum(0) if need_bias else None


# ---- x' = x + s (x ψᵀ) φ, and its product with W0


def input_edit_forward(x: Tensor, psi: Tensor, phi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns x' [M,K] and t = s x ψᵀ [M,r]."""
    t = x @ (psi.to(x.dtype) * scale).t()
    return torch.addmm(x, t, phi.to(x.dtype)), t


def input_edit_backward(
    g: Tensor,
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From g = dL/dx': u = s g φᵀ; dX = g + u ψ, dψ = uᵀ x, dφ = tᵀ g. `overwrite`: dX may be written into g."""
    need_x, need_psi, need_phi = needs
    dx = dpsi = dphi = None
    if need_phi:
        dphi = _outer(t, g).to(phi.dtype)
    if need_x or need_psi:
        u = g @ (phi.to(g.dtype) * scale).t()
        if need_psi:
            dpsi = _outer(u, x).to(psi.dtype)
        if need_x:
            factor = psi.to(g.dtype)
            dx = g.addmm_(u, factor) if overwrite else torch.addmm(g, u, factor)
    return dx, dpsi, dphi


def input_edit_linear_forward(
    x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns y = x' W0ᵀ + b [M,N] and t [M,r]; x' is not kept.

    With more rows than outputs, x' would be the larger of the two passes: then the same y is made from the features
    W0 φᵀ [N,r], y = x W0ᵀ + t (W0 φᵀ)ᵀ + b.
    """
    if x.shape[0] > weight.shape[0]:
        return lowrank_linear_forward(x, weight, psi.t(), weight @ phi.to(weight.dtype).t(), bias, scale, 0.0, None)
    edited, t = input_edit_forward(x, psi, phi, scale)
    return F.linear(edited, weight, bias), t


def input_edit_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The backward of the edit at g = dY W0, and db = Σ dY."""
    dx = dpsi = dphi = None
    if any(needs[:3]):
        dx, dpsi, dphi = input_edit_backward(
            dy @ weight, x, psi, phi, t, scale, (needs[0], needs[1], needs[2]), overwrite=True
        )
    return dx, dpsi, dphi, dy.sum(0) if needs[3] else None


# ---- h = σ(ρ drop(W0) Aᵀ + bias)


def weight_features_forward(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Returns the pre-activation z = ρ drop(W0) Aᵀ + bias [N,r], in A's dtype."""
    z = _project(weight, a.to(weight.dtype).t(), dropout, seed).to(a.dtype)
    z = z.mul_(ratio)
    return z if bias is None else z.add_(bias)


def weight_features_backward(dz: Tensor, weight: Tensor, ratio: float, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = ρ dZᵀ drop(W0) [r,K] in dZ's dtype."""
    return _outer(dz.to(weight.dtype), weight, dropout, seed).to(dz.dtype).mul_(ratio)
