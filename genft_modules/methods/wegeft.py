"""WeGeFT: ΔW = s·(W0 φᵀ) ψ, s = α/r, with one pair (φ, ψ) per layer type (arXiv 2312.00700 v5, ICML 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from genft_kernels import draw_seed
from genft_modules.methods.base import Factors, Generator, GeneratorConfig, beside, module_type, row_blocks, share
from genft_modules.methods.checks import (
    check_dropout,
    check_flag,
    check_number,
    check_patterns,
    check_rank,
    check_row_blocks,
    shown,
)
from genft_modules.methods.forms import Form, InputEdit, LowRank
from genft_modules.methods.patterns import check_expressions, fits, pattern_value
from genft_modules.methods.row_blocks import RowBlocks
from genft_modules.methods.weights import weight_features

BY_TYPE = "type"


@dataclass
class WeGeFTConfig(GeneratorConfig):
    """Configuration of WeGeFT. Field names are those of the released code. The paper's setting for language models:
    r = 64, wegeft_alpha = 128 on the q, k, v, up and down projections, one pair per type.

    Args:
        r: rank of the pair.
        wegeft_alpha: α; the update is scaled by α/r.
        wegeft_dropout: dropout probability of the elements of W0 before φ. The update is then applied in its low-rank
            form, at the cost of one pass over W0 per call.
        tied_modules: which layers share a pair. "type" (default): all layers with the same last name component, if K
            and r are equal. A list of groups of regular expressions: the layers that match a group share a pair and
            must have equal K and r (the first matching group counts, matched as peft's rank_pattern); all other layers
            have their own. None: each layer has its own.
        enable_wegeft: for fused weights: layer name or regular expression → one flag per row block.
            {"qkv": [True, False, True]} adapts q and v of a fused qkv weight, each with its own pair (shared with the
            same block of other layers in the group). The update is then applied in its low-rank form, at the cost of
            one pass over the adapted rows of W0 per call.
        tied_experts: for stacked experts: whether the experts of a layer share a pair. False: one pair per expert.
        rank_pattern, alpha_pattern: layer name or regular expression → r or α of these layers.

    Source: arXiv 2312.00700 v5 (ICML 2025) and its released code; enable_wegeft and tied_experts are ours.
    """

    method: ClassVar[str] = "wegeft"
    ranks: ClassVar[Mapping[str, str]] = {"r": "rank_pattern"}
    free: ClassVar[tuple[str, ...]] = ("wegeft_alpha", "alpha_pattern", "wegeft_dropout")

    r: int = 8
    wegeft_alpha: float = 8
    wegeft_dropout: float = 0.0
    tied_modules: list[list[str]] | str | None = BY_TYPE
    enable_wegeft: dict[str, list[bool]] = field(default_factory=dict)
    tied_experts: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        check_number("wegeft_alpha", self.wegeft_alpha)
        check_dropout("wegeft_dropout", self.wegeft_dropout)
        check_row_blocks("enable_wegeft", self.enable_wegeft)
        check_flag("tied_experts", self.tied_experts)
        check_patterns("rank_pattern", self.rank_pattern, check_rank)
        check_patterns("alpha_pattern", self.alpha_pattern, check_number)
        check_expressions(self, "tied_modules")
        if self.tied_modules not in (BY_TYPE, None) and not _groups(self.tied_modules):
            raise TypeError(
                f"tied_modules: got {shown(self.tied_modules)}, expected {BY_TYPE!r}, None or a list of groups, each "
                'a list of regular expressions, such as [["q_proj", "k_proj"], ["v_proj"]]'
            )

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> Generator:
        flags = row_blocks("enable_wegeft", self.enable_wegeft, name, out_features)
        if len(flags) == 1:
            return self._generator(name, in_features, shared)
        parts = {i: self._generator(name, in_features, shared, f"_{i}") for i, flag in enumerate(flags) if flag}
        return RowBlocks(len(flags), parts)

    def refuses_experts(self) -> str:
        if self.wegeft_dropout:
            return (
                f"expected wegeft_dropout = 0, got {self.wegeft_dropout:g}: a mask of W0 makes it no edit of the input"
            )
        return ""

    def build_experts(self, name: str, in_features: int, experts: int, shared: nn.ModuleDict | None) -> Generator:
        if any(fits(pattern, name) for pattern in self.enable_wegeft):
            raise ValueError(f"enable_wegeft: got flags for {name}, expected none: the rows of experts share an edit")
        block = "_experts" if self.tied_modules == BY_TYPE else ""  # not the pair of dense layers of that name
        return self._generator(name, in_features, shared, block, {} if self.tied_experts else {"experts": experts})

    def _generator(
        self,
        name: str,
        in_features: int,
        shared: nn.ModuleDict | None,
        block: str = "",
        experts: dict[str, int] | None = None,
    ) -> WeGeFTGenerator:
        r = pattern_value(self.rank_pattern, name, self.r)
        scale = pattern_value(self.alpha_pattern, name, self.wegeft_alpha) / r
        sizes = {"in_features": in_features, "r": r, **(experts or {})}

        def make() -> WeGeFTPair:
            return WeGeFTPair(**sizes)

        group = None if shared is None else self.group(name)
        if shared is None or group is None:
            return WeGeFTGenerator(make(), scale, self.wegeft_dropout, own=True)
        told_by = "" if self.tied_modules == BY_TYPE else "tied_modules"
        pair = share(shared, group + block, name, make, sizes, told_by=told_by)
        return WeGeFTGenerator(pair, scale, self.wegeft_dropout, own=False)

    def group(self, name: str) -> str | None:
        """The group of layer `name`, whose layers share a pair; None if it has its own."""
        if self.tied_modules == BY_TYPE:
            return module_type(name)
        for index, patterns in enumerate(self.tied_modules or ()):
            if any(fits(pattern, name) for pattern in patterns):
                return f"tied_{index}"
        return None

    def module_patterns(self) -> dict[str, list[str]]:
        found = {"enable_wegeft": list(self.enable_wegeft)}
        if self.tied_modules not in (BY_TYPE, None):
            found["tied_modules"] = [pattern for patterns in self.tied_modules or () for pattern in patterns]
        return found


class WeGeFTPair(Factors):
    """φ and ψ [r, K], initialised to zero and Kaiming-uniform(√5), so that ΔW = 0; [experts, r, K] for a pair per
    expert."""

    linear = ("phi",)

    def __init__(self, in_features: int, r: int, experts: int | None = None) -> None:
        super().__init__(in_features=in_features, r=r, **({} if experts is None else {"experts": experts}))
        shape = (r, in_features) if experts is None else (experts, r, in_features)
        self.phi = nn.Parameter(torch.zeros(shape))
        self.psi = nn.Parameter(torch.empty(shape))
        for psi in self.psi.detach().reshape(-1, r, in_features):
            nn.init.kaiming_uniform_(psi, a=math.sqrt(5))


class WeGeFTGenerator(Generator):
    """An input edit; low rank if there is dropout on W0."""

    pair: WeGeFTPair

    def __init__(self, pair: WeGeFTPair, scale: float, dropout: float, *, own: bool) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.refer("pair", pair, own=own)

    def form(self, weight: Tensor, *, dropout: bool = True) -> Form:
        pair = self.pair
        phi, psi = beside(weight, pair.phi, pair.psi)
        if not (self.dropout and self.training and dropout):
            return InputEdit(psi, phi, self.scale)
        seed = draw_seed(weight.device)
        features = weight_features(weight, phi, dropout=self.dropout, seed=seed, backend=self.backend)
        return LowRank(psi.t(), features, self.scale)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.pair.named_parameters())

    def extra_repr(self) -> str:
        return f"r={self.pair.sizes['r']}, scale={self.scale:g}, dropout={self.dropout:g}, shared={bool(self.shared)}"


def _groups(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(group, (list, tuple)) and group and all(isinstance(pattern, str) for pattern in group)
        for group in value
    )
