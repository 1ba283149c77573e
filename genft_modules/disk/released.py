"""Loading of adapters saved by the methods' released code or by peft."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from genft_modules.files import PREFIX
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.base import GeneratorConfig, module_type, read_fields
from genft_modules.methods.checks import shown
from genft_modules.methods.genft import GenFTConfig, GenFTFactors
from genft_modules.methods.peanut import PeanutConfig
from genft_modules.model.tuner import SHARED

_INDIVIDUAL = re.compile(r"(?:base_model\.model\.)?(.+)\.genft_individual_weight_([ab])")
_SHARED = re.compile(r"(?:.+\.)?genft_share_([12])_([ab])\.linear\.(weight|bias)")
_FIELDS = ("generator_share_dim", "individual_features", "ratio_W0", "inner_activation", "outer_activation", "scaling")
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_PEANUT = re.compile(r"\.genft_generators\.(A|B|encoders|decoders)(\.\d+)?$")
_PROJECTIONS = (["qkv"], ["q_proj", "v_proj"], ["query", "value"])


def load_released_genft(
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
    """Load an adapter saved by the released GenFT code. The model's outputs are the same as there.

    Two kinds of checkpoint are supported:

    - transformers models: a peft directory with adapter_config.json and adapter_model.safetensors (or .bin), with keys
      like `base_model.model.<layer>.genft_individual_weight_a` and `<...>.generator.genft_share_1_a.linear.weight`,
      the latter possibly repeated for every layer.
    - ViT: a torch file, loaded with weights_only, and args.yaml next to it (best_model.pt if `path` is a directory),
      with keys `blocks.<i>.attn.genft_individual_weight_a` and `<...>.gen.genft_share_1_a.linear.weight`. Block i is
      the model's i-th attention, whatever its name: a fused qkv weight, or q and v projections.

    All other tensors, such as a head, are loaded into the module of that name, which is saved with the adapter.

    Args:
        model: the pretrained base model without adapters.
        path: the directory, or the torch file of a ViT.
        adapter_name: name for the adapter.
        target_modules: ViT only: the name of the fused qkv weights, or the names of the q and v projections. None
            detects "qkv", "q_proj" and "v_proj", or "query" and "value".
        rename: module names in the checkpoint → in the model, such as {"head": "classifier"}.
        settings: override or complete adapter_config.json or args.yaml.
        backend: "auto", "triton" or "reference".
        is_trainable: whether to train the adapter further; else it is frozen and the model is in eval mode.

    Raises:
        ValueError: a key, setting or layer has no counterpart, or a shape does not match. The model's layers are
            restored.
        pickle.UnpicklingError: the torch file contains more than tensors and plain values.

    Source: keys, settings and file names as in the released code (github.com/xuguangning1218/GenFT, 2026).
    """
    path = Path(path)
    released = _read(path, settings or {})
    for old, new in (rename or {}).items():
        released.others = {re.sub(rf"^{re.escape(old)}(?=\.)", new, key): t for key, t in released.others.items()}
    config = _vit_config(released, model, target_modules) if released.is_vit else _peft_config(released)
    return _loaded(
        model, config, adapter_name, backend, is_trainable, lambda adapted: _fill(adapted, adapter_name, released)
    )


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
    theirs = PeftConfig.from_pretrained(str(path))
    if not isinstance(theirs, peft.PeanutConfig):
        hint = "; load genft adapters with PeftModel.from_pretrained" * isinstance(theirs, GeneratorConfig)
        raise ValueError(f"path: {path} has an adapter of type {theirs.peft_type}, expected peft's own PEANUT{hint}")
    known, usual = {each.name for each in fields(PeanutConfig)} - {"peft_type"}, type(theirs)()
    settings = {each.name: getattr(theirs, each.name) for each in fields(theirs) if each.name != "peft_type"}
    strange = {name: value for name, value in settings.items() if name not in known and value != getattr(usual, name)}
    if strange:
        raise ValueError(f"path: got unknown settings {strange}, expected those of PEANuT in peft 0.21")
    tensors = load_peft_weights(str(path), device="cpu")

    def fill(adapted: PeftModel) -> None:
        state = get_peft_model_state_dict(adapted, adapter_name=adapter_name)
        ours = {_PEANUT.sub(r".peanut_\1\2.weight", key): key for key in state}
        _same(tensors, ours, "{}")
        _check_shapes((key, state[ours[key]], tensor) for key, tensor in tensors.items())
        set_peft_model_state_dict(adapted, {ours[key]: tensor for key, tensor in tensors.items()}, adapter_name)

    config = PeanutConfig(**{name: value for name, value in settings.items() if name in known})
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


@dataclass
class _Released:
    """The parts of a checkpoint: specific pairs by layer (or block), shared factors by our names, and other tensors."""

    settings: dict[str, Any]
    is_vit: bool
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


def _read(path: Path, settings: dict[str, Any]) -> _Released:
    if (path / "adapter_config.json").is_file():
        found = read_fields(path / "adapter_config.json")
        if found.get("peft_type") != "GENFT":
            raise ValueError(
                f"path: {path} has an adapter of type {shown(found.get('peft_type'))}, expected the released code's "
                "'GENFT'; load genft adapters with PeftModel.from_pretrained"
            )
        weights = path / "adapter_model.safetensors"
        if weights.is_file():
            tensors = load_file(weights)
        else:
            tensors = torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True)
        return _sorted(tensors, _Released({**found, **settings}, is_vit=False))
    file = path / "best_model.pt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"path: {path} has neither adapter_config.json nor best_model.pt, expected a released checkpoint"
        )
    found = {}
    if (file.parent / "args.yaml").is_file():
        import yaml  # a dependency of transformers

        found = yaml.safe_load((file.parent / "args.yaml").read_text()) or {}
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    return _sorted(checkpoint.get("model", checkpoint), _Released({**found, **settings}, is_vit=True))


def _sorted(tensors: dict[str, Tensor], released: _Released) -> _Released:
    unknown, differing = [], []
    for key, tensor in tensors.items():
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
    fields = released.fields() | {name: settings.get(name) for name in _PLACES}
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


def _fill(model: PeftModel, adapter_name: str, released: _Released) -> None:
    """Copy the tensors into the adapter, after checking that they match one to one."""
    base = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, FusedGenLinear)}
    if transposed := [name for name, layer in layers.items() if layer.transposed]:
        raise ValueError(f"path: {transposed} are Conv1D, whose transposed weights the released code does not handle")
    container = getattr(base, SHARED).genft_shared[adapter_name]
    generators = [module for module in container.values() if isinstance(module, GenFTFactors)]
    if len(generators) != 1:
        raise ValueError(f"path: adapted layers of {len(generators)} shapes, expected one, as there is one generator")
    copies = [(f"genft_share ({name})", p, released.shared[name]) for name, p in generators[0].named_parameters()]

    own = {name: layer.adapter_parameters(adapter_name) for name, layer in layers.items()}
    pairs = _pairs_of_layers(released.pairs, list(layers)) if released.is_vit else released.pairs
    _same(pairs, (name for name in layers if "specific_a" in own[name]), "{}.genft_individual_weight_a and _b")
    for name, pair in pairs.items():
        for side, tensor in pair.items():
            copies.append((f"{name}.genft_individual_weight_{side}", own[name][f"specific_{side}"], tensor))

    others = {PREFIX + key: tensor for key, tensor in released.others.items()}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    saved = {key: tensor for key, tensor in state.items() if "genft_" not in key}
    _same(others, saved, "{}")

    pieces = [*copies, *((key, saved[key], tensor) for key, tensor in others.items())]
    _check_shapes(pieces)
    with torch.no_grad():
        for _, parameter, tensor in copies:
            parameter.copy_(tensor)
    set_peft_model_state_dict(model, others, adapter_name)


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


def _same(found: Iterable[str], expected: Iterable[str], key: str) -> None:
    found, expected = set(found), set(expected)
    if found != expected:
        unmapped = sorted(key.format(name) for name in found - expected)
        missing = sorted(key.format(name) for name in expected - found)
        raise ValueError(
            "path: the checkpoint does not match the model; "
            + "; ".join(f"{what}: {names}" for what, names in (("unknown", unmapped), ("missing", missing)) if names)
        )


def _check_shapes(pieces: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Raise ValueError for mismatched shapes. Pieces: key, ours, theirs."""
    if wrong := [
        f"{key}: got {tuple(t.shape)}, expected {tuple(p.shape)}" for key, p, t in pieces if p.shape != t.shape
    ]:
        raise ValueError(f"path: shape mismatch: {', '.join(wrong)}")


def _natural(name: str) -> list[Any]:
    """A sort key with blocks.10 after blocks.9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
