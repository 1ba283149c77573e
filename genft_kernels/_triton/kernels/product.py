"""The fused product: O = A B + drop(U V) + bias, with the accumulator initialised with the low-rank term.

    y  = x W0ᵀ + t Qᵀ + b          A = x,  B = W0ᵀ, U = t, V = Qᵀ
    dX = dY W0 + drop(u Pᵀ)        A = dY, B = W0,  U = u, V = Pᵀ

A [M,C], B [C,N], U [M,r], V [r,N], O [M,N]; any strides. The term costs r/C of the product and no pass over O.
Saved: nothing. Bytes moved: those of the product, and (M + N) r.

For slices of a weight, V may be unit vectors, generated in registers, that add column j of U to column pick[j] of O:

    y = x W0ᵀ + b, y[:,I] += t     dX = dY W0, dX[:,J] += u

Without U and V, the kernel can compute sums of squares: the squares of each tile of O are summed along its rows and O
is not stored. Bytes moved: those of both operands, and M·⌈N/BN⌉·8 for the partial sums.

    Σ_k G[n,k]², G = dYᵀ x         A = dYᵀ, B = x
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import threshold
from ...plan import ProductPlan
from .common import INTERPRETING, dot, grouped_tile, keep_mask, precision, rank_block, strides, unit, vector


@triton.jit
def _product_kernel(
    p_a, p_b, p_u, p_v, p_bias, p_o, p_seed, p_pick,
    M, N, C, R,
    s_am, s_ac, s_bc, s_bn, s_um, s_ur, s_vr, s_vn, s_om, s_on,
    dropout_threshold, dropout_scale,
    LOW_RANK: tl.constexpr, UNIT_V: tl.constexpr, SQUARES: tl.constexpr,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_C: tl.constexpr,
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

    acc = tl.zeros((BM, BN), tl.float32)
    if LOW_RANK:
        u = tl.load(p_u + o_m[:, None] * s_um + o_r[None, :] * s_ur, mask=m_m[:, None] & m_r[None, :], other=0.0)
        if UNIT_V:
            v = tl.where(tl.load(p_pick + o_r, mask=m_r, other=-1)[:, None] == o_n[None, :], 1.0, 0.0)
        else:
            v = tl.load(p_v + o_r[:, None] * s_vr + o_n[None, :] * s_vn, mask=m_r[:, None] & m_n[None, :], other=0.0)
        acc = dot(u.to(dtype), v.to(dtype), acc, PRECISION, INTERPRET)
    if DROPOUT:
        acc = tl.where(keep_mask(p_seed, dropout_threshold, o_m, o_n), acc * dropout_scale, 0.0)
    if BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    # Rows past the end read row 0 and are not stored, so the loop only needs a mask along C. Without such rows, the
    # offsets stay consecutive, so that loads of operands contiguous along them are vectorised.
    o_am = o_m if EVEN_M else tl.where(m_m, o_m, 0)
    o_bn = o_n if EVEN_N else tl.where(m_n, o_n, 0)
    for start in range(0, C, BC):
        o_c = (start + tl.arange(0, BC)).to(tl.int64)
        p_a_tile = p_a + o_am[:, None] * s_am + o_c[None, :] * s_ac
        p_b_tile = p_b + o_c[:, None] * s_bc + o_bn[None, :] * s_bn
        if EVEN_C:
            a = tl.load(p_a_tile)
            b = tl.load(p_b_tile)
        else:
            m_c = o_c < C
            a = tl.load(p_a_tile, mask=m_c[None, :], other=0.0)
            b = tl.load(p_b_tile, mask=m_c[:, None], other=0.0)
        acc = dot(a, b, acc, PRECISION, INTERPRET)

    if SQUARES:
        acc = tl.where(m_n[None, :], acc, 0.0)
        tl.store(p_o + o_m * s_om + tile_n * s_on, tl.sum(acc * acc, axis=1), mask=m_m)
    else:
        tl.store(
            p_o + o_m[:, None] * s_om + o_n[None, :] * s_on,
            acc.to(p_o.dtype.element_ty),
            mask=m_m[:, None] & m_n[None, :],
        )


def launch_product(
    a: Tensor,
    b: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    plan: ProductPlan,
    *,
    bias: Tensor | None = None,
    pick: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """a [M,C] @ b [C,N] + drop(u [M,r] @ v [r,N]) + bias [N] -> [M,N] in a's dtype. Without v, `u` is added to the
    columns `pick`, int64 [r], of the result."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    return _launch(a, b, u, v, plan, out, bias=bias, pick=pick, dropout=dropout, seed=seed)


def launch_squares(a: Tensor, b: Tensor, plan: ProductPlan) -> Tensor:
    """Σ_n O[m,n]² of O = a [M,C] @ b [C,N], which is not stored -> fp32 [M]."""
    tiles = triton.cdiv(b.shape[1], plan.n)
    sums = torch.empty((tiles, a.shape[0]), dtype=torch.float32, device=a.device)
    return _launch(a, b, None, None, plan, sums.t(), squares=True).sum(1)


def _launch(
    a: Tensor,
    b: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    plan: ProductPlan,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    pick: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    squares: bool = False,
) -> Tensor:
    rows, depth = a.shape
    columns = b.shape[1]
    r = 1 if u is None else u.shape[1]
    if rows:
        _product_kernel[(triton.cdiv(rows, plan.m) * triton.cdiv(columns, plan.n),)](
            a, b, unit(u, a), unit(v, a), vector(bias, a), out, unit(seed, a), vector(pick, a),
            rows, columns, depth, r,
            *a.stride(), *b.stride(), *strides(u), *strides(v), *out.stride(),
            threshold(dropout), 1.0 / (1.0 - dropout),
            LOW_RANK=u is not None, UNIT_V=pick is not None,
            SQUARES=squares, BIAS=bias is not None, DROPOUT=seed is not None,
            EVEN_M=rows % plan.m == 0, EVEN_N=columns % plan.n == 0, EVEN_C=depth % plan.k == 0,
            BM=plan.m, BN=plan.n, BC=plan.k, BR=rank_block(r), GROUP=plan.group,
            PRECISION=precision(a.dtype), INTERPRET=INTERPRETING,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return out
