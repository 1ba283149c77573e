"""Weighted sums of low-rank adapters as a new adapter: Σ wᵢ ΔWᵢ = [w₁B₁ w₂B₂ …][A₁; A₂; …]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genft_modules.layer.adapted import AdaptedLayer
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods import LoRAConfig
from genft_modules.methods.checks import check_number, check_rank
from genft_modules.model.targets import layer_names, targets_of

COMBINATIONS = ("cat", "svd")


@torch.no_grad()
def combined(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], combination_type: str, svd_rank: int | None
) -> tuple[LoRAConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The config of the sum and A [r, K] and B [N, r] of each layer. See `GenFTModel.add_weighted_adapter`."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"weights: got {len(weights)} for {len(adapters)} adapters, expected one per adapter and at least one"
        )
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type: got {combination_type!r}, expected one of {COMBINATIONS}; peft's other types combine "
            "the elements of A and B, which do not exist in generated updates"
        )
    if svd_rank is not None:
        check_rank("svd_rank", svd_rank)
        if combination_type != "svd":
            raise ValueError(
                f"svd_rank: got {svd_rank}, expected None because combination_type is {combination_type!r}"
            )
    for name, weight in zip(adapters, weights, strict=True):
        check_number(f"weights of {name!r}", weight)
        if name not in tuner.peft_config:
            raise ValueError(f"adapters: {name!r} does not exist, expected names from {list(tuner.peft_config)}")
        config = tuner.peft_config[name]
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"adapters: {name!r} also trains full modules or biases (modules_to_save, bias), which cannot be added"
            )
    layers = {}
    for key, layer in tuner.model.named_modules():
        if isinstance(layer, AdaptedLayer) and not layer.genft_generators.keys().isdisjoint(adapters):
            if not isinstance(layer, FusedGenLinear):
                raise ValueError(f"adapters: got adapters of stacked experts ({key}), expected of linear layers only")
            layers[key] = layer
    factors = {}
    for key, layer in layers.items():
        parts = []
        for name, weight in zip(adapters, weights, strict=True):
            if name not in layer.genft_generators:
                continue
            part = layer.low_rank_factors(name)
            if part is None:
                raise ValueError(
                    f"adapters: ΔW of {name!r} ({tuner.peft_config[name].method}) has full rank in {key}, expected "
                    "low-rank adapters"
                )
            parts.append((part[0], part[1] * weight))
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        if combination_type == "svd":
            a, b = truncated(a, b, svd_rank or max(a.shape[0] for a, _ in parts))
        factors[key] = (a, b)
    ranks = {key: a.shape[0] for key, (a, _) in factors.items()}
    r = max(ranks.values())
    # peft matches the end of names; ^ prevents a match with a longer name
    pattern = {f"^{re.escape(key)}": rank for key, rank in ranks.items() if rank != r}
    config = LoRAConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets_of(layers, layer_names(tuner.model)),
        task_type=tuner.peft_config[adapters[0]].task_type,
        base_model_name_or_path=tuner.peft_config[adapters[0]].base_model_name_or_path,
    )
    return config, factors


def truncated(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B A with rank r, computed without forming B A."""
    q_a, r_a = torch.linalg.qr(a.t())
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return vh[:r] @ q_a.t(), q_b @ (u[:, :r] * s[:r])
