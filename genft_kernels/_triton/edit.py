"""x' = x + s (x ψᵀ) φ, and its product with W0."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..plan import LaunchPlan
from ..reference.common import narrow
from ..reference.edit import edit_by_features
from .kernels.skinny import launch_project, launch_reduce, launch_update
from .lowrank import lowrank_linear_backward, lowrank_linear_forward


def input_edit_forward(x: Tensor, psi: Tensor, phi: Tensor, scale: float, plan: LaunchPlan) -> tuple[Tensor, Tensor]:
    t = launch_project(x, psi.t(), plan.skinny, scale=scale)
    return launch_update(t, phi, plan.skinny, s=x), t


def input_edit_backward(
    g: Tensor,
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    scale: float,
    needs: list[bool],
    plan: LaunchPlan,
    *,
    overwrite: bool = False,
) -> tuple[Tensor | None, ...]:
    need_x, need_psi, need_phi = needs
    dx = dpsi = dphi = None
    if need_phi:
        dphi = launch_reduce(g, t, plan.skinny, phi.dtype, transposed=True)
    if need_x or need_psi:
        u = launch_project(g, phi.t(), plan.skinny, scale=scale)
        if need_psi:
            dpsi = launch_reduce(x, u, plan.skinny, psi.dtype, transposed=True)
        if need_x:
            dx = launch_update(u, psi, plan.skinny, s=g, overwrite=overwrite)
    return dx, dpsi, dphi


def input_edit_linear_forward(
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    bias: Tensor | None,
    scale: float,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if not edit_by_features(x, weight):
        edited, t = input_edit_forward(x, psi, phi, scale, plan)
        return F.linear(edited, weight, bias), t, None
    q = launch_project(weight, phi.t(), plan.skinny)
    y, t = lowrank_linear_forward(x, weight, psi.t(), q, bias, scale, 0.0, None, plan)
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
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    if not narrow(x):
        return input_edit_backward(dy @ weight, x, psi, phi, t, scale, needs, plan, overwrite=True)
    dx, dp, dq = lowrank_linear_backward(dy, x, weight, psi.t(), q, t, scale, 0.0, None, needs, plan)
    dphi = None if dq is None else launch_reduce(weight, dq, plan.skinny, phi.dtype, transposed=True)
    return dx, None if dp is None else dp.t(), dphi
