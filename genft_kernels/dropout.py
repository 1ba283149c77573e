"""Element-wise dropout whose mask is a function of (seed, row, column) and is never stored.

bits(i, j) = mix(rowkey(i) xor j·C); an element is kept if bits >= p·2³². `mix` is a 32-bit finaliser with two
multiplications (constants from C. Wellons' hash prospector, bias 0.17): ten integer instructions per element in a
kernel, against about a hundred for Triton's Philox; a generated tile is computed several times per product. Forward and
backward of all backends get the same mask from the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B
COLUMN = 0x9E3779B1  # odd, to spread columns over all 32 bits
SEED_HIGH = 0x9E3779B9


def _signed(value: int) -> int:
    """The 32-bit `value` reinterpreted as int32."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def _mix_(h: Tensor) -> Tensor:
    """The finaliser, in place on an int32 tensor (masks make the right shifts logical)."""
    scratch = torch.empty_like(h)
    for shift, factor in ((16, MIX_1), (15, MIX_2), (16, None)):
        torch.bitwise_right_shift(h, shift, out=scratch)
        scratch.bitwise_and_((1 << (32 - shift)) - 1)
        h.bitwise_xor_(scratch)
        if factor is not None:
            h.mul_(_signed(factor))
    return h


def draw_seed(device: torch.device | str | None = None) -> Tensor:
    """A seed, int64 [1], from torch's default generator of `device`.

    As a tensor drawn by torch, it is reproduced by gradient checkpointing and torch.compile, and kernels read it
    without synchronisation.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The uint32 threshold below which elements are dropped."""
    return min(round(p * 2**32), 2**32 - 1)


class Mask:
    """The mask for the given rows and columns, made a part of the rows at a time."""

    def __init__(self, seed: Tensor, p: float, rows: Tensor | range, columns: Tensor | range) -> None:
        low = (seed & 0xFFFFFFFF).to(torch.int32)
        high = (seed >> 32).to(torch.int32) ^ _signed(SEED_HIGH)
        self.p = p
        self._keys = _mix_(_mix_(_index(rows, seed) ^ _mix_(low)) ^ _mix_(high))[:, None]
        self._columns = _index(columns, seed) * _signed(COLUMN)

    def kept(self, part: slice = slice(None)) -> Tensor:
        """int32 [R, C] for a part of the rows: 1 means kept, 0 dropped."""
        bits = _mix_(self._keys[part] ^ self._columns)
        # torch has no unsigned comparison of int32: flip the sign bit on both sides.
        return bits.bitwise_xor_(_signed(0x80000000)).ge_(threshold(self.p) - 2**31)

    def drop(self, panel: Tensor, part: slice, kept: Tensor | None = None) -> Tensor:
        """`panel` [R, C], a part of the rows, with dropped elements zero and survivors scaled by 1/(1-p). `kept`: of
        this part, if it is there already.

        Elements are cleared by their bits, which is four times faster on a CPU than `torch.where`.
        """
        whole = _INTEGERS[panel.dtype.itemsize]
        bits = (self.kept(part) if kept is None else kept).to(whole).neg()
        return bits.bitwise_and_(panel.view(whole)).view(panel.dtype).mul_(1.0 / (1.0 - self.p))


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _index(values: Tensor | range, like: Tensor) -> Tensor:
    if isinstance(values, range):
        values = torch.arange(values.start, values.stop, values.step, device=like.device)
    return values.to(torch.int32)


def keep_mask(seed: Tensor, p: float, rows: Tensor | range, columns: Tensor | range) -> Tensor:
    """The mask for the given rows and columns, bool [len(rows), len(columns)]; True means kept."""
    return Mask(seed, p, rows, columns).kept().bool()
