"""The skinny products for mixed batches, where samples have different updates.

A matrix S [M,C] has n samples of T rows each; sample i belongs to a group g, or to none. F [G,C,r].

Project    U_i = S_i F_g                        t_i = x_i P_g,  u_i = dy_i Q_g
Update     S_i += U_i F_gᵀ                      y_i += t_i Q_gᵀ, dx_i += u_i P_gᵀ
Reduce     D_g = Σ S_iᵀ U_i over the group      dP_g = Σ x_iᵀ u_i, dQ_g = Σ dy_iᵀ t_i

Samples are processed in group order without moving them: a tile is BM rows of one group, found through `order` and
`bounds` of `genft_kernels.rows.RowGroups`. Each program locates its tile from the bounds of all groups; the host does
not know row counts and launches as many programs as there can be tiles, at most M/BM + G. So factors are read once per
tile instead of once per row, even if every sample is one row (decoding), and samples without a group cost nothing. With
few tiles the columns are split too: Project then writes partial sums [splits,M,r], which the launcher adds. Reduce does
not need this: a program handles one group and one block of columns. Everything is deterministic.

Saved: t. Bytes moved: S, and per tile its factor, which stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...plan import SkinnyPlan
from ...rows import RowGroups
from .common import INTERPRETING, dot, precision, rank_block


@triton.jit
def _tile_of(tile, p_order, p_bounds, G, T, BM: tl.constexpr, BG: tl.constexpr):
    """(group, rows [BM], mask [BM]) of a tile; the group is BG if there is no such tile."""
    o_g = tl.arange(0, BG)
    m_g = o_g < G
    first = tl.load(p_bounds + o_g, mask=m_g, other=0)
    rows = (tl.load(p_bounds + o_g + 1, mask=m_g, other=0) - first) * T
    tiles = (rows + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    group = tl.sum((ends <= tile).to(tl.int32), 0)
    here = o_g == group
    within = (tile - tl.sum(tl.where(here, ends - tiles, 0), 0)) * BM + tl.arange(0, BM)
    mask = within < tl.sum(tl.where(here, rows, 0), 0)
    sample = tl.load(p_order + tl.sum(tl.where(here, first, 0), 0) + within // T, mask=mask, other=0)
    return group, sample.to(tl.int64) * T + within % T, mask


@triton.jit
def _grouped_kernel(
    p_s, p_f, p_u, p_order, p_bounds,
    C, R, G, T,
    s_sm, s_sc, s_fg, s_fc, s_fr, s_us, s_um, s_ur,
    columns_per_program,
    PROJECT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    group, o_m, m_m = _tile_of(tl.program_id(0), p_order, p_bounds, G, T, BM, BG)
    if group < G:
        dtype = p_s.dtype.element_ty
        first_column = split * columns_per_program
        last_column = tl.minimum(first_column + columns_per_program, C)
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        p_f += group.to(tl.int64) * s_fg
        p_u_tile = p_u + o_m[:, None] * s_um + o_r[None, :] * s_ur
        m_u = m_m[:, None] & m_r[None, :]
        if PROJECT:
            u = tl.zeros((BM, BR), tl.float32)
            for start in range(first_column, last_column, BC):
                o_c = (start + tl.arange(0, BC)).to(tl.int64)
                m_c = o_c < last_column
                s = tl.load(
                    p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_m[:, None] & m_c[None, :], other=0.0
                )  # [BM, BC]
                f = tl.load(
                    p_f + o_c[:, None] * s_fc + o_r[None, :] * s_fr, mask=m_c[:, None] & m_r[None, :], other=0.0
                )  # [BC, BR]
                u = dot(s, f.to(dtype), u, PRECISION, INTERPRET)
            tl.store(p_u_tile + split.to(tl.int64) * s_us, u.to(p_u.dtype.element_ty), mask=m_u)
        else:
            u = tl.load(p_u_tile, mask=m_u, other=0.0).to(dtype)
            for start in range(first_column, last_column, BC):
                o_c = (start + tl.arange(0, BC)).to(tl.int64)
                m_c = o_c < last_column
                m_tile = m_m[:, None] & m_c[None, :]
                f = tl.load(
                    p_f + o_r[:, None] * s_fr + o_c[None, :] * s_fc, mask=m_r[:, None] & m_c[None, :], other=0.0
                )  # [BR, BC]
                p_s_tile = p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc
                s = tl.load(p_s_tile, mask=m_tile, other=0.0)
                tl.store(p_s_tile, dot(u, f.to(dtype), s.to(tl.float32), PRECISION, INTERPRET).to(dtype), mask=m_tile)


@triton.jit
def _grouped_reduce_kernel(
    p_s, p_u, p_d, p_order, p_bounds,
    C, R, T,
    s_sm, s_sc, s_um, s_ur, s_dg, s_dc, s_dr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    dtype = p_s.dtype.element_ty
    first = tl.load(p_bounds + group)
    rows = (tl.load(p_bounds + group + 1) - first) * T
    o_c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_c = o_c < C
    m_r = o_r < R
    total = tl.zeros((BC, BR), tl.float32)
    for start in range(0, rows, BM):
        within = start + tl.arange(0, BM)
        m_m = within < rows
        sample = tl.load(p_order + first + within // T, mask=m_m, other=0)
        o_m = sample.to(tl.int64) * T + within % T
        s = tl.load(p_s + o_m[None, :] * s_sm + o_c[:, None] * s_sc, mask=m_m[None, :] & m_c[:, None], other=0.0)
        u = tl.load(p_u + o_m[:, None] * s_um + o_r[None, :] * s_ur, mask=m_m[:, None] & m_r[None, :], other=0.0)
        total = dot(s, u.to(dtype), total, PRECISION, INTERPRET)  # [BC, BM] @ [BM, BR]
    p_d_tile = p_d + group.to(tl.int64) * s_dg + o_c[:, None] * s_dc + o_r[None, :] * s_dr
    tl.store(p_d_tile, total.to(p_d.dtype.element_ty), mask=m_c[:, None] & m_r[None, :])


def _tiles(matrix: Tensor, rows: RowGroups, plan: SkinnyPlan) -> int:
    """The maximum number of tiles: full ones, and one partial tile per group."""
    return min(matrix.shape[0], matrix.shape[0] // plan.rows + min(rows.groups, rows.group.shape[0]))


def _columns(columns: int, plan: SkinnyPlan, splits: int) -> int:
    """Columns per program, a multiple of the block size, for at most that many splits."""
    blocks = triton.cdiv(columns, plan.columns)
    return plan.columns * triton.cdiv(blocks, max(1, min(blocks, splits)))


def _launch(s: Tensor, f: Tensor, u: Tensor, rows: RowGroups, plan: SkinnyPlan, columns: int, *, project: bool) -> None:
    """`u` [splits,M,r] is written by a projection and read by an update, which writes into s."""
    if s.shape[0] == 0:
        return
    _grouped_kernel[(_tiles(s, rows, plan), triton.cdiv(s.shape[1], columns))](
        s, f, u, rows.order, rows.bounds,
        s.shape[1], f.shape[2], rows.groups, s.shape[0] // rows.group.shape[0],
        *s.stride(), *f.stride(), *u.stride(),
        columns,
        PROJECT=project,
        BM=plan.rows, BC=plan.columns, BR=rank_block(f.shape[2]), BG=rank_block(rows.groups),
        PRECISION=precision(s.dtype), INTERPRET=INTERPRETING,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def launch_grouped_project(s: Tensor, f: Tensor, rows: RowGroups, plan: SkinnyPlan) -> Tensor:
    """U [M,r] with U_i = s_i f_g, in the dtype of s; 0 for samples without a group. s [M,C], f [G,C,r]."""
    columns = _columns(s.shape[1], plan, plan.groups // max(1, _tiles(s, rows, plan)))
    splits = triton.cdiv(s.shape[1], columns)
    partial = torch.float32 if splits > 1 else s.dtype
    u = torch.zeros((splits, s.shape[0], f.shape[2]), dtype=partial, device=s.device)
    _launch(s, f, u, rows, plan, columns, project=True)
    return u.sum(0).to(s.dtype) if splits > 1 else u[0]


def launch_grouped_update(s: Tensor, u: Tensor, f: Tensor, rows: RowGroups, plan: SkinnyPlan) -> None:
    """s_i += u_i f_gᵀ in place. s [M,C], u [M,r], f [G,C,r]."""
    columns = _columns(s.shape[1], plan, triton.cdiv(4 * plan.groups, max(1, _tiles(s, rows, plan))))
    _launch(s, f, u[None], rows, plan, columns, project=False)


def launch_grouped_reduce(s: Tensor, u: Tensor, rows: RowGroups, plan: SkinnyPlan, dtype: torch.dtype) -> Tensor:
    """D [G,C,r] with D_g = Σ s_iᵀ u_i over the samples of g. s [M,C], u [M,r]."""
    out = torch.empty((rows.groups, s.shape[1], u.shape[1]), dtype=dtype, device=s.device)
    _grouped_reduce_kernel[(rows.groups, triton.cdiv(s.shape[1], plan.columns))](
        s, u, out, rows.order, rows.bounds,
        s.shape[1], u.shape[1], s.shape[0] // max(1, rows.group.shape[0]),
        *s.stride(), *u.stride(), *out.stride(),
        BM=plan.rows, BC=plan.columns, BR=rank_block(u.shape[1]),
        PRECISION=precision(s.dtype), INTERPRET=INTERPRETING,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out
