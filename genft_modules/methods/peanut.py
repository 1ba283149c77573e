"""PEANuT: ΔWᵀ = s·f(W0ᵀ Aᵀ) Bᵀ with a small network f (arXiv 2410.01870), numerically equivalent to peft's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from genft_modules.methods.base import Generator, GeneratorConfig, beside, without_autocast
from genft_modules.methods.checks import DEEPEST, check_choice, check_flag, check_number, check_rank
from genft_modules.methods.forms import LowRank
from genft_modules.methods.weights import weight_features

# peft creates the activation anew in every call, so its parameters keep their initial values.
CONSTANT: dict[str, Callable[[], nn.Module]] = {"prelu": partial(nn.LeakyReLU, 0.25)}


@dataclass
class PeanutConfig(GeneratorConfig):
    """Configuration of PEANuT. Field names, meanings and defaults are those of `peft.PeanutConfig`; load peft's
    adapters with `load_peft_peanut`.

        P = f(W0ᵀ Aᵀ) [K, r], ΔW = s·B Pᵀ [N, K]

    f applies σ, then `depth` encoders, each h ↦ σ(h Eᵢᵀ), then as many decoders, each h ↦ σ(h Dᵢᵀ) plus the input of
    the matching encoder. Parameters of the activation ("prelu", "xielu") are not trained, as in peft.

    Args:
        r: rank.
        depth: number of encoders and of decoders, at most 256; with 0, f(h) = σ(h).
        act_fn: σ, a name in `transformers.activations.ACT2FN`.
        scaling: s.
        init_weights: True: B is zero, so that ΔW = 0, and the rest Kaiming-uniform(√5); False: all Kaiming-uniform(√5).

    Source: arXiv 2410.01870, as in peft 0.21.
    """

    method: ClassVar[str] = "peanut"
    ranks: ClassVar[Mapping[str, str]] = {"r": ""}
    free: ClassVar[tuple[str, ...]] = ("scaling", "init_weights")

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        check_rank("depth", self.depth, least=0, most=DEEPEST)
        check_choice("act_fn", self.act_fn, tuple(sorted(ACT2FN)))
        check_number("scaling", self.scaling)
        check_flag("init_weights", self.init_weights)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> PeanutGenerator:
        return PeanutGenerator(self, out_features)


class PeanutGenerator(Generator):
    """Low rank: A [r, N], B [N, r], encoders and decoders [r, r]."""

    linear = ("B",)

    def __init__(self, config: PeanutConfig, out_features: int) -> None:
        super().__init__()
        r = config.r
        self.scale = config.scaling
        self.act = activation(config.act_fn)
        self.A = nn.Parameter(torch.empty(r, out_features))
        self.encoders = nn.ParameterList(nn.Parameter(torch.empty(r, r)) for _ in range(config.depth))
        self.decoders = nn.ParameterList(nn.Parameter(torch.empty(r, r)) for _ in range(config.depth))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        for name, parameter in self.named_parameters():
            if name != "B" or not config.init_weights:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def form(self, weight: Tensor, *, dropout: bool = True) -> LowRank:
        coders = [*list(self.encoders), *list(self.decoders)]  # as lists, which torch 2.11's Dynamo can unpack
        a, b, *coders = beside(weight, self.A, self.B, *coders)
        depth = len(coders) // 2
        # The inputs of ΔW are small and keep their precision; the operation that applies ΔW follows autocast.
        with without_autocast(weight):
            p = self.act(weight_features(weight.t(), a, backend=self.backend))
            given = []
            for encoder in coders[:depth]:
                given.append(p)
                p = self.act(p @ encoder.t())
            for decoder in coders[depth:]:
                p = self.act(p @ decoder.t()) + given.pop()
        return LowRank(p, b, self.scale)

    def extra_repr(self) -> str:
        return f"r={self.A.shape[0]}, depth={len(self.encoders)}, scale={self.scale:g}"


def activation(name: str) -> nn.Module:
    """σ by name, without trainable parameters."""
    function: nn.Module = CONSTANT[name]() if name in CONSTANT else ACT2FN[name]
    return MadeAnew(name) if next(function.parameters(), None) is not None else function


class MadeAnew(nn.Module):
    """An activation with parameters, created on the input's device in every call as in peft: the parameters are neither
    trained nor saved."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, z: Tensor) -> Tensor:
        with torch.device(z.device):
            function: nn.Module = ACT2FN[self.name]
        return function.requires_grad_(False)(z)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return self.name
