"""The Triton launchers, one function for each of `genft_kernels.reference`, with the plan as last argument.

Imported when an operation first runs a Triton algorithm, never by `import genft_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan import LaunchPlan
from ..reference import Generated
from ..rows import RowGroups
from .generated import launch_contract, launch_fold, launch_generated_product, launch_panel
from .grouped import launch_grouped_project, launch_grouped_reduce, launch_grouped_update
from .product import launch_product, launch_squares
from .skinny import launch_skinny

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
    u = dq = dx = dp = None
    if need_u or need_q:
        # One pass over dY.
        over_dy = launch_skinny(dy, plan.skinny, r, a=q if need_u else None, left=t if need_q else None, scale=scale)
        u, dq = over_dy.u, over_dy.left_s
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
    y = x.new_zeros(x.shape[0], q.shape[1]) if weight is None else F.linear(x, weight, bias)
    launch_grouped_update(y, t, q, rows, plan.skinny)
    return y, t


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
            dx = torch.zeros_like(x) if weight is None else dy @ weight
            launch_grouped_update(dx, u, p, rows, plan.skinny)
        if need_p:
            dp = launch_grouped_reduce(x, u, rows, plan.skinny, p.dtype)
    if need_q:
        dq = launch_grouped_reduce(dy, t, rows, plan.skinny, q.dtype)
    return dx, dp, dq, dy.sum(0) if need_bias else None


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


def _stretches(length: int, other: int, elements: int) -> Iterator[slice]:
    """Stretches of an index of `length` whose panels, `other` wide, hold about `elements`."""
    size = max(64, elements // other // 64 * 64)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def generated_linear_forward(
    x: Tensor, weight: Tensor, made: Generated, bias: Tensor | None, scale: float, plan: LaunchPlan
) -> Tensor:
    if plan.algorithm == "fused":
        return launch_generated_product(x, weight, made, scale, plan.product, bias=bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    workspace = None
    for rows in _stretches(*weight.shape, plan.contract.panel):
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
    for columns in _stretches(weight.shape[1], weight.shape[0], plan.contract.panel):
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
    for rows in _stretches(n, k, plan.contract.panel):
        height = rows.stop - rows.start
        workspace = torch.empty(height, k, dtype=x.dtype, device=x.device) if workspace is None else workspace
        g = torch.mm(dy[:, rows].t(), x, out=workspace[:height])
        part_h, part_b, part_row, part_column = launch_contract(
            made.part(rows=rows), plan.contract, given=g, scale=scale, first_n=rows.start
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
    r = indices.shape[0]
    if plan.algorithm == "fused":
        u, v = x, values.t()
        if not columns:
            u, v = launch_skinny(x, plan.skinny, r, a=v, scale=scale).u, None
        return launch_product(x, weight.t(), u, v, plan.product, bias=bias, pick=indices, scale=scale)
    y = F.linear(x, weight, bias)
    if columns:
        launch_skinny(y, plan.skinny, r, u=x, pick=indices, b=values.t(), out=y, scale=scale)
    else:
        launch_skinny(x, plan.skinny, r, a=values.t(), u=y, pick=indices, scale=scale)
    return y


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
    db = dy.sum(0) if need_bias else None
    if not (need_x or need_values):
        return None, None, db
    gradients = _column_gradients if columns else _row_gradients
    dx, dv = gradients(dy, x, weight, values, indices, scale, need_x, need_values, plan)
    return dx, None if dv is None else dv.to(values.dtype), db


def _row_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: float,
    need_x: bool,
    need_values: bool,
    plan: LaunchPlan,
) -> tuple[Tensor | None, Tensor | None]:
    """dX = dY W0 + u V and dV = uᵀ x [k,K] in fp32, u = s dY[:,I]."""
    r = indices.shape[0]
    if need_x and plan.algorithm == "thin":
        # One pass over g and x.
        g = dy @ weight
        over_g = launch_skinny(
            g, plan.skinny, r, u=dy, pick=indices, b=values, out=g, z=x if need_values else None, scale=scale
        )
        return over_g.out, over_g.u_z
    dx = dv = None
    if need_x:
        dx = launch_product(dy, weight, dy, values, plan.product, pick=indices, scale=scale)
    if need_values:
        dv = launch_skinny(x, plan.skinny, r, left=dy, pick=indices).left_s * scale
    return dx, dv


def _column_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    scale: float,
    need_x: bool,
    need_values: bool,
    plan: LaunchPlan,
) -> tuple[Tensor | None, Tensor | None]:
    """dX = dY W0, dX[:,J] += s dY V, and dV = s dYᵀ x[:,J] [N,k] in fp32."""
    r = indices.shape[0]
    fused = plan.algorithm == "fused"
    dx = None if fused or not need_x else dy @ weight
    # One pass over dY.
    over_dy = launch_skinny(
        dy,
        plan.skinny,
        r,
        a=values if need_x else None,
        u=dx,
        left=x if need_values else None,
        pick=indices,
        scale=scale,
    )
    if need_x and fused:
        dx = launch_product(dy, weight, over_dy.u, None, plan.product, pick=indices)
    return dx, None if over_dy.left_s is None else over_dy.left_s.t() * scale


def squared_gradient_sums(dy: Tensor, x: Tensor, plan: LaunchPlan) -> Tensor:
    return launch_squares(dy.t(), x, plan.product)
