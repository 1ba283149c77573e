"""The Triton launchers, one function for each of `genft_kernels.reference`, with the plan as last argument.

Imported when an operation first runs a Triton algorithm, never by `import genft_kernels`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..plan import LaunchPlan
from .product import launch_product
from .skinny import launch_skinny

__all__ = [
    "input_edit_backward",
    "input_edit_forward",
    "input_edit_linear_backward",
    "input_edit_linear_forward",
    "lowrank_linear_backward",
    "lowrank_linear_forward",
    "weight_features_backward",
    "weight_features_forward",
]

Gradients = tuple[Tensor | None, ...]


def lowrank_linear_forward(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor]:
    r = p.shape[1]
    t = launch_skinny(x, plan.skinny, r, a=p, scale=scale, dropout=dropout, seed=seed).u
    if plan.algorithm == "fused":
        return launch_product(x, weight.t(), t, q.t(), plan.product, bias=bias), t
    y = F.linear(x, weight, bias)
    launch_skinny(y, plan.skinny, r, u=t, b=q.t(), out=y)
    return y, t


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
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_p, need_q, need_bias = needs
    need_u = need_x or need_p
    r = p.shape[1]
    # One pass over dY.
    over_dy = launch_skinny(dy, plan.skinny, r, a=q if need_u else None, left=t if need_q else None, scale=scale)
    u, dq = over_dy.u, over_dy.left_s
    dx = dp = None
    if need_x and plan.algorithm == "thin":
        # One pass over g and x.
        g = dy @ weight
        over_g = launch_skinny(
            g, plan.skinny, r, u=u, b=p.t(), out=g, z=x if need_p else None, dropout=dropout, seed=seed
        )
        dx, dp = over_g.out, over_g.u_z
    else:
        if need_x:
            dx = launch_product(dy, weight, u, p.t(), plan.product, dropout=dropout, seed=seed)
        if need_p:
            dp = launch_skinny(x, plan.skinny, r, left=u, dropout=dropout, seed=seed).left_s
    return (
        dx,
        None if dp is None else dp.t().to(p.dtype),
        None if dq is None else dq.t().to(q.dtype),
        dy.sum(0) if need_bias else None,
    )


def input_edit_forward(x: Tensor, psi: Tensor, phi: Tensor, scale: float, plan: LaunchPlan) -> tuple[Tensor, Tensor]:
    over_x = launch_skinny(x, plan.skinny, psi.shape[0], a=psi.t(), b=phi, scale=scale)
    return over_x.out, over_x.u


def input_edit_backward(
    g: Tensor,
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
    plan: LaunchPlan,
    overwrite: bool = False,
) -> Gradients:
    need_x, need_psi, need_phi = needs
    over_g = launch_skinny(
        g,
        plan.skinny,
        psi.shape[0],
        a=phi.t() if need_x or need_psi else None,
        left=t if need_phi else None,
        b=psi if need_x else None,
        out=g if overwrite else None,
        z=x if need_psi else None,
        scale=scale,
    )
    return (
        over_g.out if need_x else None,
        None if over_g.u_z is None else over_g.u_z.to(psi.dtype),
        None if over_g.left_s is None else over_g.left_s.to(phi.dtype),
    )


def _edit_features(weight: Tensor, phi: Tensor, plan: LaunchPlan) -> Tensor:
    """Q = W0 φᵀ [N,r]: the edit as a low-rank update, which is what the fused product takes."""
    return launch_skinny(weight, plan.skinny, phi.shape[0], a=phi.t()).u


def input_edit_linear_forward(
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    bias: Tensor | None,
    scale: float,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor]:
    if plan.algorithm == "fused":
        q = _edit_features(weight, phi, plan)
        return lowrank_linear_forward(x, weight, psi.t(), q, bias, scale, 0.0, None, plan)
    edited, t = input_edit_forward(x, psi, phi, scale, plan)
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
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_psi, need_phi, need_bias = needs
    if plan.algorithm == "fused":
        # Q is made again rather than kept: a pass over W0 against N·r saved elements.
        q = _edit_features(weight, phi, plan)
        dx, dp, dq, db = lowrank_linear_backward(
            dy, x, weight, psi.t(), q, t, scale, 0.0, None, (need_x, need_psi, need_phi, need_bias), plan
        )
        dphi = None if dq is None else launch_skinny(weight, plan.skinny, phi.shape[0], left=dq).left_s
        return dx, None if dp is None else dp.t(), None if dphi is None else dphi.to(phi.dtype), db
    dx = dpsi = dphi = None
    if need_x or need_psi or need_phi:
        dx, dpsi, dphi = input_edit_backward(
            dy @ weight, x, psi, phi, t, scale, (need_x, need_psi, need_phi), plan, overwrite=True
        )
    return dx, dpsi, dphi, dy.sum(0) if need_bias else None


def weight_features_forward(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
    plan: LaunchPlan,
) -> Tensor:
    return launch_skinny(
        weight,
        plan.skinny,
        a.shape[0],
        a=a.t(),
        bias=bias,
        u_dtype=a.dtype,
        scale=ratio,
        dropout=dropout,
        seed=seed,
    ).u


def weight_features_backward(
    dz: Tensor, weight: Tensor, ratio: float, dropout: float, seed: Tensor | None, plan: LaunchPlan
) -> Tensor:
    over_w = launch_skinny(weight, plan.skinny, dz.shape[1], left=dz, dropout=dropout, seed=seed)
    return (over_w.left_s * ratio).to(dz.dtype)
