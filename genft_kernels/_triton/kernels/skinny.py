"""Skinny products: three passes over a tall matrix S [M,C] and a factor with a dimension r.

project    U = scale · drop(S) A + bias   A [C,r] -> U [M,r]         t = s drop(x) P, u = s dY Q, z = ρ drop(W0) Aᵀ + b
reduce     D = scale · drop(S)ᵀ L         L [M,r] -> D [C,r]         dP = drop(x)ᵀ u, dQ = dYᵀ t, dA = ρ drop(W0)ᵀ dZ
update     O = [S +] drop(U B)            U [M,r], B [r,C] -> O      y before its product with W0, x' = x + t φ

Projections and reductions keep their result in registers. If this gives fewer programs than the plan has, the
contraction is split: each part writes a float32 partial sum, and a second launch adds them in a fixed order, so that
results are deterministic. `genft_kernels.plan` computes the number of parts such that the partial sums never move more
bytes than the pass itself.

An update of S in 16 bits is rounded as described in `genft_kernels.dither`.

Saved: nothing. Bytes moved: S once (written by an update, and read if it is added to), the factor, partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import threshold
from ...plan import SkinnyPlan, projection_splits, reduction_splits
from .common import INTERPRETING, dither, dot, keep_mask, precision, rank_block, strides, unit, vector


@triton.jit
def _project_kernel(
    p_s, p_a, p_bias, p_u, p_seed,
    M, C, R,
    s_sm, s_sc, s_ac, s_ar, s_up, s_um, s_ur,
    scale, dropout_threshold, dropout_scale, columns_per_part,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    dtype = p_s.dtype.element_ty
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_m = o_m < M
    m_r = o_r < R
    first = part * columns_per_part
    last = tl.minimum(first + columns_per_part, C)
    u = tl.zeros((BM, BR), tl.float32)
    for start in range(first, last, BC):
        o_c = (start + tl.arange(0, BC)).to(tl.int64)
        m_c = o_c < last
        s = tl.load(
            p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_m[:, None] & m_c[None, :], other=0.0
        )  # [BM, BC]
        if DROPOUT:
            keep = keep_mask(p_seed, dropout_threshold, o_m, o_c)
            s = tl.where(keep, s.to(tl.float32) * dropout_scale, 0.0).to(dtype)
        a = tl.load(
            p_a + o_c[:, None] * s_ac + o_r[None, :] * s_ar, mask=m_c[:, None] & m_r[None, :], other=0.0
        )  # [BC, BR]
        u = dot(s, a.to(dtype), u, PRECISION, INTERPRET)
    u *= scale
    if BIAS:
        u += tl.where(part == 0, tl.load(p_bias + o_r, mask=m_r, other=0.0).to(tl.float32), 0.0)[None, :]
    tl.store(
        p_u + part.to(tl.int64) * s_up + o_m[:, None] * s_um + o_r[None, :] * s_ur,
        u.to(p_u.dtype.element_ty),
        mask=m_m[:, None] & m_r[None, :],
    )


@triton.jit
def _reduce_kernel(
    p_s, p_l, p_d, p_seed,
    M, C, R,
    s_sm, s_sc, s_lm, s_lr, s_dp, s_dc, s_dr,
    scale, dropout_threshold, dropout_scale, rows_per_part,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    dtype = p_s.dtype.element_ty
    o_c = (tl.program_id(0) * BC + tl.arange(0, BC)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_c = o_c < C
    m_r = o_r < R
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    d = tl.zeros((BC, BR), tl.float32)
    for start in range(first, last, BM):
        o_m = (start + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < last
        s = tl.load(
            p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_m[:, None] & m_c[None, :], other=0.0
        )  # [BM, BC]
        if DROPOUT:
            keep = keep_mask(p_seed, dropout_threshold, o_m, o_c)
            s = tl.where(keep, s.to(tl.float32) * dropout_scale, 0.0).to(dtype)
        left = tl.load(
            p_l + o_m[:, None] * s_lm + o_r[None, :] * s_lr, mask=m_m[:, None] & m_r[None, :], other=0.0
        )  # [BM, BR]
        d = dot(tl.trans(s), left.to(dtype), d, PRECISION, INTERPRET)
    tl.store(
        p_d + part * s_dp + o_c[:, None] * s_dc + o_r[None, :] * s_dr,
        (d * scale).to(p_d.dtype.element_ty),
        mask=m_c[:, None] & m_r[None, :],
    )


@triton.jit
def _update_kernel(
    p_s, p_u, p_b, p_o, p_seed,
    M, C, R,
    s_sm, s_sc, s_um, s_ur, s_br, s_bc, s_om, s_oc,
    dropout_threshold, dropout_scale,
    ADD: tl.constexpr, DITHER: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype = p_s.dtype.element_ty
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_m = o_m < M
    m_c = o_c < C
    m_r = o_r < R
    m_tile = m_m[:, None] & m_c[None, :]
    u = tl.load(p_u + o_m[:, None] * s_um + o_r[None, :] * s_ur, mask=m_m[:, None] & m_r[None, :], other=0.0)
    b = tl.load(p_b + o_r[:, None] * s_br + o_c[None, :] * s_bc, mask=m_r[:, None] & m_c[None, :], other=0.0)
    o = dot(u.to(dtype), b.to(dtype), tl.zeros((BM, BC), tl.float32), PRECISION, INTERPRET)
    if DROPOUT:
        o = tl.where(keep_mask(p_seed, dropout_threshold, o_m, o_c), o * dropout_scale, 0.0)
    if ADD:
        s = tl.load(p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_tile, other=0.0)
        o += s.to(tl.float32)
        if DITHER:
            o = dither(o, s, o_c[None, :])
    tl.store(p_o + o_m[:, None] * s_om + o_c[None, :] * s_oc, o.to(p_o.dtype.element_ty), mask=m_tile)


@triton.jit
def _sum_kernel(p_parts, p_o, SIZE, parts, BLOCK: tl.constexpr):
    """O[i] = Σ parts[p, i], in a fixed order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    p_part = p_parts + o
    for _ in range(parts):
        total += tl.load(p_part, mask=m, other=0.0)
        p_part += SIZE
    tl.store(p_o + o, total.to(p_o.dtype.element_ty), mask=m)


def partial_sums(out: Tensor, parts: int) -> Tensor:
    """A buffer for `parts` float32 partial sums of `out`, each in the layout of `out`: contiguous or the transpose of a
    contiguous matrix."""
    memory = torch.empty((parts, out.numel()), dtype=torch.float32, device=out.device)
    return memory.as_strided((parts, *out.shape), (out.numel(), *out.stride()))


def add_up(partials: Tensor, out: Tensor) -> Tensor:
    """The second stage: write Σ partials [parts, ...] into `out`."""
    block = 1024
    if out.numel():
        _sum_kernel[(triton.cdiv(out.numel(), block),)](partials, out, out.numel(), partials.shape[0], BLOCK=block)
    return out


def launch_project(
    s: Tensor,
    a: Tensor,
    plan: SkinnyPlan,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scale · drop(s [M,C]) a [C,r] + bias [r] -> [M,r], in `dtype` (default: that of s)."""
    rows, columns = s.shape
    r = a.shape[1]
    u = torch.empty((rows, r), dtype=dtype or s.dtype, device=s.device)
    parts = projection_splits(plan, rows, columns, r, s.itemsize)
    sums = u[None] if parts == 1 else partial_sums(u, parts)
    if rows:
        _project_kernel[(triton.cdiv(rows, plan.rows), parts)](
            s, a, vector(bias, s), sums, unit(seed, s),
            rows, columns, r,
            *s.stride(), *a.stride(), *sums.stride(),
            scale, threshold(dropout), 1.0 / (1.0 - dropout), per_part(columns, plan.columns, parts),
            BIAS=bias is not None, DROPOUT=seed is not None,
            BM=plan.rows, BC=plan.columns, BR=rank_block(r), PRECISION=precision(s.dtype), INTERPRET=INTERPRETING,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return u if parts == 1 else add_up(sums, u)


def launch_reduce(
    s: Tensor,
    left: Tensor,
    plan: SkinnyPlan,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """scale · drop(s [M,C])ᵀ left [M,r] -> [C,r] in `dtype`; transposed: [r,C]."""
    rows, columns = s.shape
    r = left.shape[1]
    out = torch.empty((r, columns) if transposed else (columns, r), dtype=dtype, device=s.device)
    d = out.t() if transposed else out
    parts = reduction_splits(plan, rows, columns, r, s.itemsize)
    sums = d[None] if parts == 1 else partial_sums(d, parts)
    _reduce_kernel[(triton.cdiv(columns, plan.columns), parts)](
        s, left, sums, unit(seed, s),
        rows, columns, r,
        *s.stride(), *left.stride(), *sums.stride(),
        scale, threshold(dropout), 1.0 / (1.0 - dropout), per_part(rows, plan.rows, parts),
        DROPOUT=seed is not None,
        BM=plan.rows, BC=plan.columns, BR=rank_block(r), PRECISION=precision(s.dtype), INTERPRET=INTERPRETING,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if parts > 1:
        add_up(sums, out)
    return out


def launch_update(
    u: Tensor,
    b: Tensor,
    plan: SkinnyPlan,
    *,
    s: Tensor | None = None,
    like: Tensor | None = None,
    overwrite: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """s [M,C] + drop(u [M,r] b [r,C]), in s itself with `overwrite`; without s, drop(u b) in the dtype of `like`."""
    source = s if s is not None else like
    assert source is not None
    rows, columns = u.shape[0], b.shape[1]
    out = source if overwrite else torch.empty((rows, columns), dtype=source.dtype, device=u.device)
    if rows:
        _update_kernel[(triton.cdiv(rows, plan.rows), triton.cdiv(columns, plan.columns))](
            source, u, b, out, unit(seed, source),
            rows, columns, u.shape[1],
            *strides(s), *u.stride(), *b.stride(), *out.stride(),
            threshold(dropout), 1.0 / (1.0 - dropout),
            ADD=s is not None, DITHER=s is not None and s.itemsize == 2, DROPOUT=seed is not None,
            BM=plan.rows, BC=plan.columns, BR=rank_block(u.shape[1]),
            PRECISION=precision(source.dtype), INTERPRET=INTERPRETING,
            num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
    return out


def per_part(size: int, block: int, parts: int) -> int:
    """The length of a part of a contraction, a multiple of the block size."""
    return block * triton.cdiv(triton.cdiv(size, block), parts)
