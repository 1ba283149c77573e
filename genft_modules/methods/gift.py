"""GIFT: ΔW = h(W0 φᵀ) ψᵀ, with one pair (φ, ψ) per layer type (arXiv 2312.00700 v2 to v4, released code)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genft_modules.methods.base import Factors, Generator, GeneratorConfig, beside, module_type, row_blocks, share
from genft_modules.methods.checks import check_flag, check_rank, check_row_blocks
from genft_modules.methods.forms import Form, InputEdit, LowRank
from genft_modules.methods.gift_blocks import Blocks, by_head, check_block, padding_changes, queries_of
from genft_modules.methods.patterns import fits
from genft_modules.methods.weights import weight_features


@dataclass
class GIFTConfig(GeneratorConfig):
    """Configuration of GIFT, which has neither scale nor dropout.

    Args:
        r: rank, the dimension of h.
        block: h: "simple_block" (element-wise, identity by default), "mlp", "mlp_mixer", "transformer" (attention over
            the N rows), "pamcat_attn" or "pamcat_transformer" (attention to 64 clusters of the rows).
        block_kwargs: options of the block, see `genft_modules.methods.gift_blocks`; for "simple_block" act_layer
            "identity", "gelu", "sigmoid" (also called "standard_sigmoid") or "hsigmoid". `num_blocks` is the number of
            blocks in sequence.
        share_projections: share one pair (and h) between all adapted layers, which must have equal K, instead of one
            per layer type.
        enable_gift: for fused weights: layer name or regular expression → one flag per row block.
            {"qkv": [True, False, True]} adapts q and v of a fused qkv weight, each with its own pair.
        in_projection_bias, out_projection_bias: whether to use biases: ΔW = h(W0 φᵀ + 1 bᵢₙᵀ) ψᵀ + 1 bₒᵤₜᵀ.
        tied_experts: for stacked experts, which need the identity block without biases: whether the experts of a layer
            share a pair. False: one pair per expert.

    Source: arXiv 2312.00700 v2 to v4 and its released code; tied_experts is ours.
    """

    method: ClassVar[str] = "gift"
    ranks: ClassVar[Mapping[str, str]] = {"r": ""}

    r: int = 16
    block: str = "simple_block"
    block_kwargs: dict[str, Any] = field(default_factory=dict)
    share_projections: bool = False
    enable_gift: dict[str, list[bool]] = field(default_factory=dict)
    in_projection_bias: bool = False
    out_projection_bias: bool = False
    tied_experts: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        check_block(self.block, self.block_kwargs, self.r)
        check_row_blocks("enable_gift", self.enable_gift)
        for name in ("share_projections", "in_projection_bias", "out_projection_bias", "tied_experts"):
            check_flag(name, getattr(self, name))

    @property
    def edits_input(self) -> bool:
        """Whether ΔW = W0 (φᵀ ψᵀ): h is the identity and there are no biases."""
        identity = self.block == "simple_block" and self.block_kwargs.get("act_layer", "identity") == "identity"
        return identity and not (self.in_projection_bias or self.out_projection_bias)

    def refuses_padding(self) -> str:
        return padding_changes(self.block, self.block_kwargs)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> GIFTGenerator:
        flags = row_blocks("enable_gift", self.enable_gift, name, out_features)
        generator = GIFTGenerator(len(flags))
        sizes = {"in_features": in_features}
        if self.block == "mlp_mixer":
            sizes["tokens"] = out_features // len(flags)
        for index in (index for index, flag in enumerate(flags) if flag):
            key = module_type(name) if len(flags) == 1 else f"{module_type(name)}_{index}"
            generator.add(index, self._factors(name, key, sizes, shared), own=shared is None)
        return generator

    def refuses_experts(self) -> str:
        if not self.edits_input:
            return 'expected block = "simple_block" with act_layer "identity" and no biases, which edits the input'
        return ""

    def build_experts(self, name: str, in_features: int, experts: int, shared: nn.ModuleDict | None) -> GIFTGenerator:
        if any(fits(pattern, name) for pattern in self.enable_gift):
            raise ValueError(f"enable_gift: got flags for {name}, expected none: the rows of experts share an edit")
        generator = GIFTGenerator(1)
        sizes = {"in_features": in_features, **({} if self.tied_experts else {"experts": experts})}
        key = f"{module_type(name)}_experts"  # not the pair of dense layers of that name
        generator.add(0, self._factors(name, key, sizes, shared), own=shared is None)
        return generator

    def _factors(self, name: str, key: str, sizes: dict[str, int], shared: nn.ModuleDict | None) -> GIFTFactors:
        def make() -> GIFTFactors:
            return GIFTFactors(self, **sizes)

        if shared is None:
            return make()
        if self.share_projections:
            return share(shared, "all", name, make, sizes, told_by="share_projections")
        return share(shared, key, name, make, sizes)

    def module_patterns(self) -> dict[str, list[str]]:
        return {"enable_gift": list(self.enable_gift)}


class GIFTFactors(Factors):
    """φ [r, K] initialised like nn.Linear, ψ [K, r] zero, the block, and the optional biases [r] and [K]. For a pair
    per expert φ [experts, r, K] and ψ [experts, K, r]."""

    phi_bias: nn.Parameter | None
    psi_bias: nn.Parameter | None

    def __init__(self, config: GIFTConfig, in_features: int, **more: int) -> None:
        super().__init__(in_features=in_features, **more)  # tokens, experts
        several = (more["experts"],) if "experts" in more else ()
        self.phi = nn.Parameter(torch.empty(*several, config.r, in_features))
        for phi in self.phi.detach().reshape(-1, config.r, in_features):
            nn.init.kaiming_uniform_(phi, a=math.sqrt(5))
        self.register_parameter("phi_bias", None)
        if config.in_projection_bias:
            self.phi_bias = nn.Parameter(torch.empty(config.r))
            nn.init.uniform_(self.phi_bias, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self.psi = nn.Parameter(torch.zeros(*several, in_features, config.r))
        self.register_parameter("psi_bias", None)
        if config.out_projection_bias:
            self.psi_bias = nn.Parameter(torch.zeros(in_features))
        self.block = Blocks(config.block, config.r, more.get("tokens", 0), **config.block_kwargs)
        self.heads = config.block_kwargs.get("num_heads", 1)
        self.is_edit = config.edits_input

    def by_rank(self, name: str, tensor: Tensor) -> Tensor:
        return by_head(name, tensor, self.heads)

    def values_for(self, other: Any, gain: float) -> dict[str, Tensor]:
        values = super().values_for(other, gain)
        if other is not None and (more := self.phi.shape[-2] / other.phi.shape[-2]) != 1:
            for name, value in values.items():
                if (queries := queries_of(name, value)) is not None:
                    queries.mul_(more**0.5)  # attention divides its scores by the root of r/heads
        return values

    def edit(self, weight: Tensor) -> InputEdit:
        phi, psi = beside(weight, self.phi, self.psi)
        return InputEdit(psi.mT, phi)

    def low_rank(self, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """P [K, r'] and Q [N, r'] with ΔW = Q Pᵀ; r' = r, or r + 1 with a bias of the out-projection."""
        biases = () if self.phi_bias is None else (self.phi_bias,)
        features = weight_features(weight, *beside(weight, self.phi, *biases), backend=backend)
        q = self.block(*beside(self.psi, features))
        p: Tensor = self.psi
        if self.psi_bias is not None:
            p = torch.cat([p, self.psi_bias[:, None]], dim=1)
            q = torch.cat([q, q.new_ones(q.shape[0], 1)], dim=1)
        p, q = beside(weight, p, q)
        return p, q


class GIFTGenerator(Generator):
    """An input edit if h is the identity, else low rank. A fused weight gets one low-rank update with a block-diagonal
    Q: [Q_q 0; 0 0; 0 Q_v] and P = [P_q P_v] for q and v of a fused qkv weight.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.adapted: dict[int, str] = {}  # row block → name of its factors

    def add(self, index: int, factors: GIFTFactors, *, own: bool) -> None:
        self.adapted[index] = f"factors_{index}" if self.blocks > 1 else "factors"
        self.refer(self.adapted[index], factors, own=own)

    def _factors(self) -> dict[int, GIFTFactors]:
        return {index: getattr(self, name) for index, name in self.adapted.items()}

    def form(self, weight: Tensor, *, dropout: bool = True) -> Form:
        parts = self._factors()
        if self.blocks == 1:
            factors = parts[0]
            return factors.edit(weight) if factors.is_edit else LowRank(*factors.low_rank(weight, self.backend))
        rows = weight.shape[0] // self.blocks
        ps, qs = [], []
        for index, factors in parts.items():
            p, q = factors.low_rank(weight[index * rows : (index + 1) * rows], self.backend)
            ps.append(p)
            qs.append(F.pad(q, (0, 0, index * rows, (self.blocks - 1 - index) * rows)))
        return LowRank(torch.cat(ps, dim=1), torch.cat(qs, dim=1))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name if self.blocks == 1 else f"{index}.{name}": parameter
            for index, factors in self._factors().items()
            for name, parameter in factors.named_parameters()
        }

    def extra_repr(self) -> str:
        first = next(iter(self._factors().values()))
        adapted = f", row_blocks={sorted(self.adapted)} of {self.blocks}" if self.blocks > 1 else ""
        return f"r={first.phi.shape[-2]}{adapted}, shared={bool(self.shared)}"
