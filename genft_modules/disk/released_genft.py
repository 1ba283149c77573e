"""Checkpoints of the released GenFT code: a peft folder, or a ViT's torch file.

Source: keys, settings and file names as in the released code (github.com/xuguangning1218/GenFT, 2026).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from genft_modules.disk.checkpoint import PLACES, Checkpoint, Piece, Plan, refuse_differences
from genft_modules.files import PREFIX
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.base import module_type
from genft_modules.methods.genft import GenFTConfig, GenFTFactors

_INDIVIDUAL = re.compile(r"(?:base_model\.model\.)?(.+)\.genft_individual_weight_([ab])")
_SHARED = re.compile(r"(?:.+\.)?genft_share_([12])_([ab])\.linear\.(weight|bias)")
_FIELDS = ("generator_share_dim", "individual_features", "ratio_W0", "inner_activation", "outer_activation", "scaling")
_PROJECTIONS = (["qkv"], ["q_proj", "v_proj"], ["query", "value"])


def genft_plan(
    checkpoint: Checkpoint, model: nn.Module, target_modules: list[str] | None, rename: dict[str, str]
) -> Plan:
    """As `load_released` has its arguments. Raises ValueError if a key or setting has no counterpart."""
    released = _sorted(checkpoint)
    for old, new in rename.items():
        released.others = {re.sub(rf"^{re.escape(old)}(?=\.)", new, key): t for key, t in released.others.items()}
    is_vit = not checkpoint.in_peft_format
    config = _vit_config(released, model, target_modules) if is_vit else _peft_config(released)

    def pieces(base: nn.Module, layers: dict[str, FusedGenLinear], adapter_name: str) -> list[Piece]:
        container = next(iter(layers.values())).containers[adapter_name]
        shared = cast(nn.ModuleDict, container.genft_shared[adapter_name])
        generators = [module for module in shared.values() if isinstance(module, GenFTFactors)]
        if len(generators) != 1:
            raise ValueError(
                f"path: adapted layers of {len(generators)} shapes, expected one, as there is one generator"
            )
        found = [(f"genft_share ({name})", p, released.shared[name]) for name, p in generators[0].named_parameters()]
        own = {name: layer.adapter_parameters(adapter_name) for name, layer in layers.items()}
        pairs = _pairs_of_layers(released.pairs, list(layers)) if is_vit else released.pairs
        with_pair = (name for name in layers if "specific_a" in own[name])
        refuse_differences(pairs, with_pair, "{}.genft_individual_weight_a and _b")
        for name, pair in pairs.items():
            for side, tensor in pair.items():
                found.append((f"{name}.genft_individual_weight_{side}", own[name][f"specific_{side}"], tensor))
        return found

    return Plan(config, pieces, released.others)


@dataclass
class _Released:
    """The parts of a checkpoint: specific pairs by layer (or block), shared factors by our names, and other tensors."""

    settings: dict[str, Any]
    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The config fields common to both kinds of checkpoint."""
        missing = [name for name in _FIELDS if name not in self.settings]
        if missing:
            raise ValueError(f"settings: {missing} are missing, expected in the checkpoint's config or as an argument")
        biases = any(name.startswith("bias") for name in self.shared)
        return {name: self.settings[name] for name in _FIELDS} | {"generator_bias": biases}


def _sorted(checkpoint: Checkpoint) -> _Released:
    released = _Released(checkpoint.settings)
    unknown, differing = [], []
    for key, tensor in checkpoint.tensors.items():
        if match := _INDIVIDUAL.fullmatch(key):
            released.pairs.setdefault(match[1], {})[match[2]] = tensor
        elif match := _SHARED.fullmatch(key):
            name = f"{'shared' if match[3] == 'weight' else 'bias'}_{match[1]}_{match[2]}"
            if not torch.equal(released.shared.setdefault(name, tensor), tensor):
                differing.append(key)
        elif "genft_" in key or not isinstance(tensor, Tensor):
            unknown.append(key)
        else:
            released.others[key.removeprefix(PREFIX)] = tensor
    if unknown:
        raise ValueError(f"path: got unknown keys {unknown}, expected those of the released GenFT code")
    if differing:
        raise ValueError(
            f"path: {differing} differ from other copies of the same tensor, expected one generator for all layers"
        )
    kinds = ("weight", "bias") if any(name.startswith("bias") for name in released.shared) else ("weight",)
    wanted = {
        f"{'shared' if kind == 'weight' else 'bias'}_{stage}_{side}": f"genft_share_{stage}_{side}.linear.{kind}"
        for kind in kinds
        for stage in (1, 2)
        for side in "ab"
    }
    missing = [key for name, key in wanted.items() if name not in released.shared]
    missing += [f"{m}.genft_individual_weight_{s}" for m, pair in released.pairs.items() for s in "ab" if s not in pair]
    if missing:
        raise ValueError(f"path: keys {missing} are missing")
    return released


def _peft_config(released: _Released) -> GenFTConfig:
    settings = released.settings
    fields = released.fields() | {name: settings.get(name) for name in PLACES}
    if fields["target_modules"] is None:
        fields["target_modules"] = list(released.pairs)
    if not settings["individual_features"]:
        fields["ratio_W0"] = 1.0  # the released code ignores ratio_W0 without specific pairs
    bias = settings.get("bias", "none")
    return GenFTConfig(
        **fields,
        drop=settings.get("drop", 0.0),
        orientation="peft",
        ratio_on="weight",
        bias="genft_only" if bias == "gen_only" else bias,
        task_type=settings.get("task_type"),
    )


def _vit_config(released: _Released, model: nn.Module, target_modules: list[str] | None) -> GenFTConfig:
    if target_modules is None:
        types = {module_type(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        found = [names for names in _PROJECTIONS if types.issuperset(names)]
        if not found:
            raise ValueError(
                f"target_modules: the model has none of {_PROJECTIONS}, expected the name of the fused qkv weights or "
                "the names of the q and v projections"
            )
        target_modules = found[0]
    modules = dict(model.named_modules())
    if unknown := [key for key in released.others if key.rpartition(".")[0] not in modules or "." not in key]:
        raise ValueError(f"path: the model has no modules for the keys {unknown}; see the argument rename")
    fused = len(target_modules) == 1
    return GenFTConfig(
        **released.fields(),
        drop=released.settings.get("dpr", 0.0),
        orientation="vit",
        ratio_on="factors",
        enable_genft={target_modules[0]: [True, False, True]} if fused else {},
        individual_per_block=not fused,
        target_modules=target_modules,
        modules_to_save=sorted({key.rpartition(".")[0] for key in released.others}) or None,
    )


def _pairs_of_layers(pairs: dict[str, dict[str, Tensor]], layers: list[str]) -> dict[str, dict[str, Tensor]]:
    """The pair of each layer from the pairs of the blocks, by the name of the layer's parent or by block order."""
    parents = {layer: layer.rpartition(".")[0] for layer in layers}
    blocks = list(dict.fromkeys(parents.values()))
    named = sorted(pairs, key=_natural)
    if not pairs:
        return {}
    if len(named) != len(blocks):
        raise ValueError(
            f"path: got pairs for {len(named)} blocks, {named}, expected as many as adapted attentions in the model, "
            f"{len(blocks)}: {blocks}"
        )
    source = {block: block for block in blocks} if set(named) == set(blocks) else dict(zip(blocks, named, strict=True))
    return {layer: pairs[source[parent]] for layer, parent in parents.items()}


def _natural(name: str) -> list[Any]:
    """A sort key with blocks.10 after blocks.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
