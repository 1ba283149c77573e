"""Unbiased (stochastic) rounding to 16 bits: up or down with a probability proportional to the distance.

If a small update is added to a 16-bit tensor, rounding to nearest discards it whenever it is less than half a unit in
the last place: at ‖update‖ / ‖tensor‖ = 10⁻³ half of it is lost, at 10⁻⁴ nearly all. Stochastic rounding preserves its
mean. The noise is a hash of the element (its 16 bits before the update) and its column instead of a random number:
nothing is drawn or stored, forward and backward of all backends round the same way, and a row is rounded the same way
at any position in a batch. Rows with the same element in a column share the noise: errors along a row are practically
independent, sums over many rows with few distinct elements are noisier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dropout import COLUMN, _mix_, _signed

ELEMENT = 0x85EBCA77  # odd, so that the 16 bits of an element spread over all 32


def rounding(dtype: torch.dtype) -> tuple[int, float, float, float]:
    """For a 16-bit dtype: the number of low bits of float32 it lacks, its smallest normal number (0 if it is
    float32's), its largest number, and the threshold at which rounding to nearest gives infinity."""
    if dtype == torch.bfloat16:
        return 16, 0.0, torch.finfo(dtype).max, 2.0**128 - 2.0**119
    return 13, 2.0**-14, torch.finfo(dtype).max, 65520.0


def dithered_sum(source: Tensor, update: Tensor) -> Tensor:
    """source + update [..., C] in the dtype of source, dithered if it has 16 bits. Differentiable in both."""
    if source.dtype not in (torch.bfloat16, torch.float16):
        return source + update.to(source.dtype)
    found: Tensor = _DitheredSum.apply(source, update)
    return found


def dithered_edit(x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """x + edit(x) [..., C], dithered if x has 16 bits: also its gradient, a sum of which one term is as small."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x + edit(x).to(x.dtype)
    kept, edited = _Fork.apply(x)
    return dithered_sum(kept, edit(edited))


class _Fork(torch.autograd.Function):
    """x twice; the gradients are added with dithering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, kept: Tensor, edited: Tensor) -> Tensor:
        return dithered_sum(kept, edited)


class _DitheredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, update: Tensor) -> Tensor:
        ctx.dtype = update.dtype
        columns = source.shape[-1]
        rows = source.reshape(-1, columns)
        return add_dithered(rows, update.reshape(-1, columns), range(columns), torch.empty_like(rows)).view_as(source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.to(ctx.dtype)


def add_dithered(source: Tensor, update: Tensor, columns: range, out: Tensor) -> Tensor:
    """source + update [R, C], rounded with the noise of `source` and `columns` into `out`, which may be `source`.

    source: bfloat16 or float16; update: any floating dtype; columns: column indices of the matrix within the whole. NaN
    and infinities are passed through, and sums that round to nearest as finite stay finite.
    """
    shift, normal, largest, limit = rounding(source.dtype)
    total = source.float() + update
    element = source.contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).mul_(_signed(ELEMENT))
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=source.device) * _signed(COLUMN)
    noise = _mix_(element.bitwise_xor_(column)).bitwise_and_((1 << shift) - 1)
    rounded = total.view(torch.int32).add(noise).bitwise_and_(-(1 << shift)).view(torch.float32)
    if normal:  # subnormal numbers have constant spacing
        places = (total.abs() * 2.0**24 + noise * 2.0**-shift).floor_().mul_(2.0**-24)
        rounded = torch.where(total.abs() < normal, places.copysign_(total), rounded)
    return out.copy_(torch.where(total.abs() < limit, rounded.clamp_(-largest, largest), total))
