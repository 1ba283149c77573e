"""HiRA: ΔW = W0 ⊙ (B A) (ICLR 2025, openreview TwJrTz9cRS), numerically equivalent to peft's, with ΔW generated tile by
tile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from genft_modules.methods.base import Generator, GeneratorConfig, beside
from genft_modules.methods.checks import check_dropout, check_patterns, check_rank, shown
from genft_modules.methods.forms import Generated
from genft_modules.methods.patterns import pattern_value


@dataclass
class HiRAConfig(GeneratorConfig):
    """Configuration of HiRA. Field names, meanings and defaults are those of `peft.HiraConfig`, without fan_in_fan_out,
    which is detected; load peft's adapters with `load_peft_hira`.

        ΔW = W0 ⊙ (B A), A [r, K], B [N, r]

    The rank of ΔW is up to r times that of W0, so its operation needs as much compute as one with a full-rank ΔW, see
    `GenFTConfig`. hira_dropout > 0 costs another product forward and backward, because x is dropped before ΔW but not
    before W0; neither the mask nor the dropped x is saved.

    Args:
        r: rank of B A.
        hira_dropout: dropout probability of x in the product with ΔW.
        init_weights: True: A Kaiming-uniform(√5), B zero, so that ΔW = 0; "gaussian": A normal with standard deviation
            1/r, B zero; False (or None): both normal with standard deviation 1.
        rank_pattern: layer name or regular expression → r of these layers.

    Source: "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models" (ICLR 2025), as in peft
    0.21.
    """

    method: ClassVar[str] = "hira"
    ranks: ClassVar[Mapping[str, str]] = {"r": "rank_pattern"}
    free: ClassVar[tuple[str, ...]] = ("hira_dropout", "init_weights")

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        check_dropout("hira_dropout", self.hira_dropout)
        if not (self.init_weights is None or isinstance(self.init_weights, bool) or self.init_weights == "gaussian"):
            raise ValueError(f"init_weights: got {shown(self.init_weights)}, expected True, False or 'gaussian'")
        check_patterns("rank_pattern", self.rank_pattern, check_rank)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> HiRAGenerator:
        r = pattern_value(self.rank_pattern, name, self.r)
        generator = HiRAGenerator(in_features, out_features, r, self.hira_dropout)
        generator.reset(self.init_weights)
        return generator


class HiRAGenerator(Generator):
    """A = hira_A [r, K] and B = hira_B [N, r]."""

    def __init__(self, in_features: int, out_features: int, r: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.hira_A = nn.Parameter(torch.empty(r, in_features))
        self.hira_B = nn.Parameter(torch.zeros(out_features, r))

    def reset(self, init: bool | str | None) -> None:
        if not init:
            nn.init.normal_(self.hira_A)
            nn.init.normal_(self.hira_B)
        elif init == "gaussian":
            nn.init.normal_(self.hira_A, std=1 / self.hira_A.shape[0])
        else:
            nn.init.kaiming_uniform_(self.hira_A, a=math.sqrt(5))

    def form(self, weight: Tensor, *, dropout: bool = True) -> Generated:
        a, b = beside(weight, self.hira_A, self.hira_B)
        drop = self.dropout if self.training and dropout else 0.0
        return Generated(b, a.t(), dropout=drop, hadamard=True)

    def extra_repr(self) -> str:
        return f"r={self.hira_A.shape[0]}, dropout={self.dropout:g}"
