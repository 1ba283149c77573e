"""y = x W0ᵀ + b with an update of a few outputs or inputs; sums of squares of a weight gradient's rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan import MAX_TRITON_RANK, LaunchPlan
from ..reference.common import add_base_, narrow
from ..reference.sliced import columns_of
from .kernels.product import launch_product, launch_squares
from .kernels.skinny import launch_project, launch_reduce, launch_update


def sliced_linear_forward(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    columns: bool,
    scale: float,
    plan: LaunchPlan,
) -> tuple[Tensor]:
    if columns:
        u = x.index_select(1, indices) * scale
        if plan.algorithm == "fused":
            return (launch_product(x, weight.t(), u, values.t(), plan.product, bias=bias),)
        return (add_base_(launch_update(u, values.t(), plan.skinny, like=x), x, weight.t(), bias),)
    if plan.algorithm == "fused":
        t = launch_project(x, values.t(), plan.skinny, scale=scale)
        return (launch_product(x, weight.t(), t, None, plan.product, bias=bias, pick=indices),)
    return (_add_some(F.linear(x, weight, bias), indices, x, values.t(), weight.t(), bias, scale, plan),)


def sliced_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: bool,
    scale: float,
    needs: list[bool],
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    need_x, need_values = needs
    fused = plan.algorithm == "fused"
    dx = dv = None
    if columns:
        if need_x and fused:
            u = launch_project(dy, values, plan.skinny, scale=scale)
            dx = launch_product(dy, weight, u, None, plan.product, pick=indices)
        elif need_x:
            dx = _add_some(dy @ weight, indices, dy, values, weight, None, scale, plan)
        if need_values:
            dv = launch_reduce(dy, x.index_select(1, indices), plan.skinny, values.dtype, scale=scale)
    elif need_x or need_values:
        u = dy.index_select(1, indices) * scale
        if need_x and fused:
            dx = launch_product(dy, weight, u, values, plan.product)
        elif need_x:
            dx = add_base_(launch_update(u, values, plan.skinny, like=dy), dy, weight)
        if need_values:
            dv = launch_reduce(x, u, plan.skinny, values.dtype, transposed=True)
    return dx, dv


def _add_some(
    result: Tensor,
    indices: Tensor,
    source: Tensor,
    values: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    plan: LaunchPlan,
) -> Tensor:
    """`result` [M,N] = source @ weight + bias with scale · source @ values [·,k] added to the columns `indices`. In 16
    bits those columns are recomputed: both products in one pass over the source, and the sum is rounded once.
    """
    if not narrow(result):
        return result.index_add_(1, indices, launch_project(source, values, plan.skinny, scale=scale))
    chosen = columns_of(weight, indices)
    k = indices.shape[0]
    if 2 * k > MAX_TRITON_RANK:
        made = launch_project(source, chosen, plan.skinny, dtype=torch.float32)
        made += launch_project(source, values, plan.skinny, scale=scale, dtype=torch.float32)
    else:
        both = launch_project(source, torch.cat([chosen, values.to(chosen.dtype)], 1), plan.skinny, dtype=torch.float32)
        made = both[:, :k].add_(both[:, k:], alpha=scale)
    if bias is not None:
        made += bias.index_select(0, indices)
    return result.index_copy_(1, indices, made.to(result.dtype))


def squared_gradient_sums_forward(dy: Tensor, x: Tensor, plan: LaunchPlan) -> tuple[Tensor]:
    return (launch_squares(dy.t(), x, plan.product),)
