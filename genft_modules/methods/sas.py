"""SaS: one low-rank pair that layers share, and one for each layer that a small hypernetwork makes (arXiv 2504.03450).

This is our reconstruction. The paper's equations could not be read and no code is released: what is known is that a
shared part is low rank, that a hypernetwork makes the part of each layer, and that both together stay under 0.05 % of
ViT-B/16. The rest (what the hypernetwork is given, its size, its start) is our choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genft_modules.methods.base import (
    Factors,
    Generator,
    GeneratorConfig,
    beside,
    check_number,
    check_rank,
    share,
    without_autocast,
)
from genft_modules.methods.forms import LowRank


@dataclass
class SaSConfig(GeneratorConfig):
    """SaS, **reconstructed**: the paper's equations could not be read, so the numbers of its authors need not be those
    of this code, and field names are ours.

        ΔW = s·(Q_sh P_shᵀ + Q_l P_lᵀ)

    (P_sh [K, r_shared], Q_sh [N, r_shared]) is one pair for all layers of a shape. (P_l [K, r_specific], Q_l [N,
    r_specific]) is made for layer l by one hypernetwork for the whole adapter, chunk by chunk of `chunk_dim` rows:

        hidden = tanh((e_l + c_i) Wᵀ + b)                          for chunk i
        rows of P_l = (hidden H_pᵀ)/√K,  rows of Q_l = hidden H_qᵀ/√hidden_dim

    from the layer's trained embedding e_l and the chunk's c_i, which layers of a shape share. So the hypernetwork has
    the same few parameters for any width and depth. Q_sh and H_q are zero at the start, hence ΔW = 0.

    On the query and value projections of ViT-B/16 the defaults train 29,984 parameters, on all four attention
    projections 30,368: both under the 43,000 (0.05 %) that the paper stays under.

    Args:
        r_shared: rank of the shared pair.
        r_specific: rank of the generated pair.
        embedding_dim: size of e_l and c_i.
        hidden_dim: width of the hypernetwork.
        chunk_dim: rows of P_l and Q_l that it makes at a time.
        scaling: s.

    Source: arXiv 2504.03450, of which only the idea and the budget could be read.
    """

    method: ClassVar[str] = "sas"

    r_shared: int = 8
    r_specific: int = 4
    embedding_dim: int = 16
    hidden_dim: int = 32
    chunk_dim: int = 64
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("r_shared", "r_specific", "embedding_dim", "hidden_dim", "chunk_dim"):
            check_rank(field, getattr(self, field))
        check_number("scaling", self.scaling)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> SaSGenerator:
        sizes = {"in_features": in_features, "out_features": out_features}

        def hypernetwork() -> SaSHypernetwork:
            return SaSHypernetwork(self)

        def pair() -> SaSPair:
            return SaSPair(self, **sizes)

        own = shared is None
        generator = SaSGenerator(self)
        if shared is None:
            shared = nn.ModuleDict()
        generator.refer("hypernetwork", share(shared, "hypernetwork", name, hypernetwork, {}), own=own)
        generator.refer("pair", share(shared, f"pair_{out_features}x{in_features}", name, pair, sizes), own=own)
        return generator


class SaSHypernetwork(Factors):
    """From embeddings to chunks: weight [hidden, embedding] and bias [hidden] as nn.Linear starts them, head_p and
    head_q [chunk·r_specific, hidden], head_q zero."""

    def __init__(self, config: SaSConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.r = config.r_specific
        self.weight = nn.Parameter(torch.empty(width, config.embedding_dim))
        self.bias = nn.Parameter(torch.empty(width))
        self.head_p = nn.Parameter(torch.empty(config.chunk_dim * self.r, width))
        self.head_q = nn.Parameter(torch.zeros(config.chunk_dim * self.r, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -(config.embedding_dim**-0.5), config.embedding_dim**-0.5)
        nn.init.kaiming_uniform_(self.head_p, a=math.sqrt(5))

    def made(self, embeddings: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """P_l [K, r_specific] and Q_l [N, r_specific] where the embeddings are: e_l + c_i [chunks of K and of N, d]."""
        weight, bias, head_p, head_q = beside(embeddings, self.weight, self.bias, self.head_p, self.head_q)
        chunks = _chunks(in_features, head_p.shape[0] // self.r)
        hidden = torch.tanh(F.linear(embeddings, weight, bias))
        for_p, for_q = hidden.split([chunks, hidden.shape[0] - chunks])
        p = F.linear(for_p * in_features**-0.5, head_p).view(-1, self.r)
        q = F.linear(for_q * weight.shape[0] ** -0.5, head_q).view(-1, self.r)
        return _first(p, in_features), _first(q, out_features)


class SaSPair(Factors):
    """What layers of a shape share: P_sh [K, r] Kaiming-uniform(√5) over K, Q_sh [N, r] zero, and the embeddings of the
    chunks of K, then of those of N."""

    def __init__(self, config: SaSConfig, in_features: int, out_features: int) -> None:
        super().__init__(in_features=in_features, out_features=out_features)
        bound = in_features**-0.5
        self.p = nn.Parameter(torch.empty(in_features, config.r_shared).uniform_(-bound, bound))
        self.q = nn.Parameter(torch.zeros(out_features, config.r_shared))
        chunks = _chunks(in_features, config.chunk_dim) + _chunks(out_features, config.chunk_dim)
        self.chunks = nn.Parameter(torch.randn(chunks, config.embedding_dim))


class SaSGenerator(Generator):
    """Low rank, r_shared + r_specific; the layer's own parameter is its embedding [d]."""

    hypernetwork: SaSHypernetwork
    pair: SaSPair

    def __init__(self, config: SaSConfig) -> None:
        super().__init__()
        self.scale = config.scaling
        self.embedding = nn.Parameter(torch.randn(config.embedding_dim))

    def form(self, weight: Tensor, *, dropout: bool = True) -> LowRank:
        p, q, chunks = beside(weight, self.pair.p, self.pair.q, self.pair.chunks)
        (embedding,) = beside(weight, self.embedding)
        # What ΔW is made from is small, and keeps its precision; the operation that applies ΔW follows autocast.
        with without_autocast(weight):
            own_p, own_q = self.hypernetwork.made(chunks + embedding, p.shape[0], q.shape[0])
        return LowRank(torch.cat([p, own_p], dim=1), torch.cat([q, own_q], dim=1), self.scale)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        parts = {"": self, "pair.": self.pair, "hypernetwork.": self.hypernetwork}
        return {
            prefix + name: parameter
            for prefix, part in parts.items()
            for name, parameter in part.named_parameters(recurse=bool(prefix))
        }

    def extra_repr(self) -> str:
        r = f"{self.pair.p.shape[1]}+{self.hypernetwork.r}"
        return f"r={r}, scale={self.scale:g}, shared={bool(self.shared)}"


def _first(rows: Tensor, count: int) -> Tensor:
    """The first rows; as it is where that is all, for a slice costs its backward a copy."""
    return rows if rows.shape[0] == count else rows[:count]


def _chunks(size: int, chunk: int) -> int:
    """How many chunks make `size` rows, the last one perhaps cut."""
    return -(-size // chunk)
