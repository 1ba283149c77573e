"""The single pass: O = A B + T V + bias in one launch that also computes T = scale · A F.

    y  = x W0ᵀ + t Qᵀ + b          A = x,  B = W0ᵀ, F = P, V = Qᵀ, T = t
    dX = dY W0 + u Pᵀ              A = dY, B = W0,  F = Q, V = Pᵀ, T = u

A [M,C], B [C,N], F [C,r], V [r,N], T [M,r], O [M,N]. T is computed from the tiles of A that the product reads anyway:
no extra pass over A or O, and O is rounded once.

Many rows: persistent programs take tiles in ascending order by a ticket. The program with a row block's first tile also
multiplies its tiles of A with F, stores T and sets the row block's flag; the other programs of the row block wait for
the flag after their main loop, because they need T for one step. The tiles of the first columns come first and their
programs never wait, so there is no deadlock for any number of resident programs. Tickets and flags are zeroed for each
launch (epoch numbers would not work, because a CUDA graph would replay them).

Few rows (one block): every program computes its own T, because the time is bound by reading B. If this gives fewer
programs than the plan has, C is split; each part adds its own T V, and a second launch sums the parts.

Operands are read through tensor descriptors if the plan says so and their rows are 16-byte aligned, else by plain
loads. Saved: T. Bytes moved: those of the product, and r (C + N) per tile from the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import ProductPlan, product_splits
from .common import INTERPRETING, dot, grouped_tile, precision, rank_block, vector
from .skinny import add_up, partial_sums


@triton.jit
def _tile(desc, p, o_row, o_col, rows, columns, s_row, s_col, DESC: tl.constexpr,
          BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """The tile [BR, BC] at (o_row, o_col) of a matrix [rows, columns], zero out of bounds."""
    if DESC:
        tile = desc.load([o_row, o_col])
    else:
        o_r = (o_row + tl.arange(0, BR)).to(tl.int64)
        o_c = (o_col + tl.arange(0, BC)).to(tl.int64)
        mask = (o_r < rows)[:, None] & (o_c < columns)[None, :]
        tile = tl.load(p + o_r[:, None] * s_row + o_c[None, :] * s_col, mask=mask, other=0.0)
    return tile


@triton.jit
def _tile_of(desc, p, o_c, o_n, C, N, s_c, s_n, DESC: tl.constexpr, STORED_T: tl.constexpr,
             BC: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The tile [BC, BN] of a matrix [C, N], which may be stored transposed."""
    if STORED_T:
        tile = tl.trans(_tile(desc, p, o_n, o_c, N, C, s_n, s_c, DESC, BN, BC))
    else:
        tile = _tile(desc, p, o_c, o_n, C, N, s_c, s_n, DESC, BC, BN)
    return tile


@triton.jit
def _accumulate(
    d_a, d_b, d_f, p_a, p_b, p_f, o_m, o_n, first, last,
    M, N, C, R, s_am, s_ac, s_bc, s_bn, s_fc, s_fr,
    SIDE: tl.constexpr, DESC: tl.constexpr, B_T: tl.constexpr, F_T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(A B tile [BM, BN], A F tile [BM, BR] if SIDE) over the columns first to last of A."""
    dtype = p_a.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    side = tl.zeros((BM, BR), tl.float32)
    for o_c in range(first, last, BC):
        a = _tile(d_a, p_a, o_m, o_c, M, last, s_am, s_ac, DESC, BM, BC)
        b = _tile_of(d_b, p_b, o_c, o_n, C, N, s_bc, s_bn, DESC, B_T, BC, BN)
        acc = dot(a, b, acc, PRECISION, INTERPRET)
        if SIDE:
            f = _tile_of(d_f, p_f, o_c, 0, C, R, s_fc, s_fr, DESC, F_T, BC, BR)
            side = dot(a, f.to(dtype), side, PRECISION, INTERPRET)
    return acc, side


@triton.jit
def _finish(acc, t, p_v, p_bias, o_n, N, R, s_vr, s_vn, ADD_BIAS, BIAS: tl.constexpr,
            BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """acc + T V + bias."""
    o_r = tl.arange(0, BR)
    o_cols = (o_n + tl.arange(0, BN)).to(tl.int64)
    m_n = o_cols < N
    v = tl.load(
        p_v + o_r[:, None] * s_vr + o_cols[None, :] * s_vn, mask=(o_r < R)[:, None] & m_n[None, :], other=0.0
    )  # [BR, BN]
    acc = dot(t, v.to(t.dtype), acc, PRECISION, INTERPRET)
    if BIAS:
        bias = tl.load(p_bias + o_cols, mask=m_n, other=0.0).to(tl.float32)
        acc += tl.where(ADD_BIAS, bias, 0.0)[None, :]
    return acc


@triton.jit
def _store(d_o, p_o, acc, o_m, o_n, M, N, s_om, s_on, DESC: tl.constexpr, HALVES: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    dtype = p_o.dtype.element_ty
    if DESC:
        if HALVES:  # half of a wide tile at a time, because of the staging buffer in shared memory
            acc = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1))
            left, right = tl.split(acc)
            d_o.store([o_m, o_n], left.to(dtype))
            d_o.store([o_m, o_n + BN // 2], right.to(dtype))
        else:
            d_o.store([o_m, o_n], acc.to(dtype))
    else:
        o_rows = (o_m + tl.arange(0, BM)).to(tl.int64)
        o_cols = (o_n + tl.arange(0, BN)).to(tl.int64)
        mask = (o_rows < M)[:, None] & (o_cols < N)[None, :]
        tl.store(p_o + o_rows[:, None] * s_om + o_cols[None, :] * s_on, acc.to(dtype), mask=mask)


@triton.jit
def _single_kernel(
    d_a, d_b, d_f, d_o, p_a, p_b, p_f, p_v, p_bias, p_t, p_o, p_flags,
    M, N, C, R,
    s_am, s_ac, s_bc, s_bn, s_fc, s_fr, s_vr, s_vn, s_om, s_on,
    scale,
    BIAS: tl.constexpr, DESC: tl.constexpr, B_T: tl.constexpr, F_T: tl.constexpr, HALVES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype = p_a.dtype.element_ty
    row_blocks = tl.cdiv(M, BM)
    tiles = row_blocks * tl.cdiv(N, BN)
    o_r = tl.arange(0, BR)
    ticket = tl.atomic_add(p_flags + row_blocks, 1, sem="relaxed")
    while ticket < tiles:
        tile_m, tile_n = grouped_tile(ticket, M, N, BM, BN, GROUP)
        o_m = tile_m * BM
        o_n = tile_n * BN
        o_rows = (o_m + tl.arange(0, BM)).to(tl.int64)
        p_t_tile = p_t + o_rows[:, None] * R + o_r[None, :]
        m_t = (o_rows < M)[:, None] & (o_r < R)[None, :]
        if tile_n == 0:
            acc, side = _accumulate(
                d_a, d_b, d_f, p_a, p_b, p_f, o_m, o_n, 0, C,
                M, N, C, R, s_am, s_ac, s_bc, s_bn, s_fc, s_fr,
                True, DESC, B_T, F_T, BM, BN, BC, BR, PRECISION, INTERPRET,
            )  # fmt: skip
            t = (side * scale).to(dtype)
            tl.store(p_t_tile, t, mask=m_t)
            tl.debug_barrier()  # all threads have stored their part
            tl.atomic_xchg(p_flags + tile_m, 1, sem="release")
        else:
            acc, side = _accumulate(
                d_a, d_b, d_f, p_a, p_b, p_f, o_m, o_n, 0, C,
                M, N, C, R, s_am, s_ac, s_bc, s_bn, s_fc, s_fr,
                False, DESC, B_T, F_T, BM, BN, BC, BR, PRECISION, INTERPRET,
            )  # fmt: skip
            while tl.atomic_add(p_flags + tile_m, 0, sem="acquire") == 0:
                pass
            t = tl.load(p_t_tile, mask=m_t, other=0.0, cache_modifier=".cg")
        acc = _finish(acc, t, p_v, p_bias, o_n, N, R, s_vr, s_vn, True, BIAS, BN, BR, PRECISION, INTERPRET)
        _store(d_o, p_o, acc, o_m, o_n, M, N, s_om, s_on, DESC, HALVES, BM, BN)
        ticket = tl.atomic_add(p_flags + row_blocks, 1, sem="relaxed")


@triton.jit
def _single_few_kernel(
    d_a, d_b, d_f, p_a, p_b, p_f, p_v, p_bias, p_t, p_o,
    M, N, C, R,
    s_am, s_ac, s_bc, s_bn, s_fc, s_fr, s_vr, s_vn, s_tp, s_op, s_om, s_on,
    scale, columns_per_part,
    BIAS: tl.constexpr, DESC: tl.constexpr, B_T: tl.constexpr, F_T: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    tile_n = tl.program_id(0)
    part = tl.program_id(1)
    o_n = tile_n * BN
    first = part * columns_per_part
    last = tl.minimum(first + columns_per_part, C)
    acc, side = _accumulate(
        d_a, d_b, d_f, p_a, p_b, p_f, 0, o_n, first, last,
        M, N, C, R, s_am, s_ac, s_bc, s_bn, s_fc, s_fr,
        True, DESC, B_T, F_T, BM, BN, BC, BR, PRECISION, INTERPRET,
    )  # fmt: skip
    side *= scale
    if tile_n == 0:
        o_rows = tl.arange(0, BM)
        o_r = tl.arange(0, BR)
        tl.store(
            p_t + part.to(tl.int64) * s_tp + o_rows[:, None] * R + o_r[None, :],
            side.to(p_t.dtype.element_ty),
            mask=(o_rows < M)[:, None] & (o_r < R)[None, :],
        )
    t = side.to(p_a.dtype.element_ty)
    acc = _finish(acc, t, p_v, p_bias, o_n, N, R, s_vr, s_vn, part == 0, BIAS, BN, BR, PRECISION, INTERPRET)
    _store(p_o, p_o + part.to(tl.int64) * s_op, acc, 0, o_n, M, N, s_om, s_on, False, False, BM, BN)


def describable(matrix: Tensor) -> bool:
    """Whether a matrix can have a tensor descriptor: contiguous, 16-byte aligned rows."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1] >= 1
        and matrix.stride(0) * matrix.itemsize % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _stored(matrix: Tensor) -> tuple[Tensor, bool]:
    """A matrix as stored in memory, and whether that is its transpose."""
    return (matrix.t(), True) if matrix.stride(0) == 1 and matrix.stride(1) != 1 else (matrix, False)


def launch_single(
    a: Tensor, b: Tensor, f: Tensor, v: Tensor, plan: ProductPlan, *, bias: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """a [M,C] b [C,N] + t v [r,N] + bias [N] -> O [M,N], and t = scale · a f [C,r] -> [M,r], both in a's dtype."""
    rows, depth = a.shape
    columns, r = b.shape[1], f.shape[1]
    t = torch.empty((rows, r), dtype=a.dtype, device=a.device)
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    if not rows:
        return out, t
    few = rows <= plan.m
    parts = product_splits(plan, rows, columns, depth, a.itemsize)
    b_in_memory, b_t = _stored(b)
    desc = plan.descriptors and describable(a) and describable(b_in_memory) and (few or describable(out))
    f_in_memory, f_t = _stored(f)
    if desc and not (f.dtype == a.dtype and describable(f_in_memory)):
        f_in_memory, f_t = a.new_empty(r, depth).copy_(f.t()), True
        desc = describable(f_in_memory)
    m, n, k, br = plan.m, plan.n, plan.k, rank_block(r)
    halves = n >= 256
    described: list[Any] = [a, b, f, out]
    if desc:
        described = [
            TensorDescriptor.from_tensor(a, [m, k]),
            TensorDescriptor.from_tensor(b_in_memory, [n, k] if b_t else [k, n]),
            TensorDescriptor.from_tensor(f_in_memory, [br, k] if f_t else [k, br]),
            out if few else TensorDescriptor.from_tensor(out, [m, n // 2 if halves else n]),
        ]
    f = f_in_memory.t() if f_t else f_in_memory
    flags: dict[str, Any] = {
        "BIAS": bias is not None, "DESC": desc, "B_T": b_t, "F_T": f_t, "BM": m, "BN": n, "BC": k, "BR": br,
        "PRECISION": precision(a.dtype), "INTERPRET": INTERPRETING,
        "num_warps": plan.warps, "num_stages": plan.stages,
    }  # fmt: skip
    inner = (*a.stride(), *b.stride(), *f.stride(), *v.stride())
    if not few:
        state = torch.zeros(triton.cdiv(rows, m) + 1, dtype=torch.int32, device=a.device)
        tiles = triton.cdiv(rows, m) * triton.cdiv(columns, n)
        _single_kernel[(min(plan.programs, tiles),)](
            *described, a, b, f, v, vector(bias, a), t, out, state, rows, columns, depth, r, *inner, *out.stride(),
            scale, HALVES=halves, GROUP=plan.group, **flags,
        )  # fmt: skip
        return out, t
    t_parts, out_parts = (t[None], out[None]) if parts == 1 else (partial_sums(t, parts), partial_sums(out, parts))
    per_part = k * triton.cdiv(triton.cdiv(depth, k), parts)
    _single_few_kernel[(triton.cdiv(columns, n), parts)](
        *described[:3], a, b, f, v, vector(bias, a), t_parts, out_parts, rows, columns, depth, r, *inner,
        t_parts.stride(0), *out_parts.stride(), scale, per_part, **flags,
    )  # fmt: skip
    return (out, t) if parts == 1 else (add_up(out_parts, out), add_up(t_parts, t))
