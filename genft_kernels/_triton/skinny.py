"""All the skinny work around a product with W0, as one kernel over a tall matrix S [M,C].

Row pass   (needs whole rows):  U = scale · drop(S) A + bias     A [C,r] -> U [M,r]
                                G_s = Lᵀ drop(S)                 L [M,r] -> [r,C]   (reduced over M)
Column pass (tile by tile):     O = S + drop(U B)                B [r,C] -> O [M,C]
                                G_z = Uᵀ drop(Z)                 Z [M,C] -> [r,C]   (reduced over M)

Each part is a compile-time flag. What the operations make of it:

    t = s drop(x) P                                row pass
    t = s x ψᵀ, x' = x + t φ                       row + column pass: x comes from memory once, then from the L2
    u = s g φᵀ, dφ = tᵀ g, dX = g + u ψ, dψ = uᵀ x everything: one pass over g and x
    y += t Qᵀ, t = s drop(x) P                     column pass on a given U
    dX = g + drop(u Pᵀ), dP = drop(x)ᵀ u           column pass on a given U, with G_z
    z = ρ drop(W0) Aᵀ + bias, dA = ρ dZᵀ drop(W0)  row pass over the weight; G_s alone

U and L may be a few columns of a wide matrix, which `pick` [r] names: they are gathered where they are read, and a U
that is made is added to them. That is what slices of a weight need, and nothing of U is stored:

    y[:,I] += s x Vᵀ                               row pass over x
    u = s dY[:,I], dX = g + u V, dV = uᵀ x         column pass on a picked U, with G_z
    y += s x[:,J] Vᵀ                               column pass on a picked U
    dX[:,J] += s dY V, dVᵀ = x[:,J]ᵀ dY            row pass over dY, with G_s

A program owns a stretch of row blocks. A reduction is two-stage and deterministic: each program adds its row blocks, in
order, into its own fp32 slab [r,C] (in the L2 while it is in use), and the launcher sums the slabs. Where no row pass
is asked for, the columns are split over a second grid axis.

Bytes moved beyond the unavoidable reads and writes: groups·r·C·8 for the slabs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold
from ..plan import SkinnyPlan
from .common import INTERPRETING, dot, keep_mask, picked, precision, rank_block, strides, unit, vector


@triton.jit
def _skinny_kernel(
    p_s, p_a, p_bias, p_left, p_u, p_b, p_o, p_z, p_gs, p_gz, p_seed, p_pick,
    M, C, R,
    s_sm, s_sc, s_ac, s_ar, s_lm, s_lr, s_um, s_ur, s_br, s_bc, s_om, s_oc, s_zm, s_zc,
    s_gsg, s_gsr, s_gsc, s_gzg, s_gzr, s_gzc,
    scale, dropout_threshold, dropout_scale, blocks_per_group, columns_per_program,
    PROJECT: tl.constexpr, REDUCE_S: tl.constexpr, UPDATE: tl.constexpr, REDUCE_Z: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, PICK_U: tl.constexpr, PICK_L: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    first_column = tl.program_id(1) * columns_per_program
    last_column = tl.minimum(first_column + columns_per_program, C)
    dtype = p_s.dtype.element_ty
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    o_l = picked(p_pick, o_r, m_r, PICK_L)
    row_blocks = tl.cdiv(M, BM)
    last_block = tl.minimum((group + 1) * blocks_per_group, row_blocks)
    for block in tl.range(group * blocks_per_group, last_block, num_stages=1, disable_licm=True):
        # A slab is written by its first row block and added to by the later ones: no zeroing pass.
        later = block > group * blocks_per_group
        o_m = (block * BM + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < M
        u = tl.zeros((BM, BR), tl.float32)

        if PROJECT or REDUCE_S:
            if REDUCE_S:
                left = tl.load(
                    p_left + o_m[:, None] * s_lm + o_l[None, :] * s_lr, mask=m_m[:, None] & m_r[None, :], other=0.0
                )
                left_t = tl.trans(left.to(dtype))  # [BR, BM]
            for start in range(first_column, last_column, BC):
                o_c = (start + tl.arange(0, BC)).to(tl.int64)
                m_c = o_c < last_column
                s = tl.load(
                    p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_m[:, None] & m_c[None, :], other=0.0
                )  # [BM, BC]
                if DROPOUT:
                    keep = keep_mask(p_seed, dropout_threshold, o_m, o_c)
                    s = tl.where(keep, s.to(tl.float32) * dropout_scale, 0.0).to(dtype)
                if PROJECT:
                    a = tl.load(
                        p_a + o_c[:, None] * s_ac + o_r[None, :] * s_ar, mask=m_c[:, None] & m_r[None, :], other=0.0
                    )  # [BC, BR]
                    u = dot(s, a.to(dtype), u, PRECISION, INTERPRET)
                if REDUCE_S:
                    p_slab = p_gs + group.to(tl.int64) * s_gsg + o_r[:, None] * s_gsr + o_c[None, :] * s_gsc
                    m_slab = m_r[:, None] & m_c[None, :]
                    slab = tl.load(p_slab, mask=m_slab & later, other=0.0)
                    tl.store(p_slab, dot(left_t, s, slab, PRECISION, INTERPRET), mask=m_slab)
            if PROJECT:
                u *= scale
                if BIAS:
                    u += tl.load(p_bias + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
                o_u = picked(p_pick, o_r, m_r, PICK_U)
                p_u_tile = p_u + o_m[:, None] * s_um + o_u[None, :] * s_ur
                if PICK_U:
                    # The padded columns of U read column 0 and are not stored.
                    u += tl.load(p_u_tile, mask=m_m[:, None], other=0.0).to(tl.float32)
                tl.store(p_u_tile, u.to(p_u.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])
        else:
            o_u = picked(p_pick, o_r, m_r, PICK_U)
            p_u_tile = p_u + o_m[:, None] * s_um + o_u[None, :] * s_ur
            u = tl.load(p_u_tile, mask=m_m[:, None] & m_r[None, :], other=0.0).to(tl.float32) * scale

        if UPDATE or REDUCE_Z:
            u_low = u.to(dtype)
            for start in range(first_column, last_column, BC):
                o_c = (start + tl.arange(0, BC)).to(tl.int64)
                m_c = o_c < last_column
                m_tile = m_m[:, None] & m_c[None, :]
                if DROPOUT:
                    keep = keep_mask(p_seed, dropout_threshold, o_m, o_c)
                if UPDATE:
                    b = tl.load(
                        p_b + o_r[:, None] * s_br + o_c[None, :] * s_bc, mask=m_r[:, None] & m_c[None, :], other=0.0
                    )  # [BR, BC]
                    part = dot(u_low, b.to(dtype), tl.zeros((BM, BC), tl.float32), PRECISION, INTERPRET)
                    if DROPOUT:
                        part = tl.where(keep, part * dropout_scale, 0.0)
                    s = tl.load(p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_tile, other=0.0)
                    tl.store(
                        p_o + o_m[:, None] * s_om + o_c[None, :] * s_oc,
                        (s.to(tl.float32) + part).to(p_o.dtype.element_ty),
                        mask=m_tile,
                    )
                if REDUCE_Z:
                    z = tl.load(p_z + o_m[:, None] * s_zm + o_c[None, :] * s_zc, mask=m_tile, other=0.0)
                    if DROPOUT:
                        z = tl.where(keep, z.to(tl.float32) * dropout_scale, 0.0).to(dtype)
                    p_slab = p_gz + group.to(tl.int64) * s_gzg + o_r[:, None] * s_gzr + o_c[None, :] * s_gzc
                    m_slab = m_r[:, None] & m_c[None, :]
                    slab = tl.load(p_slab, mask=m_slab & later, other=0.0)
                    tl.store(p_slab, dot(tl.trans(u_low), z, slab, PRECISION, INTERPRET), mask=m_slab)
        if REDUCE_S or REDUCE_Z:
            # The next row block may read a slab element in another thread than the one that wrote it.
            tl.debug_barrier()


class Skinny(NamedTuple):
    """What a launch returns: U [M,r], O [M,C], leftᵀ drop(S) and Uᵀ drop(Z), both fp32 [r,C]; None where not asked."""

    u: Tensor | None
    out: Tensor | None
    left_s: Tensor | None
    u_z: Tensor | None


def launch_skinny(
    s: Tensor,
    plan: SkinnyPlan,
    r: int,
    *,
    a: Tensor | None = None,
    bias: Tensor | None = None,
    left: Tensor | None = None,
    u: Tensor | None = None,
    u_dtype: torch.dtype | None = None,
    pick: Tensor | None = None,
    b: Tensor | None = None,
    out: Tensor | None = None,
    z: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Skinny:
    """Runs the parts whose operands are given, over s [M,C].

    Args:
        a: [C,r], asks for U = scale·drop(S) A + bias, in `u_dtype` (default: that of s). Without it, U is scale·`u`
            [M,r].
        left: [M,r], asks for G_s = leftᵀ drop(S).
        pick: int64 [r], different columns of `left` and, where it is given, of `u` [M,any]: these are meant then. With
            a, U is added to those of `u`, and there is no b or z.
        b: [r,C], asks for O = S + drop(U B), into `out` (may be s itself; default: a new tensor).
        z: [M,C], asks for G_z = Uᵀ drop(Z).
    """
    rows, columns = s.shape
    project, update = a is not None, b is not None
    pick_u = pick is not None and u is not None
    assert not (project and pick_u and (update or z is not None))  # U is gone: it is in a sum
    if project and not pick_u:
        u = torch.empty((rows, r), dtype=u_dtype or s.dtype, device=s.device)
    if update and out is None:
        out = torch.empty((rows, columns), dtype=s.dtype, device=s.device)
    row_blocks = triton.cdiv(rows, plan.rows)
    blocks_per_group = max(1, triton.cdiv(row_blocks, plan.groups))
    groups = triton.cdiv(row_blocks, blocks_per_group)
    columns_per_program = columns
    if not project:
        # No program needs a whole row: split the columns too, as far as it takes to fill the groups that were planned.
        splits = max(1, min(triton.cdiv(columns, plan.columns), triton.cdiv(4 * plan.groups, max(groups, 1))))
        columns_per_program = plan.columns * triton.cdiv(triton.cdiv(columns, plan.columns), splits)
    slab_s = None if left is None else s.new_empty((groups, r, columns), dtype=torch.float32)
    slab_z = None if z is None else s.new_empty((groups, r, columns), dtype=torch.float32)
    if rows:
        _skinny_kernel[(groups, triton.cdiv(columns, columns_per_program))](
            s, unit(a, s), vector(bias, s), unit(left, s), unit(u, s), unit(b, s), unit(out, s), unit(z, s),
            unit(slab_s, s), unit(slab_z, s), unit(seed, s), vector(pick, s),
            rows, columns, r,
            *strides(s), *strides(a), *strides(left), *strides(u), *strides(b), *strides(out), *strides(z),
            *((0, 0, 0) if slab_s is None else slab_s.stride()), *((0, 0, 0) if slab_z is None else slab_z.stride()),
            scale, threshold(dropout), 1.0 / (1.0 - dropout), blocks_per_group, columns_per_program,
            PROJECT=project, REDUCE_S=left is not None, UPDATE=update, REDUCE_Z=z is not None,
            BIAS=bias is not None, DROPOUT=seed is not None,
            PICK_U=pick_u, PICK_L=pick is not None and left is not None,
            BM=plan.rows, BC=plan.columns, BR=rank_block(r),
            PRECISION=precision(s.dtype), INTERPRET=INTERPRETING,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return Skinny(
        u if project else None,
        out if update else None,
        None if slab_s is None else slab_s.sum(0),
        None if slab_z is None else slab_z.sum(0),
    )
