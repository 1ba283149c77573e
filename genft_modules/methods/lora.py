"""LoRA: ΔW = s·B A, s = α/r (arXiv 2106.09685), numerically equivalent to peft's, on genft's fused operation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from genft_modules.methods.base import Generator, GeneratorConfig, beside, row_blocks
from genft_modules.methods.checks import (
    check_dropout,
    check_flag,
    check_number,
    check_patterns,
    check_rank,
    check_row_blocks,
    shown,
)
from genft_modules.methods.forms import LowRank
from genft_modules.methods.patterns import pattern_value
from genft_modules.methods.row_blocks import RowBlocks


@dataclass
class LoRAConfig(GeneratorConfig):
    """Configuration of LoRA on genft's operation. Its fields have the names and meanings that `peft.LoraConfig` gives
    them, and for them ΔW is the same; fields that it lacks are refused.

    It is another class than `peft.LoraConfig`, which stays peft's own and makes peft's own layers: this one makes
    `FusedGenLinear`, its adapters are saved as GENFT_LORA and need genft to be loaded, unless `export_lora` writes them
    as peft's. Like all configurations of genft it is spelled as the method's paper spells it.

    Args:
        r: rank.
        lora_alpha: α; the update is scaled by α/r.
        lora_dropout: dropout probability of x in the LoRA branch.
        use_rslora: scale by α/√r instead.
        init_lora_weights: True: A Kaiming-uniform(√5), B zero; "gaussian": A normal with standard deviation 1/r, B
            zero; False: both Kaiming-uniform(√5), so that ΔW is not zero.
        enable_lora: for fused weights: layer name or regular expression → one flag per row block.
            {"qkv": [True, False, True]} adapts q and v of a fused qkv weight, each with its own A and B. Not in peft.
        rank_pattern, alpha_pattern: layer name or regular expression → r or α of these layers.

    Source: arXiv 2106.09685, as in peft.
    """

    method: ClassVar[str] = "lora"
    ranks: ClassVar[Mapping[str, str]] = {"r": "rank_pattern"}
    free: ClassVar[tuple[str, ...]] = (
        "lora_alpha",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
        "init_lora_weights",
    )

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    enable_lora: dict[str, list[bool]] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        check_number("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        check_flag("use_rslora", self.use_rslora)
        check_row_blocks("enable_lora", self.enable_lora)
        check_patterns("rank_pattern", self.rank_pattern, check_rank)
        check_patterns("alpha_pattern", self.alpha_pattern, check_number)
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ValueError(
                f"init_lora_weights: got {shown(self.init_lora_weights)}, expected True, False or 'gaussian'"
            )

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> Generator:
        flags = row_blocks("enable_lora", self.enable_lora, name, out_features)
        if len(flags) == 1:
            return self._generator(name, in_features, out_features)
        rows = out_features // len(flags)
        parts = {i: self._generator(name, in_features, rows) for i, flag in enumerate(flags) if flag}
        return RowBlocks(len(flags), parts)

    def module_patterns(self) -> dict[str, list[str]]:
        return {"enable_lora": list(self.enable_lora)}

    def _generator(self, name: str, in_features: int, out_features: int) -> Generator:
        r = pattern_value(self.rank_pattern, name, self.r)
        alpha = pattern_value(self.alpha_pattern, name, self.lora_alpha)
        scale = alpha / (math.sqrt(r) if self.use_rslora else r)
        generator = LoRAGenerator(in_features, out_features, r, scale, self.lora_dropout)
        generator.reset(self.init_lora_weights)
        return generator


class LoRAGenerator(Generator):
    """A = lora_A [r, K] and B = lora_B [N, r]."""

    linear = ("lora_B",)

    def __init__(self, in_features: int, out_features: int, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))

    def reset(self, init: bool | str) -> None:
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0])
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def form(self, weight: Tensor, *, dropout: bool = True) -> LowRank:
        a, b = beside(weight, self.lora_A, self.lora_B)
        return LowRank(a.t(), b, self.scale, self.dropout if self.training and dropout else 0.0)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
