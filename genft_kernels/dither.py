"""Rounding to 16 bits that loses nothing on average: up or down with the odds of the distance.

Where a small update is added to a 16-bit tensor, rounding to the nearest takes it back whenever it is less than half of
the last place: at ‖update‖ / ‖tensor‖ = 10⁻³ half of it is gone, at 10⁻⁴ nearly all. Rounding up with a probability of
what would be cut off keeps its mean. The noise is a hash of the element itself (its 16 bits before the update) and of
its column, not a random number: nothing is drawn or stored, forward and backward of every backend round alike, and a
row is rounded the same way wherever it stands in a batch. Rows that have the same element in a column share its noise:
sums along a row are as good as independent, sums over many rows of few different elements are noisier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import COLUMN, _mix_, _signed

ELEMENT = 0x85EBCA77  # odd, so that the 16 bits of an element spread over all 32


def rounding(dtype: torch.dtype) -> tuple[int, float, float, float]:
    """Of a 16-bit dtype: how many of float32's low bits it has no room for, its smallest normal number (0 where that is
    float32's own), its largest number, and where rounding to the nearest becomes infinity."""
    if dtype == torch.bfloat16:
        return 16, 0.0, torch.finfo(dtype).max, 2.0**128 - 2.0**119
    return 13, 2.0**-14, torch.finfo(dtype).max, 65520.0


def add_dithered(source: Tensor, update: Tensor, columns: range, out: Tensor) -> Tensor:
    """source + update [R, C], rounded by the noise of `source` and `columns` into `out`, which may be `source`.

    source: bfloat16 or float16; update: any floating dtype; columns: where the matrix lies in the one that it is part
    of. NaN and infinities pass as they are, and a sum that has a nearest number stays finite.
    """
    shift, normal, largest, limit = rounding(source.dtype)
    total = source.float() + update
    element = source.contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).mul_(_signed(ELEMENT))
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=source.device) * _signed(COLUMN)
    noise = _mix_(element.bitwise_xor_(column)).bitwise_and_((1 << shift) - 1)
    rounded = total.view(torch.int32).add(noise).bitwise_and_(-(1 << shift)).view(torch.float32)
    if normal:  # below it, places have one size
        places = (total.abs() * 2.0**24 + noise * 2.0**-shift).floor_().mul_(2.0**-24)
        rounded = torch.where(total.abs() < normal, places.copysign_(total), rounded)
    return out.copy_(torch.where(total.abs() < limit, rounded.clamp_(-largest, largest), total))
