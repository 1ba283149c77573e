"""Checkpoints of the released GIFT code: torch files with the state of its wrapper around a model.

The WeGeFT code has this wrapper, too, for vision models: it computes the same, and only its options have other names.

Source: keys, settings and file names as in the released code (github.com/savadikarc/gift, 2024;
github.com/savadikarc/wegeft, 2025).
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from genft_modules.disk.checkpoint import Checkpoint, Piece, Plan, refuse_differences
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.checks import check_choice, check_names, shown
from genft_modules.methods.gift import GIFTConfig, GIFTGenerator
from genft_modules.methods.gift_blocks import BLOCKS, options_of

_KEY = re.compile(r"(in_projections|hypernets|out_projections)\.([^.]+)\.(.+)")
_BACKBONE = "backbone."
_ONE_FOR_ALL = "shared_projection"
_OURS = {"in_projections": "phi", "out_projections": "psi"}
_FIELDS = ("gift_parameters", "target_modules", "enable_gift", "layers_to_transform", "layers_pattern")
_RENAMED = {"wegeft_parameters": "gift_parameters", "enable_wegeft": "enable_gift"}  # in the WeGeFT code
# names of the method in the scripts' options, the last one in the published files
_METHODS = ("gift", "wegeft", "hypernet")
_WITHOUT_DEPTH = ("simple_block", "pamcat_attn")  # blocks without the option drop_path


def is_gift(tensors: dict[str, Any]) -> bool:
    return any(key.startswith("in_projections.") for key in tensors)


def gift_plan(
    checkpoint: Checkpoint, model: nn.Module, target_modules: list[str] | None, rename: dict[str, str]
) -> Plan:
    """As `load_released` has its arguments. Raises ValueError if a key or setting has no counterpart."""
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    unknown = []
    for key, tensor in checkpoint.tensors.items():
        if not isinstance(tensor, Tensor):
            unknown.append(key)
        elif match := _KEY.fullmatch(key):
            parts.setdefault(match[2], {})[_our_name(match[1], match[3])] = tensor
        elif key.startswith(_BACKBONE):
            others[key.removeprefix(_BACKBONE)] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"path: got unknown keys {unknown}, expected those of the released GIFT code")
    for old, new in rename.items():
        others = {re.sub(rf"^{re.escape(old)}(?=\.)", new, key): tensor for key, tensor in others.items()}
    config = _config(_settings(checkpoint.settings), parts, target_modules)
    modules = {key.rpartition(".")[0] for key in others}
    if absent := sorted(modules - {name for name, _ in model.named_modules()}):
        raise ValueError(f"path: the model has no modules {absent}; see the argument rename")
    config.modules_to_save = sorted(modules) or None

    def pieces(base: nn.Module, layers: dict[str, FusedGenLinear], adapter_name: str) -> list[Piece]:
        owner: dict[int, str] = {}
        found = []
        for name, layer in layers.items():
            generator = layer.genft_generators[adapter_name]
            assert isinstance(generator, GIFTGenerator)
            key = _ONE_FOR_ALL if config.share_projections else _key_of(name, parts)
            for factors in generator.shared:
                if (former := owner.setdefault(id(factors), key)) != key:
                    raise ValueError(
                        f"path: got pairs for {former!r} and {key!r}, expected one: genft shares a pair between layers "
                        "of one last name and size"
                    )
                ours = dict(factors.named_parameters())
                refuse_differences(parts.get(key, {}), ours, f"{key}: {{}}")
                found += [(f"{key}: {part}", parameter, parts[key][part]) for part, parameter in ours.items()]
        refuse_differences(parts, set(owner.values()), "in_projections.{}")
        return found

    return Plan(config, pieces, others)


def _our_name(part: str, rest: str) -> str:
    """Our name of a parameter of the pair: phi, psi, phi_bias, psi_bias, or the block's under block."""
    if part == "hypernets":
        return f"block.{rest}"
    return {"weight": _OURS[part], "bias": f"{_OURS[part]}_bias"}.get(rest, f"{part}.{rest}")


def _key_of(name: str, keys: dict[str, Any]) -> str:
    """The key whose pair layer `name` has, such as "attn:proj" for blocks.0.attn.proj."""
    found = [key for key in keys if name == (end := key.replace(":", ".")) or name.endswith(f".{end}")]
    if len(found) != 1:
        raise ValueError(f"path: got the pairs {found or list(keys)} for layer {name}, expected one")
    return found[0]


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of the released config, also from the options of its scripts."""
    found = {_RENAMED.get(name, name): value for name, value in found.items()}
    for method in _METHODS:
        start = f"{method}_block_"
        if f"{start}block_type" not in found:
            continue
        options = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
        kind = options["block_type"]
        fields: dict[str, Any] = {"gift_parameters": {k: v for k, v in options.items() if k in _options(kind)}}
        fields["target_modules"] = found.get(f"{method}_target_modules")
        if parts := found.get(f"{method}_enable_{method}"):
            fields["enable_gift"] = {"qkv": [part in parts for part in ("q", "k", "v")]}
        return fields | {name: value for name, value in found.items() if name in _FIELDS}
    return {name: value for name, value in found.items() if name in _FIELDS}


def _options(block: str) -> set[str]:
    """What the released code takes for a block."""
    check_choice("gift_parameters: block_type", block, tuple(BLOCKS))
    extra = set() if block in _WITHOUT_DEPTH else {"drop_path"}
    extra |= {"cluster_activation"} if block.startswith("pamcat") else set()
    return {"block_type", *options_of(block), *extra}


def _config(
    settings: dict[str, Any], parts: dict[str, dict[str, Tensor]], target_modules: list[str] | None
) -> GIFTConfig:
    block = settings.get("gift_parameters")
    if not isinstance(block, dict) or "block_type" not in block:
        raise ValueError(
            f"settings: gift_parameters: got {shown(block)}, expected the block's options as in the released config, "
            'such as {"block_type": "simple_block", "act_layer": "identity"}'
        )
    kind = block["block_type"]
    options = {name: value for name, value in block.items() if name != "block_type"}
    if unknown := sorted(options.keys() - _options(kind)):
        raise ValueError(f"gift_parameters: got {unknown} for {kind!r}, expected some of {sorted(_options(kind))}")
    options.pop("drop_path", None)  # only in training
    check_choice("gift_parameters: cluster_activation", options.pop("cluster_activation", "sigmoid"), ("sigmoid",))
    shares = _ONE_FOR_ALL in parts
    if settings.get("enable_gift") and not shares:
        raise ValueError("settings: enable_gift without share_projections: the released code cannot run it")
    targets = target_modules or settings.get("target_modules")
    check_names("target_modules", targets)
    if shares and not targets:
        raise ValueError("target_modules: got None, expected the names of the layers that share the pair")
    missing = [f"{part}.{key}" for key, found in parts.items() for part, ours in _OURS.items() if ours not in found]
    if missing:
        raise ValueError(f"path: keys {missing} are missing")
    first = next(iter(parts.values()))
    return GIFTConfig(
        r=next(iter(first["phi"].shape), 0),
        block=kind,
        block_kwargs=options,
        share_projections=shares,
        enable_gift=settings.get("enable_gift") or {},
        in_projection_bias="phi_bias" in first,
        out_projection_bias="psi_bias" in first,
        target_modules=[name.replace(":", ".") for name in targets or parts],
        layers_to_transform=settings.get("layers_to_transform"),
        layers_pattern=settings.get("layers_pattern"),
    )
