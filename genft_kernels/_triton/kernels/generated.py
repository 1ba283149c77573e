"""Kernels for a generated matrix T = drop(σ(Z)), Z = H Bᵀ + row + column, [N,K], which is computed tile by tile (in the
panel algorithm, in bounded panels of W).

W          W0 + s T, W0 + s W0 ⊙ T or s W0 ⊙ T            COMBINE: "add", "modulate" or "multiply"
product    O = A W   or with both transposed              y = x Wᵀ + b,  dX = dY W
contract   E = s drop(G)·σ'(Z), G = Lᵀ R or given         dH = E B, dB = Eᵀ H, drow = E 1, dcolumn = Eᵀ 1
           (times W0 unless it is added)
fold       O = T V   or   Tᵀ V                            z = Tᵀ Aᵀ,  dA = (T dz)ᵀ
panel      a few rows or columns of W

A tile of Z costs r/BM of the product that uses it and is recomputed for every BM rows of activations: cheaper than
storing N·K elements (see docs/mathematics.md for the counts). The tile is the left operand and the accumulator holds
the transposed output, because wgmma on Hopper can read the left operand from registers.

"out" is the index of the kernel's grid, "loop" the index of its loop. T has the indices (n, k); with SWAPPED, out is k.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import threshold
from ...plan import ContractPlan, ProductPlan, contraction_bytes, contraction_grid
from ...reference.generated import GeneratedMatrix
from .activations import TWINS
from .common import INTERPRETING, dither, dot, grouped_tile, keep_mask, precision, rank_block, strides, unit, vector


@triton.jit
def _pre(f_out, f_loop_t, p_out_add, p_loop_add, o_out, o_loop, m_out, m_loop,
         OUT_ADD: tl.constexpr, LOOP_ADD: tl.constexpr, BO: tl.constexpr, BL: tl.constexpr,
         PRECISION: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """A tile of Z (or Zᵀ) [BO, BL] from f_out [BO, BR] and f_loop_t [BR, BL]."""
    z = dot(f_out, f_loop_t, tl.zeros((BO, BL), tl.float32), PRECISION, INTERPRET)
    if OUT_ADD:
        z += tl.load(p_out_add + o_out, mask=m_out, other=0.0).to(tl.float32)[:, None]
    if LOOP_ADD:
        z += tl.load(p_loop_add + o_loop, mask=m_loop, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _keep(p_seed, dropout_threshold, o_out, o_loop, SWAPPED: tl.constexpr):
    """The mask of T for a possibly transposed tile."""
    if SWAPPED:
        keep = tl.trans(keep_mask(p_seed, dropout_threshold, o_loop, o_out))
    else:
        keep = keep_mask(p_seed, dropout_threshold, o_out, o_loop)
    return keep


@triton.jit
def _combined(w, t, o_out, o_loop, COMBINE: tl.constexpr, DITHER: tl.constexpr, SWAPPED: tl.constexpr):
    """A tile of W from those of W0 and s T. A sum with W0 is dithered in 16 bits by the columns of T, which are along
    loop unless SWAPPED."""
    total = w.to(tl.float32)
    if COMBINE == "add":
        total += t
    elif COMBINE == "modulate":
        total += total * t
    else:
        total *= t
    if DITHER and COMBINE != "multiply":
        if SWAPPED:
            total = dither(total, w, o_out[:, None])
        else:
            total = dither(total, w, o_loop[None, :])
    return total


@triton.jit
def _generated_product_kernel(
    p_a, p_w, p_fo, p_fl, p_out_add, p_loop_add, p_bias, p_o, p_seed,
    M, N, C, R,
    s_am, s_ac, s_wn, s_wc, s_fon, s_for, s_flc, s_flr, s_om, s_on,
    scale, dropout_threshold, dropout_scale,
    SIGMA: tl.constexpr, OUT_ADD: tl.constexpr, LOOP_ADD: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, COMBINE: tl.constexpr, DITHER: tl.constexpr, SWAPPED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BM, BN, GROUP)
    dtype = p_a.dtype.element_ty
    o_m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    o_n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_m = o_m < M
    m_n = o_n < N
    m_r = o_r < R
    f_out = tl.load(p_fo + o_n[:, None] * s_fon + o_r[None, :] * s_for, mask=m_n[:, None] & m_r[None, :], other=0.0)
    f_out = f_out.to(dtype)  # [BN, BR]

    acc = tl.zeros((BN, BM), tl.float32)
    for start in range(0, C, BC):
        o_c = (start + tl.arange(0, BC)).to(tl.int64)
        m_c = o_c < C
        f_loop_t = tl.load(
            p_fl + o_r[:, None] * s_flr + o_c[None, :] * s_flc, mask=m_r[:, None] & m_c[None, :], other=0.0
        )  # [BR, BC]
        z = _pre(
            f_out, f_loop_t.to(dtype), p_out_add, p_loop_add, o_n, o_c, m_n, m_c, OUT_ADD, LOOP_ADD, BN, BC,
            PRECISION, INTERPRET,
        )  # fmt: skip
        t = SIGMA(z) * scale
        if DROPOUT:
            t = tl.where(_keep(p_seed, dropout_threshold, o_n, o_c, SWAPPED), t * dropout_scale, 0.0)
        w = tl.load(
            p_w + o_n[:, None] * s_wn + o_c[None, :] * s_wc, mask=m_n[:, None] & m_c[None, :], other=0.0
        )  # [BN, BC]
        # Past the end of C, σ(0) may be nonzero, but is multiplied by zeros of A.
        a_t = tl.load(
            p_a + o_c[:, None] * s_ac + o_m[None, :] * s_am, mask=m_c[:, None] & m_m[None, :], other=0.0
        )  # [BC, BM]
        w = _combined(w, t, o_n, o_c, COMBINE, DITHER, SWAPPED).to(dtype)
        acc = dot(w, a_t, acc, PRECISION, INTERPRET)
    if BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        p_o + o_n[:, None] * s_on + o_m[None, :] * s_om,
        acc.to(p_o.dtype.element_ty),
        mask=m_n[:, None] & m_m[None, :],
    )


@triton.jit
def _contract_kernel(
    p_l, p_r, p_given, p_w, p_h, p_b, p_row, p_column, p_dh, p_db, p_drow, p_dcolumn, p_seed,
    D, N, K, R, first_n,
    s_ld, s_ln, s_rd, s_rk, s_gn, s_gk, s_wn, s_wk, s_hn, s_hr, s_bk, s_br,
    s_dhg, s_dhn, s_dhr, s_dbg, s_dbk, s_dbr, s_drg, s_dcg,
    scale, dropout_threshold, dropout_scale, tiles_per_n, tiles_per_k,
    SIGMA_GRAD: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, DROPOUT: tl.constexpr, GIVEN: tl.constexpr,
    TIMES_W: tl.constexpr, DROW: tl.constexpr, DCOLUMN: tl.constexpr, ATOMIC: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program (i, j) handles a range of row tiles and a range of column tiles: dH is summed in registers along its
    columns, dB in its slab along its rows, both in a fixed order."""
    group_n = tl.program_id(0)
    group_k = tl.program_id(1)
    dtype = p_r.dtype.element_ty
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    last_n = tl.minimum((group_n + 1) * tiles_per_n, tl.cdiv(N, BN))
    last_k = tl.minimum((group_k + 1) * tiles_per_k, tl.cdiv(K, BK))
    for tile_n in tl.range(group_n * tiles_per_n, last_n, num_stages=1, disable_licm=True):
        later = tile_n > group_n * tiles_per_n
        o_n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        h = tl.load(p_h + o_n[:, None] * s_hn + o_r[None, :] * s_hr, mask=m_n[:, None] & m_r[None, :], other=0.0)
        h = h.to(dtype)  # [BN, BR]
        dh = tl.zeros((BN, BR), tl.float32)
        drow = tl.zeros((BN,), tl.float32)
        for tile_k in tl.range(group_k * tiles_per_k, last_k, num_stages=1, disable_licm=True):
            o_k = (tile_k * BK + tl.arange(0, BK)).to(tl.int64)
            m_k = o_k < K
            m_tile = m_n[:, None] & m_k[None, :]
            if GIVEN:
                g = tl.load(p_given + o_n[:, None] * s_gn + o_k[None, :] * s_gk, mask=m_tile, other=0.0).to(tl.float32)
            else:
                g = tl.zeros((BN, BK), tl.float32)
                for start in range(0, D, BD):
                    o_d = (start + tl.arange(0, BD)).to(tl.int64)
                    m_d = o_d < D
                    left_t = tl.load(
                        p_l + o_n[:, None] * s_ln + o_d[None, :] * s_ld, mask=m_n[:, None] & m_d[None, :], other=0.0
                    )  # [BN, BD]
                    right = tl.load(
                        p_r + o_d[:, None] * s_rd + o_k[None, :] * s_rk, mask=m_d[:, None] & m_k[None, :], other=0.0
                    )  # [BD, BK]
                    g = dot(left_t.to(dtype), right, g, PRECISION, INTERPRET)
            if TIMES_W:  # before Z is there: fewer registers
                g *= tl.load(p_w + o_n[:, None] * s_wn + o_k[None, :] * s_wk, mask=m_tile, other=0.0).to(tl.float32)
            b = tl.load(p_b + o_k[:, None] * s_bk + o_r[None, :] * s_br, mask=m_k[:, None] & m_r[None, :], other=0.0)
            b = b.to(dtype)  # [BK, BR]
            z = _pre(h, tl.trans(b), p_row, p_column, o_n, o_k, m_n, m_k, ROW, COLUMN, BN, BK, PRECISION, INTERPRET)
            e = g * SIGMA_GRAD(z) * scale
            if DROPOUT:
                # first_n: first row of the panel, because the mask is that of the full T.
                keep = keep_mask(p_seed, dropout_threshold, o_n + first_n, o_k)
                e = tl.where(keep, e * dropout_scale, 0.0)
            e = tl.where(m_tile, e, 0.0)
            e_low = e.to(dtype)
            dh = dot(e_low, b, dh, PRECISION, INTERPRET)
            if DROW:
                drow += tl.sum(e, axis=1)

            m_db = m_k[:, None] & m_r[None, :]
            if ATOMIC:
                db = dot(tl.trans(e_low), h, tl.zeros((BK, BR), tl.float32), PRECISION, INTERPRET)
                tl.atomic_add(p_db + o_k[:, None] * s_dbk + o_r[None, :] * s_dbr, db, mask=m_db, sem="relaxed")
                if DCOLUMN:
                    tl.atomic_add(p_dcolumn + o_k, tl.sum(e, axis=0), mask=m_k, sem="relaxed")
            else:
                p_slab = p_db + group_n.to(tl.int64) * s_dbg + o_k[:, None] * s_dbk + o_r[None, :] * s_dbr
                slab = tl.load(p_slab, mask=m_db & later, other=0.0)
                tl.store(p_slab, dot(tl.trans(e_low), h, slab, PRECISION, INTERPRET), mask=m_db)
                if DCOLUMN:
                    p_slab = p_dcolumn + group_n.to(tl.int64) * s_dcg + o_k
                    tl.store(p_slab, tl.load(p_slab, mask=m_k & later, other=0.0) + tl.sum(e, axis=0), mask=m_k)
        m_dh = m_n[:, None] & m_r[None, :]
        if ATOMIC:
            tl.atomic_add(p_dh + o_n[:, None] * s_dhn + o_r[None, :] * s_dhr, dh, mask=m_dh, sem="relaxed")
            if DROW:
                tl.atomic_add(p_drow + o_n, drow, mask=m_n, sem="relaxed")
        else:
            tl.store(p_dh + group_k.to(tl.int64) * s_dhg + o_n[:, None] * s_dhn + o_r[None, :] * s_dhr, dh, mask=m_dh)
            if DROW:
                tl.store(p_drow + group_k.to(tl.int64) * s_drg + o_n, drow, mask=m_n)
            # In the next row tile, another thread may read the slab element.
            tl.debug_barrier()


@triton.jit
def _fold_kernel(
    p_fo, p_fl, p_out_add, p_loop_add, p_v, p_o, p_seed,
    N, C, R, V,
    s_fon, s_for, s_flc, s_flr, s_vc, s_vv, s_og, s_on, s_ov,
    dropout_threshold, dropout_scale, tiles_per_group,
    SIGMA: tl.constexpr, OUT_ADD: tl.constexpr, LOOP_ADD: tl.constexpr, DROPOUT: tl.constexpr, SWAPPED: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0)
    group = tl.program_id(1)
    dtype = p_v.dtype.element_ty
    o_n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_n = o_n < N
    m_r = o_r < R
    m_v = o_v < V
    f_out = tl.load(p_fo + o_n[:, None] * s_fon + o_r[None, :] * s_for, mask=m_n[:, None] & m_r[None, :], other=0.0)
    f_out = f_out.to(dtype)  # [BN, BR]
    acc = tl.zeros((BN, BV), tl.float32)
    last = tl.minimum((group + 1) * tiles_per_group, tl.cdiv(C, BC))
    for tile_c in range(group * tiles_per_group, last):
        o_c = (tile_c * BC + tl.arange(0, BC)).to(tl.int64)
        m_c = o_c < C
        f_loop_t = tl.load(
            p_fl + o_r[:, None] * s_flr + o_c[None, :] * s_flc, mask=m_r[:, None] & m_c[None, :], other=0.0
        )  # [BR, BC]
        t = SIGMA(
            _pre(
                f_out, f_loop_t.to(dtype), p_out_add, p_loop_add, o_n, o_c, m_n, m_c, OUT_ADD, LOOP_ADD, BN, BC,
                PRECISION, INTERPRET,
            )
        )  # fmt: skip
        if DROPOUT:
            t = tl.where(_keep(p_seed, dropout_threshold, o_n, o_c, SWAPPED), t * dropout_scale, 0.0)
        # Past the end of C, σ(0) may be nonzero, but is multiplied by zeros of V.
        v = tl.load(p_v + o_c[:, None] * s_vc + o_v[None, :] * s_vv, mask=m_c[:, None] & m_v[None, :], other=0.0)
        acc = dot(t.to(dtype), v, acc, PRECISION, INTERPRET)
    tl.store(
        p_o + group.to(tl.int64) * s_og + o_n[:, None] * s_on + o_v[None, :] * s_ov,
        acc,
        mask=m_n[:, None] & m_v[None, :],
    )


@triton.jit
def _panel_kernel(
    p_w, p_h, p_b, p_row, p_column, p_o, p_seed,
    N, K, R, first_n, first_k,
    s_wn, s_wk, s_hn, s_hr, s_bk, s_br, s_on, s_ok,
    scale, dropout_threshold, dropout_scale,
    SIGMA: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, DROPOUT: tl.constexpr, COMBINE: tl.constexpr,
    DITHER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype = p_w.dtype.element_ty
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = (tl.program_id(1) * BK + tl.arange(0, BK)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_n = o_n < N
    m_k = o_k < K
    m_r = o_r < R
    m_tile = m_n[:, None] & m_k[None, :]
    h = tl.load(p_h + o_n[:, None] * s_hn + o_r[None, :] * s_hr, mask=m_n[:, None] & m_r[None, :], other=0.0)
    b_t = tl.load(p_b + o_r[:, None] * s_br + o_k[None, :] * s_bk, mask=m_r[:, None] & m_k[None, :], other=0.0)
    z = _pre(h.to(dtype), b_t.to(dtype), p_row, p_column, o_n, o_k, m_n, m_k, ROW, COLUMN, BN, BK, PRECISION, INTERPRET)
    t = SIGMA(z) * scale
    if DROPOUT:
        keep = keep_mask(p_seed, dropout_threshold, o_n + first_n, o_k + first_k)
        t = tl.where(keep, t * dropout_scale, 0.0)
    w = tl.load(p_w + o_n[:, None] * s_wn + o_k[None, :] * s_wk, mask=m_tile, other=0.0)
    total = _combined(w, t, o_n, o_k + first_k, COMBINE, DITHER, False)
    tl.store(p_o + o_n[:, None] * s_on + o_k[None, :] * s_ok, total.to(dtype), mask=m_tile)


def _drop(made: GeneratedMatrix) -> tuple[int, float]:
    return threshold(made.dropout), 1.0 / (1.0 - made.dropout)


def launch_generated_product(
    a: Tensor,
    weight: Tensor,
    made: GeneratedMatrix,
    scale: float,
    plan: ProductPlan,
    combine: str,
    *,
    bias: Tensor | None = None,
    swapped: bool = False,
) -> Tensor:
    """a [M,K] @ Wᵀ + bias -> [M,N]; swapped: a [M,N] @ W -> [M,K]."""
    w, out_side, loop_side = weight, (made.h, made.row), (made.b, made.column)
    if swapped:
        w, out_side, loop_side = weight.t(), loop_side, out_side
    (f_out, out_add), (f_loop, loop_add) = out_side, loop_side
    rows, depth = a.shape
    columns, r = w.shape[0], f_out.shape[1]
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    if rows:
        _generated_product_kernel[(triton.cdiv(rows, plan.m) * triton.cdiv(columns, plan.n),)](
            a, w, f_out, f_loop, vector(out_add, a), vector(loop_add, a), vector(bias, a), out, unit(made.seed, a),
            rows, columns, depth, r,
            *a.stride(), *w.stride(), *f_out.stride(), *f_loop.stride(), *out.stride(),
            scale, *_drop(made),
            SIGMA=TWINS[made.activation][0], OUT_ADD=out_add is not None, LOOP_ADD=loop_add is not None,
            BIAS=bias is not None, DROPOUT=made.seed is not None, COMBINE=combine, DITHER=weight.itemsize == 2,
            SWAPPED=swapped,
            BM=plan.m, BN=plan.n, BC=plan.k, BR=rank_block(r), GROUP=plan.group,
            PRECISION=precision(a.dtype), INTERPRET=INTERPRETING,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return out


def launch_contract(
    made: GeneratedMatrix,
    plan: ContractPlan,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    given: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
    first_n: int = 0,
    depth: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """From G = leftᵀ right ([D,N], [D,K]) or G = given [N,K]: fp32 (dH [N,r], dB [K,r], drow [N], dcolumn [K]), the
    last two if T has these biases. `weight`: W0 [N,K] if it multiplies T; `first_n`: the row of T at row 0 of `made`;
    `depth`: D of a given G."""
    n, r = made.h.shape
    k = made.b.shape[0]
    anchor = given if given is not None else right
    assert anchor is not None
    moved = contraction_bytes(n, k, depth if left is None else left.shape[0], anchor.itemsize)
    tiles_per_n, tiles_per_k = contraction_grid(plan, n, k, r, moved)
    groups_n, groups_k = triton.cdiv(n, plan.n * tiles_per_n), triton.cdiv(k, plan.k * tiles_per_k)
    slabs_h, slabs_b = (1, 1) if plan.atomic else (groups_k, groups_n)

    def slab(*shape: int) -> Tensor:
        make = torch.zeros if plan.atomic else torch.empty
        return make(shape, dtype=torch.float32, device=made.h.device)

    dh, db = slab(slabs_h, n, r), slab(slabs_b, k, r)
    drow = None if made.row is None else slab(slabs_h, n)
    dcolumn = None if made.column is None else slab(slabs_b, k)
    _contract_kernel[(groups_n, groups_k)](
        unit(left, anchor), anchor, unit(given, anchor), unit(weight, anchor), made.h, made.b,
        vector(made.row, anchor), vector(made.column, anchor), dh, db, unit(drow, dh), unit(dcolumn, dh),
        unit(made.seed, anchor),
        0 if left is None else left.shape[0], n, k, r, first_n,
        *strides(left), *strides(right), *strides(given), *strides(weight), *made.h.stride(), *made.b.stride(),
        *dh.stride(), *db.stride(), n, k,
        scale, *_drop(made), tiles_per_n, tiles_per_k,
        SIGMA_GRAD=TWINS[made.activation][1], ROW=made.row is not None, COLUMN=made.column is not None,
        DROPOUT=made.seed is not None, GIVEN=given is not None, TIMES_W=weight is not None, DROW=drow is not None,
        DCOLUMN=dcolumn is not None, ATOMIC=plan.atomic,
        BN=plan.n, BK=plan.k, BD=plan.depth, BR=rank_block(r),
        PRECISION=precision(anchor.dtype), INTERPRET=INTERPRETING,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return dh.sum(0), db.sum(0), None if drow is None else drow.sum(0), None if dcolumn is None else dcolumn.sum(0)


def launch_fold(made: GeneratedMatrix, v: Tensor, plan: ContractPlan, *, swapped: bool) -> Tensor:
    """fp32 T v ([K,c] -> [N,c]); swapped: Tᵀ v ([N,c] -> [K,c])."""
    f_out, out_add, f_loop, loop_add = made.h, made.row, made.b, made.column
    if swapped:
        f_out, out_add, f_loop, loop_add = f_loop, loop_add, f_out, out_add
    rows, r = f_out.shape
    depth = f_loop.shape[0]
    block_n, block_c = (plan.k, plan.n) if swapped else (plan.n, plan.k)
    tiles = triton.cdiv(rows, block_n)
    tiles_c = triton.cdiv(depth, block_c)
    groups = max(1, min(tiles_c, plan.groups // tiles))
    tiles_per_group = triton.cdiv(tiles_c, groups)
    groups = triton.cdiv(tiles_c, tiles_per_group)
    out = torch.empty((groups, rows, v.shape[1]), dtype=torch.float32, device=v.device)
    _fold_kernel[(tiles, groups)](
        f_out, f_loop, vector(out_add, v), vector(loop_add, v), v, out, unit(made.seed, v),
        rows, depth, r, v.shape[1],
        *f_out.stride(), *f_loop.stride(), *v.stride(), *out.stride(),
        *_drop(made), tiles_per_group,
        SIGMA=TWINS[made.activation][0], OUT_ADD=out_add is not None, LOOP_ADD=loop_add is not None,
        DROPOUT=made.seed is not None, SWAPPED=swapped,
        BN=block_n, BC=block_c, BR=rank_block(r), BV=rank_block(v.shape[1]),
        PRECISION=precision(v.dtype), INTERPRET=INTERPRETING,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out.sum(0)


def launch_panel(
    weight: Tensor,
    made: GeneratedMatrix,
    scale: float,
    plan: ContractPlan,
    combine: str,
    out: Tensor,
    first_n: int = 0,
    first_k: int = 0,
) -> Tensor:
    """Write W into `out`, for the part of it in `weight` and `made`, which starts at (first_n, first_k)."""
    n, k = weight.shape
    r = made.h.shape[1]
    arguments: tuple[Any, ...] = (
        weight, made.h, made.b, vector(made.row, weight), vector(made.column, weight), out, unit(made.seed, weight),
        n, k, r, first_n, first_k,
        *weight.stride(), *made.h.stride(), *made.b.stride(), *out.stride(), scale, *_drop(made),
    )  # fmt: skip
    _panel_kernel[(triton.cdiv(n, plan.n), triton.cdiv(k, plan.k))](
        *arguments,
        SIGMA=TWINS[made.activation][0],
        ROW=made.row is not None,
        COLUMN=made.column is not None,
        DROPOUT=made.seed is not None,
        COMBINE=combine,
        DITHER=weight.itemsize == 2,
        BN=plan.n,
        BK=plan.k,
        BR=rank_block(r),
        PRECISION=precision(weight.dtype),
        INTERPRET=INTERPRETING,
        num_warps=plan.warps,
        num_stages=1,
    )
    return out
