"""Element by element, on a matrix S [M,C]; and sums of its columns.

rescale       O = gain ⊙ drop(S) + bias      gain, bias [C] -> O [M,C]     y = c ⊙ z + b, dz = c ⊙ dY, d = drop(x)
column sums   D = Σ_m S ⊙ Z                  Z [M,C] -> D [C]              dc

With a gain, results in 16 bits are rounded as described in `genft_kernels.dither`. Sums are split along M like the
reductions of `skinny`, and added in a fixed order.

Saved: nothing. Bytes moved: S and O, or S and Z, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import threshold
from ...plan import SkinnyPlan, reduction_splits
from .common import dither, keep_mask, unit, vector
from .skinny import add_up, partial_sums, per_part


@triton.jit
def _rescale_kernel(
    p_s, p_gain, p_bias, p_o, p_seed,
    M, C,
    s_sm, s_sc, s_om, s_oc,
    dropout_threshold, dropout_scale,
    GAIN: tl.constexpr, BIAS: tl.constexpr, DITHER: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_c = (tl.program_id(1) * BC + tl.arange(0, BC)).to(tl.int64)
    m_c = o_c < C
    m_tile = (o_m < M)[:, None] & m_c[None, :]
    s = tl.load(p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_tile, other=0.0)  # [BM, BC]
    o = s.to(tl.float32)
    if DROPOUT:
        o = tl.where(keep_mask(p_seed, dropout_threshold, o_m, o_c), o * dropout_scale, 0.0)
    if GAIN:
        o *= tl.load(p_gain + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        o += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if DITHER:
        o = dither(o, s, o_c[None, :])
    tl.store(p_o + o_m[:, None] * s_om + o_c[None, :] * s_oc, o.to(p_o.dtype.element_ty), mask=m_tile)


@triton.jit
def _column_sums_kernel(
    p_s, p_z, p_d,
    M, C,
    s_sm, s_sc, s_zm, s_zc, s_dp, s_dc,
    rows_per_part,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    o_c = (tl.program_id(0) * BC + tl.arange(0, BC)).to(tl.int64)
    m_c = o_c < C
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    d = tl.zeros((BC,), tl.float32)
    for start in range(first, last, BM):
        o_m = (start + tl.arange(0, BM)).to(tl.int64)
        m_tile = (o_m < last)[:, None] & m_c[None, :]
        s = tl.load(p_s + o_m[:, None] * s_sm + o_c[None, :] * s_sc, mask=m_tile, other=0.0)  # [BM, BC]
        z = tl.load(p_z + o_m[:, None] * s_zm + o_c[None, :] * s_zc, mask=m_tile, other=0.0)  # [BM, BC]
        d += tl.sum(s.to(tl.float32) * z.to(tl.float32), axis=0)
    tl.store(p_d + part.to(tl.int64) * s_dp + o_c * s_dc, d.to(p_d.dtype.element_ty), mask=m_c)


def launch_rescale(
    s: Tensor,
    plan: SkinnyPlan,
    *,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """gain [C] ⊙ drop(s [M,C]) + bias [C] -> [M,C] in the dtype of s, in s itself with `overwrite`."""
    rows, columns = s.shape
    out = s if overwrite else torch.empty((rows, columns), dtype=s.dtype, device=s.device)
    if rows:
        _rescale_kernel[(triton.cdiv(rows, plan.rows), triton.cdiv(columns, plan.columns))](
            s, vector(gain, s), vector(bias, s), out, unit(seed, s),
            rows, columns,
            *s.stride(), *out.stride(),
            threshold(dropout), 1.0 / (1.0 - dropout),
            GAIN=gain is not None, BIAS=bias is not None, DITHER=gain is not None and s.itemsize == 2,
            DROPOUT=seed is not None, BM=plan.rows, BC=plan.columns,
            num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
    return out


def launch_column_sums(s: Tensor, z: Tensor, plan: SkinnyPlan, dtype: torch.dtype) -> Tensor:
    """Σ_m s ⊙ z [C] of two matrices [M,C], in `dtype`."""
    rows, columns = s.shape
    out = torch.empty(columns, dtype=dtype, device=s.device)
    parts = reduction_splits(plan, rows, columns, 1, s.itemsize)
    sums = out[None] if parts == 1 else partial_sums(out, parts)
    _column_sums_kernel[(triton.cdiv(columns, plan.columns), parts)](
        s, z, sums,
        rows, columns,
        *s.stride(), *z.stride(), *sums.stride(),
        per_part(rows, plan.rows, parts),
        BM=plan.rows, BC=plan.columns,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out if parts == 1 else add_up(sums, out)
