"""The Triton launchers, one function for each of `genft_kernels.reference`, with the plan as last argument.

Imported when an operation first runs a Triton algorithm, never by `import genft_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan import MAX_TRITON_RANK, LaunchPlan, stretches
from ..reference import Generated, add_base_, edit_by_features, narrow
from ..rows import RowGroups
from .generated import launch_contract, launch_fold, launch_generated_product, launch_panel
from .grouped import launch_grouped_project, launch_grouped_reduce, launch_grouped_update
from .product import launch_product, launch_squares
from .single import launch_single
from .skinny import launch_project, launch_reduce, launch_update

__all__ = [
    "generated_features_backward",
    "generated_features_forward",
    "generated_linear_backward",
    "generated_linear_forward",
    "grouped_lowrank_linear_backward",
    "grouped_lowrank_linear_forward",
    "input_edit_backward",
    "input_edit_forward",
    "input_edit_linear_backward",
    "input_edit_linear_forward",
    "lowrank_linear_backward",
    "lowrank_linear_forward",
    "sliced_linear_backward",
    "sliced_linear_forward",
    "squared_gradient_sums",
    "weight_features_backward",
    "weight_features_forward",
]

Gradients = tuple[Tensor | None, ...]


def _single(a: Tensor, seed: Tensor | None, plan: LaunchPlan) -> bool:
    """Whether a plan's single pass serves this call; else the seeded algorithm does."""
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
    needs: tuple[bool, bool, bool, bool],
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_p, need_q, need_bias = needs
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
    return dx, dp, dq, dy.sum(0) if need_bias else None


def grouped_lowrank_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    rows: RowGroups,
    bias: Tensor | None,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor]:
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
    rows: RowGroups,
    needs: tuple[bool, bool, bool, bool],
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_p, need_q, need_bias = needs
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
    return dx, dp, dq, dy.sum(0) if need_bias else None


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
    needs: tuple[bool, bool, bool],
    plan: LaunchPlan,
    overwrite: bool = False,
) -> Gradients:
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
    q: Tensor | None,
    scale: float,
    needs: tuple[bool, bool, bool, bool],
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_psi, need_phi, need_bias = needs
    dx = dpsi = dphi = None
    db = dy.sum(0) if need_bias else None
    if q is not None:
        low_rank = (need_x, need_psi, need_phi, False)
        dx, dp, dq, _ = lowrank_linear_backward(dy, x, weight, psi.t(), q, t, scale, 0.0, None, low_rank, plan)
        dpsi = None if dp is None else dp.t()
        dphi = None if dq is None else launch_reduce(weight, dq, plan.skinny, phi.dtype, transposed=True)
    elif need_x or need_psi or need_phi:
        edit = (need_x, need_psi, need_phi)
        dx, dpsi, dphi = input_edit_backward(dy @ weight, x, psi, phi, t, scale, edit, plan, overwrite=True)
    return dx, dpsi, dphi, db


def weight_features_forward(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
    plan: LaunchPlan,
) -> Tensor:
    return launch_project(weight, a.t(), plan.skinny, bias=bias, scale=ratio, dropout=dropout, seed=seed, dtype=a.dtype)


def weight_features_backward(
    dz: Tensor, weight: Tensor, ratio: float, dropout: float, seed: Tensor | None, plan: LaunchPlan
) -> Tensor:
    return launch_reduce(weight, dz, plan.skinny, dz.dtype, transposed=True, scale=ratio, dropout=dropout, seed=seed)


def generated_linear_forward(
    x: Tensor, weight: Tensor, made: Generated, bias: Tensor | None, scale: float, plan: LaunchPlan
) -> Tensor:
    if plan.algorithm == "fused":
        return launch_generated_product(x, weight, made, scale, plan.product, bias=bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    workspace = None
    for rows in stretches(*weight.shape, plan.contract.panel):
        part = weight[rows]
        workspace = torch.empty(part.shape, dtype=x.dtype, device=x.device) if workspace is None else workspace
        panel = workspace[: part.shape[0]]
        launch_panel(part, made.part(rows=rows), scale, plan.contract, panel, first_n=rows.start)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, panel.t(), out=y[:, rows])
    return y


def generated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    made: Generated,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_h, need_b, need_bias, need_row, need_column = needs
    dx = None
    if need_x:
        dx = _generated_input_gradient(dy, weight, made, scale, plan)
    found: Gradients = (None,) * 4
    if need_h or need_b or need_row or need_column:
        found = _generated_factor_gradients(dy, x, made, scale, plan)
    dh, db, drow, dcolumn = found
    return (
        dx,
        dh if need_h else None,
        db if need_b else None,
        dy.sum(0) if need_bias else None,
        drow if need_row else None,
        dcolumn if need_column else None,
    )


def _generated_input_gradient(dy: Tensor, weight: Tensor, made: Generated, scale: float, plan: LaunchPlan) -> Tensor:
    """dX = dY (W0 + s T). Panels lie along K, so that their results are disjoint."""
    if plan.algorithm == "fused":
        return launch_generated_product(dy, weight, made, scale, plan.product, swapped=True)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    workspace = None
    for columns in stretches(weight.shape[1], weight.shape[0], plan.contract.panel):
        part = weight[:, columns]
        workspace = torch.empty(part.shape, dtype=dy.dtype, device=dy.device) if workspace is None else workspace
        panel = workspace[:, : part.shape[1]]
        launch_panel(part, made.part(columns=columns), scale, plan.contract, panel, first_k=columns.start)
        torch.mm(dy, panel, out=dx[:, columns])
    return dx


def _generated_factor_gradients(dy: Tensor, x: Tensor, made: Generated, scale: float, plan: LaunchPlan) -> Gradients:
    """dH, dB, drow, dcolumn, in the dtype of the factors."""
    dtype = made.h.dtype
    if plan.algorithm == "fused":
        found = launch_contract(made, plan.contract, left=dy, right=x, scale=scale)
        return tuple(None if g is None else g.to(dtype) for g in found)
    n, k, r = made.h.shape[0], made.b.shape[0], made.h.shape[1]
    dh = made.h.new_empty(n, r)
    drow = None if made.row is None else torch.empty_like(made.row)
    db = torch.zeros(k, r, dtype=torch.float32, device=x.device)
    dcolumn = None if made.column is None else torch.zeros(k, dtype=torch.float32, device=x.device)
    workspace = None
    for rows in stretches(n, k, plan.contract.panel):
        height = rows.stop - rows.start
        workspace = torch.empty(height, k, dtype=x.dtype, device=x.device) if workspace is None else workspace
        g = torch.mm(dy[:, rows].t(), x, out=workspace[:height])
        part_h, part_b, part_row, part_column = launch_contract(
            made.part(rows=rows), plan.contract, given=g, scale=scale, first_n=rows.start, depth=x.shape[0]
        )
        dh[rows] = part_h
        db += part_b
        if drow is not None:
            drow[rows] = part_row
        if dcolumn is not None:
            dcolumn += part_column
    return dh, db.to(dtype), drow, None if dcolumn is None else dcolumn.to(dtype)


def generated_features_forward(made: Generated, a: Tensor, bias: Tensor | None, plan: LaunchPlan) -> Tensor:
    z = launch_fold(made, a.t(), plan.contract, swapped=True)
    return (z if bias is None else z + bias).to(made.h.dtype)


def generated_features_backward(
    dz: Tensor, made: Generated, a: Tensor, needs: tuple[bool, bool, bool, bool], plan: LaunchPlan
) -> Gradients:
    need_h, need_b, need_a, need_column = needs
    dtype = made.h.dtype
    da = launch_fold(made, dz, plan.contract, swapped=False).t().to(dtype) if need_a else None
    dh = db = dcolumn = None
    if need_h or need_b or need_column:
        # dT = Aᵀ dzᵀ is the product of a "batch" of r2 rows.
        dh, db, _, dcolumn = launch_contract(made, plan.contract, left=a, right=dz.t())
    return (
        dh.to(dtype) if need_h else None,
        db.to(dtype) if need_b else None,
        da,
        dcolumn.to(dtype) if need_column and dcolumn is not None else None,
    )


def sliced_linear_forward(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    columns: bool,
    scale: float,
    plan: LaunchPlan,
) -> Tensor:
    if columns:
        u = x.index_select(1, indices) * scale
        if plan.algorithm == "fused":
            return launch_product(x, weight.t(), u, values.t(), plan.product, bias=bias)
        return add_base_(launch_update(u, values.t(), plan.skinny, like=x), x, weight.t(), bias)
    if plan.algorithm == "fused":
        t = launch_project(x, values.t(), plan.skinny, scale=scale)
        return launch_product(x, weight.t(), t, None, plan.product, bias=bias, pick=indices)
    return _add_some(F.linear(x, weight, bias), indices, x, values.t(), weight.t(), bias, scale, plan)


def sliced_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: bool,
    scale: float,
    needs: tuple[bool, bool, bool],
    plan: LaunchPlan,
) -> Gradients:
    need_x, need_values, need_bias = needs
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
    return dx, dv, dy.sum(0) if need_bias else None


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
    bits those columns are made once more: both products ride on one pass over the source, and the sum is rounded once.
    """
    if not narrow(result):
        return result.index_add_(1, indices, launch_project(source, values, plan.skinny, scale=scale))
    chosen = weight.index_select(1, indices)
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


def squared_gradient_sums(dy: Tensor, x: Tensor, plan: LaunchPlan) -> Tensor:
    return launch_squares(dy.t(), x, plan.product)
