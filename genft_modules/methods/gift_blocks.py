"""The blocks h between GIFT's two projections: the N rows of W0 φᵀ as tokens of dimension r, [N, r] → [N, r].

Parameter names are those of the released code. `simple_block`, `mlp` and `transformer` are tested against tensors
computed with that code. `mlp_mixer`, `pamcat_attn` and `pamcat_transformer` follow the published description and code
in structure, defaults and names, but have not been compared numerically. Not implemented: stochastic depth, and
cluster assignments other than sigmoid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genft_modules.methods.base import without_autocast
from genft_modules.methods.checks import DEEPEST, MOST, check_choice, shown


class L2Norm(nn.Module):
    """Divide each token by its L2 norm."""

    def forward(self, w: Tensor) -> Tensor:
        return F.normalize(w, dim=-1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "l2": lambda dim: L2Norm(),
    "ln": nn.LayerNorm,
    "none": lambda dim: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {  # all names of the released code but softmax, which gives ones
    "identity": nn.Identity,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "standard_sigmoid": nn.Sigmoid,
    "hsigmoid": nn.Hardsigmoid,
}


class Mlp(nn.Module):
    """dim → hidden → dim with GELU (erf)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, w: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(w)))  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ/√d) v per head, d = r/heads; q [N, r], k and v [M, r] → [N, r]."""

    def split(w: Tensor) -> Tensor:
        return w.reshape(w.shape[0], heads, -1).transpose(0, 1)[None]  # [1, heads, tokens, d]

    mixed: Tensor = F.scaled_dot_product_attention(split(q), split(k), split(v))[0]
    return mixed.transpose(0, 1).flatten(1)


class Attention(nn.Module):
    """Self-attention over the N tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, w: Tensor) -> Tensor:
        q, k, v = self.qkv(w).chunk(3, dim=-1)
        return self.proj(_attend(q, k, v, self.num_heads))  # type: ignore[no-any-return]


class Cluster(nn.Module):
    """Soft clustering of the tokens: z = l2norm(σ(cluster(w))ᵀ w / N), [N, r] → [num_clusters, r]."""

    def __init__(self, dim: int, num_clusters: int) -> None:
        super().__init__()
        self.cluster = nn.Linear(dim, num_clusters)

    def forward(self, w: Tensor) -> Tensor:
        share = torch.sigmoid(self.cluster(w)) / w.shape[0]
        return F.normalize(share.t() @ w, dim=-1)


class PamCatAttention(nn.Module):
    """Attention of the N tokens to clusters of the tokens: N·num_clusters scores instead of N²."""

    def __init__(self, dim: int, num_heads: int, num_clusters: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cluster = Cluster(dim, num_clusters)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, w: Tensor) -> Tensor:
        z = self.cluster(w)
        return self.proj(_attend(self.q(w), self.k(z), self.v(z), self.num_heads))  # type: ignore[no-any-return]


class SimpleBlock(nn.Module):
    """An element-wise function."""

    def __init__(self, dim: int, tokens: int, act_layer: str = "identity") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act_layer]()

    def forward(self, w: Tensor) -> Tensor:
        return self.act(w)  # type: ignore[no-any-return]


class MlpBlock(nn.Module):
    """w + MLP(norm(w))."""

    def __init__(self, dim: int, tokens: int, mlp_ratio: float = 2.0, norm_layer: str = "l2") -> None:
        super().__init__()
        self.norm1 = NORMS[norm_layer](dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.mlp(self.norm1(w))  # type: ignore[no-any-return]


class MixerBlock(nn.Module):
    """w + MLP over tokens, then + MLP over channels, each on norm(w). The number of tokens N is fixed."""

    def __init__(
        self,
        dim: int,
        tokens: int,
        num_mixed_tokens: int = 64,
        channel_mixing_ratio: float = 2.0,
        norm_layer: str = "l2",
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[norm_layer](dim)
        self.mlp1 = Mlp(tokens, num_mixed_tokens)
        self.norm2 = NORMS[norm_layer](dim)
        self.mlp2 = Mlp(dim, int(dim * channel_mixing_ratio))

    def forward(self, w: Tensor) -> Tensor:
        w = w + self.mlp1(self.norm1(w).t()).t()
        return w + self.mlp2(self.norm2(w))  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """w + attention(norm(w)), then + MLP(norm(w)) unless mlp_ratio is None."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float | None, norm_layer: str) -> None:
        super().__init__()
        self.norm1 = NORMS[norm_layer](dim)
        self.attn = attention
        self.mlp = None
        if mlp_ratio is not None:
            self.norm2 = NORMS[norm_layer](dim)
            self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, w: Tensor) -> Tensor:
        w = w + self.attn(self.norm1(w))
        return w if self.mlp is None else w + self.mlp(self.norm2(w))


def transformer(
    dim: int, tokens: int, num_heads: int = 1, mlp_ratio: float = 2.0, norm_layer: str = "l2"
) -> AttentionBlock:
    """w + attention over the N tokens, then + MLP, each on norm(w)."""
    return AttentionBlock(dim, Attention(dim, num_heads), mlp_ratio, norm_layer)


def pamcat_attn(
    dim: int, tokens: int, num_heads: int = 1, num_clusters: int = 64, norm_layer: str = "l2"
) -> AttentionBlock:
    """w + attention of the N tokens of norm(w) to their clusters, without an MLP."""
    return AttentionBlock(dim, PamCatAttention(dim, num_heads, num_clusters), None, norm_layer)


def pamcat_transformer(
    dim: int,
    tokens: int,
    num_heads: int = 1,
    mlp_ratio: float = 2.0,
    num_clusters: int = 64,
    norm_layer: str = "l2",
) -> AttentionBlock:
    """w + attention of the N tokens to their clusters, then + MLP, each on norm(w)."""
    return AttentionBlock(dim, PamCatAttention(dim, num_heads, num_clusters), mlp_ratio, norm_layer)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "simple_block": SimpleBlock,
    "mlp": MlpBlock,
    "mlp_mixer": MixerBlock,
    "transformer": transformer,
    "pamcat_attn": pamcat_attn,
    "pamcat_transformer": pamcat_transformer,
}


class Blocks(nn.Module):
    """`num_blocks` blocks in sequence, in the dtype of their parameters even under autocast."""

    def __init__(self, block: str, dim: int, tokens: int, num_blocks: int = 1, **block_kwargs: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BLOCKS[block](dim, tokens, **block_kwargs) for _ in range(num_blocks))

    def forward(self, w: Tensor) -> Tensor:
        with without_autocast(w):
            for block in self.blocks:
                w = block(w)
        return w


def options_of(block: str) -> dict[str, Any]:
    """The options of a block with their defaults."""
    parameters = inspect.signature(BLOCKS[block]).parameters
    return {"num_blocks": 1} | {name: p.default for name, p in parameters.items() if name not in ("dim", "tokens")}


def padding_changes(block: str, block_kwargs: dict[str, Any]) -> str:
    """Why h changes if its r dimensions and its tensors are padded with zeros, "" if it does not: what is added stays
    zero, or is multiplied by zeros of ψ. (For attention see `queries_of`.)"""
    norm = {**options_of(block), **block_kwargs}.get("norm_layer")
    if norm == "ln":
        return 'norm_layer is "ln", whose mean and variance are over r elements'
    if block == "mlp_mixer" and norm == "l2":
        return 'block is "mlp_mixer" with norm_layer "l2": its biases fill the added dimensions, which changes the norm'
    return ""


def by_head(name: str, tensor: Tensor, heads: int) -> Tensor:
    """A parameter of `Blocks` with its heads as a dimension, if it is one of an attention; else as it is."""
    module = name.rpartition(".")[0]
    if module.endswith(".attn.qkv"):
        return tensor.view(3, heads, -1, *tensor.shape[1:])
    if module.endswith((".attn.q", ".attn.k", ".attn.v")):
        return tensor.view(heads, -1, *tensor.shape[1:])
    if name.endswith(".attn.proj.weight"):
        return tensor.view(len(tensor), heads, -1)
    return tensor


def queries_of(name: str, tensor: Tensor) -> Tensor | None:
    """The part of a parameter of `Blocks` that makes the queries of an attention, a view; else None."""
    module = name.rpartition(".")[0]
    if module.endswith(".attn.qkv"):
        return tensor[: len(tensor) // 3]
    return tensor if module.endswith(".attn.q") else None


MOST_OF = {"num_blocks": DEEPEST, "mlp_ratio": 64, "channel_mixing_ratio": 64}


def check_block(block: str, block_kwargs: dict[str, Any], r: int) -> None:
    """Raises ValueError or TypeError for an unknown block, unknown options, or options incompatible with rank r."""
    check_choice("block", block, tuple(BLOCKS))
    if not isinstance(block_kwargs, dict):
        raise TypeError(f"block_kwargs: got {shown(block_kwargs)}, expected a dict")
    known = options_of(block)
    for name, value in block_kwargs.items():
        if name not in known:
            raise ValueError(f"block_kwargs: got {shown(name)} for {block!r}, expected one of {tuple(known)}")
        if isinstance(known[name], str):
            check_choice(name, value, tuple(ACTIVATIONS if name == "act_layer" else NORMS))
        elif not isinstance(value, (int, type(known[name]))) or isinstance(value, bool):
            raise TypeError(f"{name}: got {shown(value)}, expected {type(known[name]).__name__}")
        elif not 0 < value <= MOST_OF.get(name, MOST):
            raise ValueError(
                f"{name}: got {shown(value)}, expected a positive number, at most {MOST_OF.get(name, MOST)}"
            )
    heads = block_kwargs.get("num_heads", 1)
    if r % heads:
        raise ValueError(f"num_heads: got {heads}, expected a divisor of r = {r}")
