"""GenFT: ΔW generated from W0 by a column and a row transformation, each with an inner and an outer activation
(arXiv 2506.11042 and its released code)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genft_kernels import draw_seed, generated_features
from genft_kernels.activations import activation as activation_named
from genft_modules.methods.base import Factors, Generator, GeneratorConfig, beside, row_blocks, share, without_autocast
from genft_modules.methods.checks import (
    check_choice,
    check_dropout,
    check_flag,
    check_number,
    check_patterns,
    check_rank,
    check_row_blocks,
)
from genft_modules.methods.forms import Form, Generated
from genft_modules.methods.patterns import pattern_value
from genft_modules.methods.weights import weight_features

ACTIVATIONS = ("none", "relu", "leakyrelu", "gelu", "tanh")  # all have σ(0) = 0: zero rows of H give zero rows of ΔW
STAGES = {"column": (1,), "row": (2,), "column_row": (1, 2)}
ZERO_UPDATE = "zero_update"
INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": nn.init.zeros_,
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "xavier_uniform": nn.init.xavier_uniform_,
    "normal": partial(nn.init.normal_, std=0.01),
}


@dataclass
class GenFTConfig(GeneratorConfig):
    """Configuration of GenFT. Field names and defaults are those of the released code, except for the initialisation:
    ΔW = 0, as in all methods here, so that training starts from the pretrained model. `stages`, `orientation`,
    `ratio_on`, `generator_bias` and the fields after them do not exist in the released code.

        D1 = drop(σ_out(σ_in(ρ W0 Ã1ᵀ + bias_1_a) B̃1ᵀ + bias_1_b))    [N, K], the column transformation
        D2 = drop(σ_out(σ_in(D1ᵀ Ã2ᵀ + bias_2_a) B̃2ᵀ + bias_2_b))      [K, N], the row transformation

    with Ã = [shared_a; specific_a] and B̃ = [shared_b, specific_b]. The shared factors and the biases are shared by all
    layers of a shape. The specific pair belongs to one layer and is used in both stages; if W0 is not square, there is
    one pair per stage.

    Published settings, (generator_share_dim, individual_features, ratio_W0, scaling, σ_in, σ_out, drop): RoBERTa on
    GLUE 24, 2, 0.5, 0.05, none, none, 0.1; ViT-B/16 32, 5, 1.4, 1, none, leakyrelu, 0.1 with ratio_on="factors" and
    generator_bias=False; LLaMA-7B 4, 4, 1, 1, gelu, gelu, 0; all on the q and v projections.

    With a linear outer activation and no dropout the update has low rank. Otherwise it has full rank, and its operation
    needs at least as much compute as training the full weight, but not the memory.

    Args:
        generator_share_dim: rank of the shared factors.
        individual_features: rank of the specific pair; 0 for none.
        individual_init_a: initialisation of specific_a: "zero", "kaiming_uniform" (√5), "xavier_uniform" or "normal"
            (standard deviation 0.01). "zero" for both a and b without biases, as in the released ViT scripts, gives the
            pair zero gradients forever.
        individual_init_b: initialisation of specific_b. "zero_update" (the default for None) gives ΔW = 0: specific_b
            and the last stage's shared_b and bias_b are zero. The four names above give the released initialisation,
            where all shared factors are initialised like nn.Linear and ΔW is not zero. With an outer relu, whose
            gradient at 0 is zero, None means "zero" and "zero_update" is not allowed, because it would never train.
        ratio_W0: ρ.
        inner_activation, outer_activation: σ_in and σ_out, each "none", "relu", "leakyrelu", "gelu" or "tanh".
        scaling: s.
        drop: dropout probability of the elements of D1 and D2.
        stages: "column_row", "column" (D1 only, ΔW = s·D1) or "row" (D2 computed from ρ W0ᵀ instead of D1ᵀ).
        orientation: "vit": ΔW = s·D2ᵀ, as in the released ViT code; "peft": ΔW = s·D2 without transposing, as in the
            released transformers code, for square weights only.
        ratio_on: what ρ multiplies: "weight", W0 (the released transformers code), or "factors", each of the factors
            Ã and B̃ (the released ViT code).
        generator_bias: whether to use biases (the released transformers code always does).
        enable_genft: for fused weights: layer name or regular expression → one flag per row block.
            {"qkv": [True, False, True]} adapts q and v of a fused qkv weight, as two weights that share the specific
            pair, in one operation.
        individual_per_block: share one specific pair between the adapted layers of the same parent module (and shape),
            such as q_proj and v_proj of one attention, instead of one per layer.
        rank_pattern: layer name or regular expression → individual_features of these layers.

    Source: arXiv 2506.11042 and its released code.
    """

    method: ClassVar[str] = "genft"
    ranks: ClassVar[Mapping[str, str]] = {"generator_share_dim": "", "individual_features": "rank_pattern"}
    free: ClassVar[tuple[str, ...]] = ("scaling", "drop", "individual_init_a", "individual_init_b")

    generator_share_dim: int = 90
    individual_features: int = 10
    individual_init_a: str = "kaiming_uniform"
    individual_init_b: str | None = None
    ratio_W0: float = 1.0
    inner_activation: str | None = "none"
    outer_activation: str | None = "none"
    scaling: float = 1.0
    drop: float = 0.0
    stages: str = "column_row"
    orientation: str = "vit"
    ratio_on: str = "weight"
    generator_bias: bool = True
    enable_genft: dict[str, list[bool]] = field(default_factory=dict)
    individual_per_block: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner_activation = _activation("inner_activation", self.inner_activation)
        self.outer_activation = _activation("outer_activation", self.outer_activation)
        check_rank("generator_share_dim", self.generator_share_dim)
        check_rank("individual_features", self.individual_features, least=0)
        check_patterns("rank_pattern", self.rank_pattern, partial(check_rank, least=0))
        check_choice("individual_init_a", self.individual_init_a, tuple(INITS))
        if self.individual_init_b is not None:
            check_choice("individual_init_b", self.individual_init_b, (ZERO_UPDATE, *INITS))
        if self.individual_init_b == ZERO_UPDATE and self.outer_activation == "relu":
            raise ValueError(
                f"individual_init_b: got {ZERO_UPDATE!r}, expected one of {tuple(INITS)} because outer_activation is "
                "'relu', which has zero gradient at 0"
            )
        check_number("ratio_W0", self.ratio_W0)
        check_number("scaling", self.scaling)
        check_dropout("drop", self.drop)
        check_choice("stages", self.stages, tuple(STAGES))
        check_choice("orientation", self.orientation, ("vit", "peft"))
        check_choice("ratio_on", self.ratio_on, ("weight", "factors"))
        check_row_blocks("enable_genft", self.enable_genft)
        for name in ("generator_bias", "individual_per_block"):
            check_flag(name, getattr(self, name))

    @property
    def starts_at_zero(self) -> bool:
        """Whether ΔW = 0 before training."""
        default = ZERO_UPDATE if self.outer_activation != "relu" else "zero"
        return (self.individual_init_b or default) == ZERO_UPDATE

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> GenFTGenerator:
        flags = row_blocks("enable_genft", self.enable_genft, name, out_features)
        k, n = in_features, out_features // len(flags)
        if self.orientation == "peft" and self.stages != "column" and k != n:
            raise ValueError(
                f"orientation: got 'peft', which needs a square weight, but {name or 'the layer'} has K = {k}, "
                f"N = {n}; expected 'vit'"
            )
        sizes = {"in_features": k, "out_features": n}
        r = pattern_value(self.rank_pattern, name, self.individual_features)

        def factors() -> GenFTFactors:
            return GenFTFactors(self, **sizes)

        def pair() -> GenFTPair:
            return GenFTPair(self, **sizes, r=r)

        generator = GenFTGenerator(self, flags)
        if shared is None:
            generator.refer("factors", factors(), own=True)
        else:
            generator.refer("factors", share(shared, f"generator_{n}x{k}", name, factors, sizes), own=False)
        if not r:
            return generator
        if shared is None or not self.individual_per_block:
            generator.refer("specific", pair(), own=True)
        else:
            key = "specific_" + name.rpartition(".")[0].replace(".", "-")  # module names must not contain dots
            generator.refer("specific", share(shared, key, name, pair, {**sizes, "r": r}), own=False)
        return generator

    def module_patterns(self) -> dict[str, list[str]]:
        return {"enable_genft": list(self.enable_genft)}


class GenFTFactors(Factors):
    """The parameters shared by all layers of a shape. For each stage t in use, with d = K (t = 1) or N (t = 2):
    shared_t_a [r, d] and shared_t_b [d, r], r = generator_share_dim, and with generator_bias bias_t_a and bias_t_b [d].

    bias_t_a has one element per row of Ã: layers with a lower specific rank use the first ones.
    """

    def __init__(self, config: GenFTConfig, in_features: int, out_features: int) -> None:
        super().__init__(in_features=in_features, out_features=out_features)
        r = config.generator_share_dim
        widest = r + max(config.individual_features, *config.rank_pattern.values(), 0)
        for stage in STAGES[config.stages]:
            size = in_features if stage == 1 else out_features
            zero = config.starts_at_zero and stage == STAGES[config.stages][-1]
            a, b = torch.empty(r, size), torch.zeros(size, r)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            if not zero:
                nn.init.kaiming_uniform_(b, a=math.sqrt(5))
            self.register_parameter(f"shared_{stage}_a", nn.Parameter(a))
            self.register_parameter(f"shared_{stage}_b", nn.Parameter(b))
            if config.generator_bias:
                bias_a, bias_b = torch.empty(widest), torch.zeros(size)
                nn.init.uniform_(bias_a, -1 / math.sqrt(size), 1 / math.sqrt(size))
                if not zero:
                    nn.init.uniform_(bias_b, -1 / math.sqrt(r), 1 / math.sqrt(r))
                self.register_parameter(f"bias_{stage}_a", nn.Parameter(bias_a))
                self.register_parameter(f"bias_{stage}_b", nn.Parameter(bias_b))
        self.linear = (f"shared_{stage}_b", f"bias_{stage}_b")  # of the last stage
        self.outer = cast(str, config.outer_activation)

    def refuses_gain(self, gain: float) -> str:
        if self.outer == "none" or (self.outer in ("relu", "leakyrelu") and gain > 0):
            return ""
        return f"scaling: {gain:g} times the model's, expected the same because outer_activation is {self.outer!r}"

    def values_for(self, other: Any, gain: float) -> dict[str, Tensor]:
        values = super().values_for(other, gain)
        if other is None:
            return values
        # bias_t_a is one for the shared rank, then one for the specific rank.
        for stage in (1, 2):
            if (name := f"bias_{stage}_a") in values:
                values[name] = torch.cat(
                    [
                        F.pad(part, (0, room - len(part)))
                        for part, room in zip(other.halves(stage), map(len, self.halves(stage)), strict=True)
                    ]
                )
        return values

    def halves(self, stage: int) -> tuple[Tensor, Tensor]:
        """bias_t_a for the shared and for the specific rank."""
        a, _, bias, _ = (one.detach() for one in self.of(stage))
        return bias[: len(a)], bias[len(a) :]

    def of(self, stage: int) -> list[Tensor]:
        """shared_t_a and shared_t_b, then bias_t_a and bias_t_b if there are biases."""
        names = (f"shared_{stage}_a", f"shared_{stage}_b", f"bias_{stage}_a", f"bias_{stage}_b")
        return [getattr(self, name) for name in names if hasattr(self, name)]


class GenFTPair(Factors):
    """The specific pair of a layer, or of the layers of a block: specific_a [r, d] and specific_b [d, r] for a square
    W0 or a single stage, else specific_t_a and specific_t_b for each stage t."""

    def __init__(self, config: GenFTConfig, in_features: int, out_features: int, r: int) -> None:
        super().__init__(in_features=in_features, out_features=out_features, r=r)
        stages = STAGES[config.stages]
        self.single = len(stages) == 1 or in_features == out_features
        for stage in stages[:1] if self.single else stages:
            size = in_features if stage == 1 else out_features
            a, b = torch.empty(r, size), torch.zeros(size, r)
            INITS[config.individual_init_a](a)
            if not config.starts_at_zero:
                INITS[config.individual_init_b or "zero"](b)
            infix = "" if self.single else f"{stage}_"
            self.register_parameter(f"specific_{infix}a", nn.Parameter(a))
            self.register_parameter(f"specific_{infix}b", nn.Parameter(b))
        self.linear = (f"specific_{infix}b",)  # of the last stage
        self.in_both_stages = self.single and len(stages) == 2

    def refuses_gain(self, gain: float) -> str:
        if not self.in_both_stages:
            return ""
        return (
            f"scaling: {gain:g} times the model's, expected the same because a square weight has one specific pair for "
            "both stages"
        )

    def of(self, stage: int) -> tuple[Tensor, Tensor]:
        """The pair used in a stage."""
        infix = "" if self.single else f"{stage}_"
        return getattr(self, f"specific_{infix}a"), getattr(self, f"specific_{infix}b")


class GenFTGenerator(Generator):
    """A generated update; low rank if the outer activation is linear and nothing is dropped."""

    factors: GenFTFactors
    specific: GenFTPair | None

    def __init__(self, config: GenFTConfig, flags: list[bool]) -> None:
        super().__init__()
        self.register_module("specific", None)
        self.flags = tuple(flags)
        self.stages = STAGES[config.stages]
        self.inner = cast(str, config.inner_activation)
        self.outer = cast(str, config.outer_activation)
        self.ratio = config.ratio_W0
        self.factor_ratio = config.ratio_W0 if config.ratio_on == "factors" else 1.0
        self.scale = config.scaling
        self.drop = config.drop
        # Whether the features of the last stage are along the rows of ΔW, or else along its columns.
        self.features_are_rows = self.stages == (1,) or config.orientation == "peft"

    def form(self, weight: Tensor, *, dropout: bool = True) -> Form:
        drop = self.drop if self.training and dropout else 0.0
        rows = weight.shape[0] // len(self.flags)
        # The inputs of ΔW are small and keep their precision; the operation that applies ΔW follows autocast.
        with without_autocast(weight):
            parts = {
                index: self._update(weight[index * rows : (index + 1) * rows], drop)
                for index, adapted in enumerate(self.flags)
                if adapted
            }
            made = parts[0] if len(self.flags) == 1 else self._stacked(parts)
            return made.low_rank() if self.outer == "none" and not drop else made

    def _update(self, weight: Tensor, drop: float) -> Generated:
        """The update of W0 or of one of its row blocks."""
        stage = self.stages[0]
        a, b, bias_a, bias_b = self._factors(stage, weight)
        source = weight if stage == 1 else weight.t()
        h = weight_features(source, a, bias_a, ratio=self.ratio, activation=self.inner, backend=self.backend)
        if len(self.stages) == 2:
            first = Generated(h, b, None, bias_b, 1.0, self.outer, drop)
            a, b, bias_a, bias_b = self._factors(2, weight)
            h = self._features(first, a if self.factor_ratio == 1.0 else a * self.factor_ratio, bias_a)
        if self.features_are_rows:
            return Generated(h, b, None, bias_b, self.scale, self.outer, drop)
        return Generated(b, h, bias_b, None, self.scale, self.outer, drop)

    def _factors(self, stage: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Ã [r, d] (without ρ), B̃ [d, r] and the biases [r] and [d] of a stage, on the device of W0."""
        a, b, *biases = beside(weight, *self.factors.of(stage))
        if self.specific is not None:
            own_a, own_b = beside(weight, *self.specific.of(stage))
            a, b = torch.cat([a, own_a]), torch.cat([b, own_b], dim=1)
        if self.factor_ratio != 1.0:
            b = b * self.factor_ratio
        if not biases:
            return a, b, None, None
        return a, b, biases[0][: a.shape[0]], biases[1]

    def _features(self, first: Generated, a: Tensor, bias: Tensor | None) -> Tensor:
        """H2 = σ_in(D1ᵀ Ã2ᵀ + bias) [K, r]."""
        if first.activation == "none" and not first.dropout:
            # D1ᵀ Ã2ᵀ = B̃1 (H1ᵀ Ã2ᵀ) + bias_1_b (Ã2 1)ᵀ: an r×r product instead of a matrix of the weight's size.
            z = first.b @ (first.h.t() @ a.t())
            if first.column_bias is not None:
                z = torch.addr(z, first.column_bias, a.sum(1))
            return activation_named(self.inner).forward(z if bias is None else z + bias)
        return generated_features(
            first.h,
            first.b,
            a,
            bias,
            column_bias=first.column_bias,
            inner_activation=self.inner,
            activation=first.activation,
            dropout=first.dropout,
            seed=draw_seed(a.device) if first.dropout else None,
            backend=self.backend,
        )

    def _stacked(self, parts: dict[int, Generated]) -> Generated:
        """Combine the updates of the row blocks. Blocks that are not adapted get zero rows in H, and σ(0) = 0.

        Blocks with a common B: their H are stacked. Otherwise, H becomes block-diagonal and the B are concatenated. A
        bias along the columns becomes an extra column of H and B, so that it only affects its own rows.
        """
        first = next(iter(parts.values()))

        def rows(blocks: dict[int, Tensor]) -> Tensor:
            zeros = torch.zeros_like(next(iter(blocks.values())))
            return torch.cat([blocks.get(index, zeros) for index in range(len(self.flags))])

        if self.features_are_rows:
            h, b = rows({index: part.h for index, part in parts.items()}), first.b
            if first.column_bias is not None:
                ones = first.h.new_ones(first.h.shape[0], 1)
                h = torch.cat([h, rows(dict.fromkeys(parts, ones))], dim=1)
                b = torch.cat([b, first.column_bias[:, None]], dim=1)
            return Generated(h, b, None, None, self.scale, self.outer, first.dropout)
        r, last = first.h.shape[1], len(parts) - 1
        h = rows({index: F.pad(part.h, (i * r, (last - i) * r)) for i, (index, part) in enumerate(parts.items())})
        b = torch.cat([part.b for part in parts.values()], dim=1)
        row = None if first.row_bias is None else rows(dict.fromkeys(parts, first.row_bias))
        return Generated(h, b, row, None, self.scale, self.outer, first.dropout)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        parts = (self.factors, self.specific) if self.specific is not None else (self.factors,)
        return {name: parameter for part in parts for name, parameter in part.named_parameters()}

    def extra_repr(self) -> str:
        r = 0 if self.specific is None else self.specific.sizes["r"]
        shared_r = self.factors.of(self.stages[0])[0].shape[0]
        adapted = f", row_blocks={self.flags}" if len(self.flags) > 1 else ""
        return (
            f"r={shared_r}+{r}, stages={self.stages}, activations={self.inner}/{self.outer}, scale={self.scale:g}, "
            f"drop={self.drop:g}{adapted}, shared={bool(self.shared)}"
        )


def _activation(field: str, name: object) -> str:
    """As in the released code, None and upper case are accepted."""
    name = "none" if name is None else name.lower() if isinstance(name, str) else name
    check_choice(field, name, ACTIVATIONS)
    return cast(str, name)
