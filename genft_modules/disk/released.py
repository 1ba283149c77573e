"""Loading of adapters saved by the methods' released code or by peft."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import nn

from genft_modules.disk.checkpoint import Checkpoint, Plan, refuse_differences, refuse_shapes
from genft_modules.disk.released_genft import genft_plan
from genft_modules.disk.released_gift import gift_plan, is_gift
from genft_modules.disk.released_wegeft import wegeft_plan
from genft_modules.files import PREFIX
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.base import GeneratorConfig, read_fields
from genft_modules.methods.checks import shown
from genft_modules.methods.hira import HiRAConfig
from genft_modules.methods.peanut import PeanutConfig

# Our keys → peft's.
_PEANUT = (re.compile(r"\.genft_generators\.(A|B|encoders|decoders)(\.\d+)?$"), r".peanut_\1\2.weight")
_HIRA = (re.compile(r"\.genft_generators(?=\.hira_[AB]$)"), "")
_DETECTED = ("peft_type", "fan_in_fan_out")  # not taken from peft's settings
_TORCH_FILES = ("best_model.pt", "checkpoint.pth", "last.pth.tar", "model_best.pth.tar")


def load_released(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    target_modules: list[str] | None = None,
    rename: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
    backend: str = "auto",
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter saved by the released code of GenFT, WeGeFT or GIFT. The model's outputs are the same as there.

    The files say which method it is:

    - GenFT and WeGeFT on transformers models: a peft directory with adapter_config.json and adapter_model.safetensors
      (or .bin), with keys like `base_model.model.<layer>.genft_individual_weight_a` and
      `<...>.generator.genft_share_1_a.linear.weight`, the latter possibly repeated for every layer; or
      `base_model.model.<layer>.wegeft_phi.weight` for the first of the layers that share a pair.
    - GenFT on a ViT: a torch file, and args.yaml next to it, with keys `blocks.<i>.attn.genft_individual_weight_a` and
      `<...>.gen.genft_share_1_a.linear.weight`. Block i is the model's i-th attention, whatever its name: a fused qkv
      weight, or q and v projections.
    - GIFT, and the WeGeFT code's wrapper for vision models, which computes the same: a torch file with keys
      `in_projections.<target>.weight`, `hypernets.<target>.<...>` and `out_projections.<target>.weight`. Its options
      are in config/config.json, args.yaml or the file itself.

    Torch files are read with weights_only. In a directory they are called best_model.pt, checkpoint.pth, last.pth.tar
    or model_best.pth.tar. All other tensors, such as a head, are loaded into the module of that name, which is saved
    with the adapter.

    Args:
        model: the pretrained base model without adapters.
        path: the directory, or the torch file.
        adapter_name: name for the adapter.
        target_modules: names of the adapted layers, where the checkpoint does not say them. GenFT on a ViT: the name of
            the fused qkv weights, or the names of the q and v projections; None detects "qkv", "q_proj" and "v_proj",
            or "query" and "value".
        rename: torch files: module names in the checkpoint → in the model, such as {"head": "classifier"}.
        settings: override or complete the checkpoint's configuration, by its names.
        backend: "auto", "triton" or "reference".
        is_trainable: whether to train the adapter further; else it is frozen and the model is in eval mode.

    Raises:
        ValueError: a key, setting or layer has no counterpart, or a shape does not match. The model's layers are
            restored.
        pickle.UnpicklingError: the torch file contains more than tensors and plain values.

    Source: keys, settings and file names as in the released code (github.com/xuguangning1218/GenFT, 2026;
    github.com/savadikarc/gift, 2024; github.com/savadikarc/wegeft, 2025).
    """
    path = Path(path)
    checkpoint = _read(path, settings or {})
    if is_gift(checkpoint.tensors):
        plan = gift_plan(checkpoint, model, target_modules, rename or {})
    elif checkpoint.settings.get("peft_type") == "WeGeFT":
        plan = wegeft_plan(checkpoint, model, target_modules)
    else:
        plan = genft_plan(checkpoint, model, target_modules, rename or {})
    return _loaded(
        model, plan.config, adapter_name, backend, is_trainable, lambda adapted: _fill(adapted, adapter_name, plan)
    )


load_released_genft = load_released
"""The former name of `load_released`, while it loaded only GenFT's adapters."""


def load_peft_peanut(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    backend: str = "auto",
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter saved by peft's PEANuT. The model's outputs are the same as there.

    Its keys are like `base_model.model.<layer>.peanut_A.weight`, `<...>.peanut_B.weight` and, if depth > 0,
    `<...>.peanut_encoders.<i>.weight` and `<...>.peanut_decoders.<i>.weight`. modules_to_save, such as a head, are
    loaded too.

    Args:
        model: the pretrained base model without adapters.
        path: a directory with adapter_config.json and adapter_model.safetensors (or .bin), or a name on the Hub.
        adapter_name: name for the adapter.
        backend: "auto", "triton" or "reference".
        is_trainable: whether to train the adapter further; else it is frozen and the model is in eval mode.

    Raises:
        ValueError: a key or setting has no counterpart, or a shape does not match. The model's layers are restored.

    Source: keys and settings as in peft 0.21.
    """
    return _load_peft(model, path, peft.PeanutConfig, PeanutConfig, _PEANUT, adapter_name, backend, is_trainable)


def load_peft_hira(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    backend: str = "auto",
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter of linear layers saved by peft's HiRA. The model's outputs are the same as there.

    Its keys are like `base_model.model.<layer>.hira_A` and `<...>.hira_B`. The ranks are those of the tensors, because
    peft 0.21 ignores rank_pattern in a model's first adapter. modules_to_save, such as a head, are loaded too.

    Args:
        model: the pretrained base model without adapters.
        path: a directory with adapter_config.json and adapter_model.safetensors (or .bin), or a name on the Hub.
        adapter_name: name for the adapter.
        backend: "auto", "triton" or "reference".
        is_trainable: whether to train the adapter further; else it is frozen and the model is in eval mode.

    Raises:
        TypeError: the adapter has a layer other than a linear one, such as an embedding or a convolution.
        ValueError: a key or setting has no counterpart, or a shape does not match. The model's layers are restored.

    Source: keys and settings as in peft 0.21.
    """
    return _load_peft(model, path, peft.HiraConfig, HiRAConfig, _HIRA, adapter_name, backend, is_trainable)


def _load_peft(
    model: nn.Module,
    path: str | os.PathLike[str],
    kind: type[PeftConfig],
    method: type[GeneratorConfig],
    keys: tuple[re.Pattern[str], str],
    adapter_name: str,
    backend: str,
    is_trainable: bool,
) -> PeftModel:
    """The model with an adapter that peft saved with a config of `kind`, as one of `method`; `keys`: expression and
    replacement that make peft's keys from ours."""
    expression, replacement = keys
    theirs = PeftConfig.from_pretrained(str(path))
    title = method.method.upper()  # as in peft's PeftType
    if not isinstance(theirs, kind):
        hint = "; load genft adapters with PeftModel.from_pretrained" * isinstance(theirs, GeneratorConfig)
        raise ValueError(f"path: {path} has an adapter of type {theirs.peft_type}, expected peft's own {title}{hint}")
    known, usual = {each.name for each in fields(method)} - {"peft_type"}, type(theirs)()
    settings = {each.name: getattr(theirs, each.name) for each in fields(theirs) if each.name not in _DETECTED}
    strange = {name: value for name, value in settings.items() if name not in known and value != getattr(usual, name)}
    if strange:
        raise ValueError(f"path: got unknown settings {strange}, expected those of {title} in peft 0.21")
    tensors = load_peft_weights(str(path), device="cpu")
    if "rank_pattern" in settings:  # peft 0.21 applies it only to layers that have an adapter already
        settings["rank_pattern"] = {
            re.escape(key.removeprefix(PREFIX).removesuffix(".hira_A")): len(tensor)
            for key, tensor in tensors.items()
            if key.endswith(".hira_A") and tensor.dim() == 2 and len(tensor) not in (0, settings["r"])
        }

    def fill(adapted: PeftModel) -> None:
        state = get_peft_model_state_dict(adapted, adapter_name=adapter_name)
        ours = {expression.sub(replacement, key): key for key in state}
        refuse_differences(tensors, ours)
        refuse_shapes((key, state[ours[key]], tensor) for key, tensor in tensors.items())
        set_peft_model_state_dict(adapted, {ours[key]: tensor for key, tensor in tensors.items()}, adapter_name)

    config = method(**{name: value for name, value in settings.items() if name in known})
    return _loaded(model, config, adapter_name, backend, is_trainable, fill)


def _loaded(
    model: nn.Module,
    config: GeneratorConfig,
    adapter_name: str,
    backend: str,
    is_trainable: bool,
    fill: Callable[[PeftModel], None],
) -> PeftModel:
    """The model with an adapter of `config` whose tensors are set by `fill`; the adapter is removed if that fails."""
    config.backend = backend
    config.inference_mode = not is_trainable
    adapted = get_peft_model(model, config, adapter_name)
    try:
        fill(adapted)
    except Exception:
        adapted.unload()
        raise
    return adapted if is_trainable else adapted.eval()


def _read(path: Path, settings: dict[str, Any]) -> Checkpoint:
    if (path / "adapter_config.json").is_file():
        found = read_fields(path / "adapter_config.json")
        if found.get("peft_type") not in ("GENFT", "WeGeFT"):
            raise ValueError(
                f"path: {path} has an adapter of type {shown(found.get('peft_type'))}, expected the released code's "
                "'GENFT' or 'WeGeFT'; load genft adapters with PeftModel.from_pretrained"
            )
        weights = path / "adapter_model.safetensors"
        if weights.is_file():
            saved = load_file(weights)
        else:
            saved = torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True)
        return Checkpoint({**found, **settings}, saved, in_peft_format=True)
    file = path
    if path.is_dir():
        file = next((path / name for name in _TORCH_FILES if (path / name).is_file()), path)
    if not file.is_file():
        raise ValueError(
            f"path: {path} has neither adapter_config.json nor {' nor '.join(_TORCH_FILES)}, expected a released "
            "checkpoint"
        )
    with torch.serialization.safe_globals([argparse.Namespace]):  # plain values with names: a script's options
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"path: {file} contains {shown(content)}, expected tensors with names")
    options = content.get("args")
    found = {**(vars(options) if isinstance(options, argparse.Namespace) else {}), **_options_beside(file)}
    tensors: Any = content.get("state_dict", content.get("model", content))
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"path: {file} contains {shown(tensors)}, expected tensors with names")
    return Checkpoint({**found, **settings}, tensors, in_peft_format=False)


def _options_beside(file: Path) -> dict[str, Any]:
    """What a script has written of its options beside a torch file."""
    found: Any = {}
    if (file.parent / "args.yaml").is_file():
        import yaml  # a dependency of transformers

        found = yaml.safe_load((file.parent / "args.yaml").read_text()) or {}
    elif (file.parent / "config" / "config.json").is_file():
        found = read_fields(file.parent / "config" / "config.json")
    if not isinstance(found, dict):
        raise ValueError(f"path: the options beside {file} are {shown(found)}, expected names with values")
    return found


def _fill(model: PeftModel, adapter_name: str, plan: Plan) -> None:
    """Copy the tensors into the adapter, after checking that they match one to one."""
    base = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, FusedGenLinear)}
    if transposed := [name for name, layer in layers.items() if layer.transposed]:
        raise ValueError(f"path: {transposed} are Conv1D, whose transposed weights the released code does not handle")
    copies = plan.pieces(base, layers, adapter_name)

    others = {PREFIX + key: tensor for key, tensor in plan.others.items()}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    saved = {key: tensor for key, tensor in state.items() if "genft_" not in key}
    refuse_differences(others, saved)

    pieces = [*copies, *((key, saved[key], tensor) for key, tensor in others.items())]
    refuse_shapes(pieces)
    with torch.no_grad():
        for _, parameter, tensor in pieces:
            parameter.copy_(tensor)
