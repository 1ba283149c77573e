"""Rounding to 16 bits that loses nothing on average: up or down with the odds of the distance.

Where a small update is added to a 16-bit tensor, rounding to the nearest takes it back whenever it is less than half of
the last place: at ‖update‖ / ‖tensor‖ = 10⁻³ half of it is gone, at 10⁻⁴ nearly all. Rounding up with a probability of
what would be cut off keeps its mean. The noise is a hash of the element itself (its 16 bits before the update) and of
its column, not a random number: nothing is drawn or stored, forward and backward of every backend round alike, and a
row is rounded the same way wherever it stands in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import COLUMN, _mix_, _signed

ELEMENT = 0x85EBCA77  # odd, so that the 16 bits of an element spread over all 32


def mantissa_shift(dtype: torch.dtype) -> int:
    """How many of float32's low bits `dtype` has no room for."""
    return 16 if dtype == torch.bfloat16 else 13


def add_dithered(source: Tensor, update: Tensor, columns: range, out: Tensor) -> Tensor:
    """source + update [R, C], rounded by the noise of `source` and `columns` into `out`, which may be `source`.

    source: bfloat16 or float16; update: any floating dtype; columns: where the matrix lies in the one that it is part
    of. NaN and infinities pass as they are.
    """
    total = source.float() + update
    shift = mantissa_shift(source.dtype)
    element = source.contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).mul_(_signed(ELEMENT))
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=source.device) * _signed(COLUMN)
    noise = _mix_(element.bitwise_xor_(column)).bitwise_and_((1 << shift) - 1)
    rounded = total.view(torch.int32).add(noise).bitwise_and_(-(1 << shift)).view(torch.float32)
    return out.copy_(torch.where(total.isfinite(), rounded, total))
