"""Fused weights, such as qkv or gate and up: one generator per adapted row block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genft_modules.methods.base import Generator
from genft_modules.methods.forms import InputEdit, LowRank


class RowBlocks(Generator):
    """One low-rank update for all blocks, with a block-diagonal Q: [Q_q 0; 0 0; 0 Q_v] and P = [P_q P_v] for q and v of
    a fused qkv weight. Input edits, which differ between blocks, become low rank, at the cost of a pass over the
    block's rows.

    Args:
        blocks: number of equal row blocks.
        parts: block → its low-rank generator; all with the same dropout on x.
    """

    def __init__(self, blocks: int, parts: Mapping[int, Generator]) -> None:
        super().__init__()
        self.blocks = blocks
        self.adapted = tuple(parts)
        for index, part in parts.items():
            self.add_module(f"block_{index}", part)
            self.shared = (*self.shared, *part.shared)

    def parts(self) -> dict[int, Generator]:
        return {index: cast(Generator, getattr(self, f"block_{index}")) for index in self.adapted}

    def form(self, weight: Tensor, *, dropout: bool = True) -> LowRank:
        rows = weight.shape[0] // self.blocks
        forms: dict[int, LowRank] = {}
        for index, part in self.parts().items():
            block = weight[index * rows : (index + 1) * rows]
            part.backend = self.backend
            form = part.form(block, dropout=dropout)
            forms[index] = form.low_rank(block, self.backend) if isinstance(form, InputEdit) else cast(LowRank, form)
        q = [
            F.pad(form.q * form.scale, (0, 0, index * rows, (self.blocks - 1 - index) * rows))
            for index, form in forms.items()
        ]
        share = next(iter(forms.values())).dropout
        return LowRank(torch.cat([form.p for form in forms.values()], dim=1), torch.cat(q, dim=1), dropout=share)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{index}.{name}": parameter
            for index, part in self.parts().items()
            for name, parameter in part.adapter_parameters().items()
        }

    def extra_repr(self) -> str:
        return f"row_blocks={list(self.adapted)} of {self.blocks}"
