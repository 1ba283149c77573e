"""Kernel helpers: a dot product that is correct in the interpreter too, dropout masks, launch helpers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dither import ELEMENT
from ...dropout import COLUMN, MIX_1, MIX_2, SEED_HIGH
from ...plan import triton_can_run

INTERPRETING = triton_can_run(torch.device("cpu"))

_MIX_1 = tl.constexpr(MIX_1)
_MIX_2 = tl.constexpr(MIX_2)
_COLUMN = tl.constexpr(COLUMN)
_SEED_HIGH = tl.constexpr(SEED_HIGH)
_ELEMENT = tl.constexpr(ELEMENT)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b, fp32 accumulator. Triton's interpreter multiplies bf16 operands as integers, hence the cast."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= _MIX_1
    h ^= h >> 15
    h *= _MIX_2
    h ^= h >> 16
    return h


@triton.jit
def keep_mask(p_seed, threshold, o_row, o_col):
    """The mask of `genft_kernels.dropout.keep_mask` for a tile: True is kept. o_row [R], o_col [C] -> [R, C]."""
    seed = tl.load(p_seed)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32) ^ _SEED_HIGH
    key = _mix(_mix(o_row.to(tl.uint32) ^ _mix(low)) ^ _mix(high))
    column = o_col.to(tl.uint32) * _COLUMN
    return _mix(key[:, None] ^ column[None, :]) >= tl.cast(threshold, tl.uint32)


@triton.jit
def dither(total, source, o_col):
    """`genft_kernels.dither.add_dithered` for a tile: float32 total, its 16-bit source, and its columns as [1, C] (or
    [C, 1] for a transposed tile). The result is float32, exactly representable in the source's dtype."""
    HALF: tl.constexpr = source.dtype == tl.float16
    LOW: tl.constexpr = 0x1FFF if HALF else 0xFFFF
    LARGEST: tl.constexpr = 65504.0 if HALF else 3.3895313892515355e38
    LIMIT: tl.constexpr = 65520.0 if HALF else 3.3961775292304957e38
    element = source.to(tl.uint16, bitcast=True).to(tl.uint32) * _ELEMENT
    noise = _mix(element ^ (o_col.to(tl.uint32) * _COLUMN)) & LOW
    bits = (total.to(tl.uint32, bitcast=True) + noise) & (0xFFFFFFFF ^ LOW)
    rounded = bits.to(tl.float32, bitcast=True)
    size = tl.abs(total)
    if HALF:  # subnormal numbers have constant spacing
        places = tl.floor(size * 16777216.0 + noise.to(tl.float32) * 0.0001220703125) * 5.960464477539063e-08
        rounded = tl.where(size < 6.103515625e-05, tl.where(total < 0.0, -places, places), rounded)
    rounded = tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)
    return tl.where(size < LIMIT, rounded, total)


@triton.jit
def grouped_tile(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of the tile of program `pid` in a product: concurrent programs share columns of the right operand
    and rows of the left one in the L2 cache."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    band = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    return band * GROUP + within % height, within // height


def precision(dtype: torch.dtype) -> str:
    """The precision of fp32 products, according to torch's setting."""
    # `allow_tf32` raises if the setting was made through `fp32_precision`; this one works with both.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def rank_block(r: int) -> int:
    """The padded rank: a power of two supported by tl.dot."""
    return max(16, triton.next_power_of_2(r))


def unit(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or a valid pointer for an argument that the kernel does not read."""
    return like if tensor is None else tensor


def vector(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The same for a vector, which must have stride one."""
    return like if tensor is None else tensor.contiguous()


def strides(tensor: Tensor | None) -> tuple[Any, Any]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))
