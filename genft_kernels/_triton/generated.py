"""y = x Wᵀ + b, where W combines W0 and T = drop(σ(H Bᵀ + row + column)), by panels or by tiles; z = Tᵀ Aᵀ + bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import LaunchPlan, stretches
from ..reference.generated import GeneratedMatrix, seeds
from .kernels.generated import launch_contract, launch_fold, launch_generated_product, launch_panel
from .kernels.rescale import launch_rescale


def generated_linear_forward(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    combine: str,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    plan: LaunchPlan,
) -> tuple[Tensor]:
    seed, seed_x = seeds(combine, seed)
    made = GeneratedMatrix(h, b, row, column, activation, dropout, seed)
    if seed_x is not None:
        x = launch_rescale(x, plan.skinny, dropout=dropout, seed=seed_x)
    if plan.algorithm == "fused":
        return (launch_generated_product(x, weight, made, scale, plan.product, combine, bias=bias),)
    y = x.new_empty(x.shape[0], weight.shape[0])
    workspace = None
    for rows in stretches(*weight.shape, plan.contract.panel):
        part = weight[rows]
        workspace = torch.empty(part.shape, dtype=x.dtype, device=x.device) if workspace is None else workspace
        panel = workspace[: part.shape[0]]
        launch_panel(part, made.part(rows=rows), scale, plan.contract, combine, panel, first_n=rows.start)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, panel.t(), out=y[:, rows])
    return (y,)


def generated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    b: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    combine: str,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    seed, seed_x = seeds(combine, seed)
    made = GeneratedMatrix(h, b, row, column, activation, dropout, seed)
    dx = _input_gradient(dy, weight, made, combine, scale, plan) if needs[0] else None
    if dx is not None and seed_x is not None:
        dx = launch_rescale(dx, plan.skinny, dropout=dropout, seed=seed_x)
    factors: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs[1:]):
        if seed_x is not None:
            x = launch_rescale(x, plan.skinny, dropout=dropout, seed=seed_x)
        factors = _factor_gradients(dy, x, None if combine == "add" else weight, made, scale, plan)
    return dx, *(gradient if need else None for gradient, need in zip(factors, needs[1:], strict=True))


def _input_gradient(
    dy: Tensor, weight: Tensor, made: GeneratedMatrix, combine: str, scale: float, plan: LaunchPlan
) -> Tensor:
    """dX = dY W. Panels are along K, so that their results are disjoint."""
    if plan.algorithm == "fused":
        return launch_generated_product(dy, weight, made, scale, plan.product, combine, swapped=True)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    workspace = None
    for columns in stretches(weight.shape[1], weight.shape[0], plan.contract.panel):
        part = weight[:, columns]
        workspace = torch.empty(part.shape, dtype=dy.dtype, device=dy.device) if workspace is None else workspace
        panel = workspace[:, : part.shape[1]]
        launch_panel(part, made.part(columns=columns), scale, plan.contract, combine, panel, first_k=columns.start)
        torch.mm(dy, panel, out=dx[:, columns])
    return dx


def _factor_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, made: GeneratedMatrix, scale: float, plan: LaunchPlan
) -> tuple[Tensor | None, ...]:
    """dH, dB, drow, dcolumn, in the dtype of the factors. `weight`: W0 if it multiplies T."""
    dtype = made.h.dtype
    if plan.algorithm == "fused":
        found = launch_contract(made, plan.contract, left=dy, right=x, weight=weight, scale=scale)
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
            made.part(rows=rows),
            plan.contract,
            given=g,
            weight=None if weight is None else weight[rows],
            scale=scale,
            first_n=rows.start,
            depth=x.shape[0],
        )
        dh[rows] = part_h
        db += part_b
        if drow is not None:
            drow[rows] = part_row
        if dcolumn is not None:
            dcolumn += part_column
    return dh, db.to(dtype), drow, None if dcolumn is None else dcolumn.to(dtype)


def generated_features_forward(
    h: Tensor,
    b: Tensor,
    a: Tensor,
    bias: Tensor | None,
    column: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    plan: LaunchPlan,
) -> tuple[Tensor]:
    made = GeneratedMatrix(h, b, None, column, activation, dropout, seed)
    z = launch_fold(made, a.t(), plan.contract, swapped=True)
    return ((z if bias is None else z + bias).to(h.dtype),)


def generated_features_backward(
    dz: Tensor,
    h: Tensor,
    b: Tensor,
    a: Tensor,
    column: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    made = GeneratedMatrix(h, b, None, column, activation, dropout, seed)
    need_h, need_b, need_a, need_column = needs
    da = launch_fold(made, dz, plan.contract, swapped=False).t() if need_a else None
    dh = db = dcolumn = None
    if need_h or need_b or need_column:
        # dT = Aᵀ dzᵀ is the product of a "batch" of r2 rows.
        dh, db, _, dcolumn = launch_contract(made, plan.contract, left=a, right=dz.t())
    found = zip((dh, db, da, dcolumn), needs, strict=True)
    return tuple(one.to(h.dtype) if need and one is not None else None for one, need in found)
