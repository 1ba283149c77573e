"""The fused product: O = A B + drop(U V) + bias, the low-rank term being where the accumulator starts.

    y  = x W0ᵀ + t Qᵀ + b          A = x,  B = W0ᵀ, U = t, V = Qᵀ
    dX = dY W0 + drop(u Pᵀ)        A = dY, B = W0,  U = u, V = Pᵀ

A [M,C], B [C,N], U [M,r], V [r,N], O [M,N]; any strides. The term costs r/C of the product and no pass over O.
Saved: nothing. Bytes moved: those of the product, and (M + N) r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold
from ..plan import ProductPlan
from .common import INTERPRETING, dot, grouped_tile, keep_mask, precision, rank_block, unit, vector


@triton.jit
def _product_kernel(
    p_a, p_b, p_u, p_v, p_bias, p_o, p_seed,
    M, N, C, R,
    s_am, s_ac, s_bc, s_bn, s_um, s_ur, s_vr, s_vn, s_om, s_on,
    dropout_threshold, dropout_scale,
    BIAS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_C: tl.constexpr,
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

    u = tl.load(p_u + o_m[:, None] * s_um + o_r[None, :] * s_ur, mask=m_m[:, None] & m_r[None, :], other=0.0)
    v = tl.load(p_v + o_r[:, None] * s_vr + o_n[None, :] * s_vn, mask=m_r[:, None] & m_n[None, :], other=0.0)
    acc = dot(u.to(dtype), v.to(dtype), tl.zeros((BM, BN), tl.float32), PRECISION, INTERPRET)
    if DROPOUT:
        acc = tl.where(keep_mask(p_seed, dropout_threshold, o_m, o_n), acc * dropout_scale, 0.0)
    if BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    # Rows past the end read row 0 and are not stored: no mask in the loop but the one along C.
    o_am = tl.where(m_m, o_m, 0)
    o_bn = tl.where(m_n, o_n, 0)
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

    tl.store(
        p_o + o_m[:, None] * s_om + o_n[None, :] * s_on,
        acc.to(p_o.dtype.element_ty),
        mask=m_m[:, None] & m_n[None, :],
    )


def launch_product(
    a: Tensor,
    b: Tensor,
    u: Tensor,
    v: Tensor,
    plan: ProductPlan,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """a [M,C] @ b [C,N] + drop(u [M,r] @ v [r,N]) + bias [N] -> [M,N] in a's dtype."""
    rows, depth = a.shape
    columns, r = b.shape[1], u.shape[1]
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    if rows:
        _product_kernel[(triton.cdiv(rows, plan.m) * triton.cdiv(columns, plan.n),)](
            a, b, u, v, vector(bias, a), out, unit(seed, a),
            rows, columns, depth, r,
            *a.stride(), *b.stride(), *u.stride(), *v.stride(), *out.stride(),
            threshold(dropout), 1.0 / (1.0 - dropout),
            BIAS=bias is not None, DROPOUT=seed is not None, EVEN_C=depth % plan.k == 0,
            BM=plan.m, BN=plan.n, BC=plan.k, BR=rank_block(r), GROUP=plan.group,
            PRECISION=precision(a.dtype), INTERPRET=INTERPRETING,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return out
