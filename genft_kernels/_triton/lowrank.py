"""y = x W0ᵀ + s (drop(x) P) Qᵀ + b: seeded, single and fused."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import LaunchPlan
from ..reference.common import add_base_
from .kernels.product import launch_product
from .kernels.single import launch_single
from .kernels.skinny import launch_project, launch_reduce, launch_update


def _single(a: Tensor, seed: Tensor | None, plan: LaunchPlan) -> bool:
    """Whether this call can use a plan's single pass; else it uses the seeded algorithm."""
    waits = a.shape[0] > plan.product.m
    return plan.algorithm == "single" and seed is None and not (waits and torch.version.hip is not None)


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
    if _single(x, seed, plan):
        return launch_single(x, weight.t(), p, q.t(), plan.product, bias=bias, scale=scale)
    t = launch_project(x, p, plan.skinny, scale=scale, dropout=dropout, seed=seed)
    if plan.algorithm == "fused":
        return launch_product(x, weight.t(), t, q.t(), plan.product, bias=bias), t
    return add_base_(launch_update(t, q.t(), plan.skinny, like=x), x, weight.t(), bias), t


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
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    need_x, need_p, need_q = needs
    u = dq = dx = dp = None
    if need_x and _single(dy, seed, plan):
        dx, u = launch_single(dy, weight, q, p.t(), plan.product, scale=scale)
    elif need_x or need_p:
        u = launch_project(dy, q, plan.skinny, scale=scale)
    if need_x and dx is None:
        if plan.algorithm == "fused":
            dx = launch_product(dy, weight, u, p.t(), plan.product, dropout=dropout, seed=seed)
        else:
            dx = add_base_(launch_update(u, p.t(), plan.skinny, like=dy, dropout=dropout, seed=seed), dy, weight)
    if need_p:
        dp = launch_reduce(x, u, plan.skinny, p.dtype, dropout=dropout, seed=seed)
    if need_q:
        dq = launch_reduce(dy, t, plan.skinny, q.dtype)
    return dx, dp, dq
