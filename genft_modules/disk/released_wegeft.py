"""Adapters of the released WeGeFT code, a patched peft: a folder with the pair of each group of tied layers, under the
name of the group's first layer.

Source: keys, settings and their meaning as in the released code (github.com/savadikarc/wegeft, before that
savadikarc/gift, 2025).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from genft_modules.disk.adapters import without_weights
from genft_modules.disk.checkpoint import PLACES, Checkpoint, Piece, Plan, refuse_differences
from genft_modules.files import PREFIX
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.checks import check_choice, shown
from genft_modules.methods.patterns import check_matching, pattern_value
from genft_modules.methods.wegeft import BY_TYPE, WeGeFTConfig

_PAIR = re.compile(r"(?:base_model\.model\.)?(.+)\.wegeft_(phi|psi)\.weight")
_KNOWN = {
    *(*PLACES, "r", "wegeft_alpha", "wegeft_dropout", "tied_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("transform_dim", "fan_in_fan_out", "init_wegeft_weights", "peft_type", "task_type", "inference_mode"),
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
}


def wegeft_plan(checkpoint: Checkpoint, model: nn.Module, target_modules: list[str] | None) -> Plan:
    """As `load_released` has its arguments. Raises ValueError if a key or setting has no counterpart."""
    pairs, others = _sorted(checkpoint.tensors)
    settings = checkpoint.settings | ({"target_modules": target_modules} if target_modules else {})
    config, first = _config(settings, model)

    def pieces(base: nn.Module, layers: dict[str, FusedGenLinear], adapter_name: str) -> list[Piece]:
        refuse_differences(pairs, set(first.values()), "{}.wegeft_phi.weight and wegeft_psi.weight")
        return [
            (f"{name}.wegeft_{side}.weight", layers[name].adapter_parameters(adapter_name)[side], tensor)
            for name, pair in pairs.items()
            for side, tensor in pair.items()
        ]

    return Plan(config, pieces, others)


def _sorted(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The pairs by layer, and all other tensors."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others = {}
    unknown = []
    for key, tensor in tensors.items():
        if (match := _PAIR.fullmatch(key)) and isinstance(tensor, Tensor):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif "wegeft_" in key or not isinstance(tensor, Tensor):
            unknown.append(key)
        else:
            others[key.removeprefix(PREFIX)] = tensor
    if unknown:
        raise ValueError(f"path: got unknown keys {unknown}, expected those of the released WeGeFT code")
    if missing := [
        f"{name}.wegeft_{side}.weight" for name in pairs for side in ("phi", "psi") if side not in pairs[name]
    ]:
        raise ValueError(f"path: keys {missing} are missing")
    return pairs, others


def _config(settings: dict[str, Any], model: nn.Module) -> tuple[WeGeFTConfig, dict[str, str]]:
    """Our configuration, and for each layer the first one of its group, whose name the group's pair has."""
    if unknown := settings.keys() - _KNOWN:
        raise ValueError(f"path: got unknown settings {sorted(unknown)}, expected those of the released WeGeFT code")
    if missing := [name for name in ("r", "wegeft_alpha", "target_modules") if settings.get(name) is None]:
        raise ValueError(f"settings: {missing} are missing, expected in the checkpoint's config or as an argument")
    if settings.get("fan_in_fan_out"):
        raise ValueError("settings: fan_in_fan_out: got True, expected False: the released code refuses Conv1D")
    sides = settings.get("transform_dim") or "input"
    for side in sides.values() if isinstance(sides, dict) else [sides]:
        check_choice("settings: transform_dim", side, ("input",))  # "output" multiplies shapes that do not fit
    tied = settings.get("tied_modules")
    if isinstance(tied, str):
        raise ValueError(f"settings: tied_modules: got {shown(tied)}, expected a list of groups of expressions or None")
    places: dict[str, Any] = {name: settings.get(name) for name in PLACES}
    given = WeGeFTConfig(
        **places,
        r=settings["r"],
        wegeft_alpha=settings["wegeft_alpha"],
        wegeft_dropout=settings.get("wegeft_dropout") or 0.0,
        tied_modules=tied,
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
        bias=settings.get("bias", "none"),
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
    )
    check_matching(given, (name for name, _ in model.named_modules()))
    layers = _adapted(given, model)
    groups = {name: _group(name, tied or []) for name in layers}
    rank_pattern, alpha_pattern = _patterns(given, layers)
    config = replace(given, tied_modules=_tied(groups, tied), rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    first: dict[str, str] = {}
    return config, {name: first.setdefault(group, name) for name, group in groups.items()}


def _adapted(config: WeGeFTConfig, model: nn.Module) -> list[str]:
    """The layers that peft adapts, in its order."""
    trial = without_weights(model)
    places: dict[str, Any] = {name: getattr(config, name) for name in PLACES}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # repeated when the adapter is loaded
        inject_adapter_in_model(WeGeFTConfig(**places), trial)
    return [name for name, layer in trial.named_modules() if isinstance(layer, FusedGenLinear)]


def _group(name: str, tied: list[list[str]]) -> str:
    """The group of a layer: the released code matches the beginning of its name; other layers are alone."""
    for patterns in tied:
        if any(re.match(pattern, name) for pattern in patterns):
            return "-".join(patterns)
    return name


def _tied(groups: dict[str, str], tied: list[list[str]] | None) -> list[list[str]] | str | None:
    """A tied_modules of ours that groups the layers likewise: matched at the end of a name, it may need other words."""
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    named = [[_only(name) for name in names] for names in members.values() if len(names) > 1]
    for candidate in (BY_TYPE, None, tied, named):
        ours = WeGeFTConfig(tied_modules=candidate)
        if _same_partition(groups, {name: ours.group(name) or name for name in groups}):
            return candidate
    raise AssertionError("names of layers match themselves")


def _only(name: str) -> str:
    """An expression for this layer alone."""
    return f"^{re.escape(name)}"


def _same_partition(one: dict[str, str], other: dict[str, str]) -> bool:
    pairs = {(one[name], other[name]) for name in one}
    return len(pairs) == len(set(one.values())) == len(set(other.values()))


def _patterns(config: WeGeFTConfig, layers: list[str]) -> tuple[dict[str, int], dict[str, float]]:
    """Our rank_pattern and alpha_pattern. The released code looks both up under the key of rank_pattern that fits a
    layer, or under the layer's whole name."""
    keys = {name: next((key for key in config.rank_pattern if re.match(rf".*\.{key}$", name)), name) for name in layers}

    def ours(given: dict[str, Any], usual: float) -> dict[str, Any]:
        wanted = {name: given.get(keys[name], usual) for name in layers}
        if all(pattern_value(given, name, usual) == value for name, value in wanted.items()):
            return given
        return {_only(name): value for name, value in wanted.items() if value != usual}

    return ours(config.rank_pattern, config.r), ours(config.alpha_pattern, config.wegeft_alpha)
