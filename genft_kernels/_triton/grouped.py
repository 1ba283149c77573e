"""y_i = x_i W0ᵀ + x_i P_g Q_gᵀ + b for sample i of group g."""

from __future__ import annotations

from torch import Tensor

from ..plan import LaunchPlan
from ..reference.common import add_base_
from ..rows import RowGroups
from .kernels.grouped import launch_grouped_project, launch_grouped_reduce, launch_grouped_update


def grouped_lowrank_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    group: Tensor,
    order: Tensor,
    bounds: Tensor,
    bias: Tensor | None,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor]:
    rows = RowGroups(group, order, bounds)
    t = launch_grouped_project(x, p, rows, plan.skinny)
    y = x.new_zeros(x.shape[0], q.shape[1])
    launch_grouped_update(y, t, q, rows, plan.skinny)
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
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    need_x, need_p, need_q = needs
    rows = RowGroups(group, order, bounds)
    dx = dp = dq = None
    if need_x or need_p:
        u = launch_grouped_project(dy, q, rows, plan.skinny)
        if need_x:
            dx = x.new_zeros(x.shape)
            launch_grouped_update(dx, u, p, rows, plan.skinny)
            dx = dx if weight is None else add_base_(dx, dy, weight)
        if need_p:
            dp = launch_grouped_reduce(x, u, rows, plan.skinny, p.dtype)
    if need_q:
        dq = launch_grouped_reduce(dy, t, rows, plan.skinny, q.dtype)
    return dx, dp, dq
