"""Another adapter in the place of one that is in a model: same tensors, same addresses, same graph.

A compiled model has the shapes of an adapter's tensors and the scale of ΔW in its graph. Both stay as they are: the
tensors of the new adapter are padded with zeros to the ranks of the former one, and the ratio of the scales is
multiplied into a factor in which ΔW is linear. What the model then holds, with the configuration that it had, is the
new adapter: it is saved, merged and exported like any other.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils import hotswap as of_peft
from torch import Tensor, nn

from genft_modules.disk.adapters import (
    base_of,
    injected,
    overwrite,
    read_adapter,
    trial_with,
    whole,
    with_adapter,
)
from genft_modules.files import CONFIG, WEIGHTS, refuse_misfits, some
from genft_modules.layer.adapted import AdaptedLayer
from genft_modules.methods.base import Generator, GeneratorConfig, Holder
from genft_modules.methods.checks import check_choice, check_rank, shown
from genft_modules.model.distributed import adapter_keys, unwrapped
from genft_modules.model.tuner import adapted_layers

# Fields of every configuration in which adapters that replace each other may differ. Which layers they adapt is seen in
# the model.
FREE = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Replace the values of an adapter by those of a saved one, in place: peft's function of this name, in
    `peft.utils.hotswap`, for every method of genft. For peft's own LoRA it calls that function.

    No tensor moves or changes its shape, so a compiled model is not compiled again, and the CUDA graphs that
    `torch.compile` made stay valid. ΔW is that of the saved adapter. The model keeps its configuration: what
    `save_adapter` then writes has the ranks and the scale that the model had, and the new ΔW.

    Ranks may be lower than those in the model (see `prepare_model_for_compiled_hotswap`), and the scale, the
    initialisation and what concerns training may differ; a dropout remains the model's. All other fields must be equal.
    The saved adapter may lack layers, for which ΔW becomes 0, unless they share factors with those that it has. Modules
    of `modules_to_save` and trained biases are replaced, too. If anything does not fit, nothing is changed.

    Args:
        model: a `PeftModel`, or a module with injected adapters, compiled or not.
        model_name_or_path: directory of a saved adapter, or its name on the Hub.
        adapter_name: the adapter in the model, which keeps this name.
        torch_device: where the file is loaded before it is copied; None for the CPU.
        kwargs: as in peft: `subfolder`; and for the Hub `revision`, `token`, `cache_dir` and other arguments of
            `huggingface_hub.snapshot_download`.

    Raises:
        TypeError: `model` has no adapters.
        ValueError: the adapter does not exist, is merged or sharded by FSDP; or the saved one is invalid, or differs in
            a field that is part of the graph. The message names the field and what fits.
    """
    inner = with_adapter(model, adapter_name)
    config = inner.peft_config[adapter_name]
    if not isinstance(config, GeneratorConfig):
        of_peft.hotswap_adapter(model, str(model_name_or_path), adapter_name, cast(Any, torch_device), **kwargs)
        return
    base = base_of(inner)
    layers = _layers(inner, adapter_name)
    with whole(_local(model_name_or_path, **kwargs)) as place:
        other, saved = read_adapter(base, place, torch_device or "cpu")
        _refuse_differences(config, other)
        trial = trial_with(base, cast(GeneratorConfig, other), saved, adapter_name, place)
        names = adapter_keys(trial, adapter_name)  # peft has moved what it loaded to the meta device
        trial.load_state_dict({names[key]: saved[key] for key in names}, strict=False, assign=True)
        theirs = _leaves(adapted_layers(trial, adapter_name), adapter_name)
        pairs = _pairs(_leaves(layers, adapter_name), theirs, config)
        copies = [copy for pair in pairs for copy in pair.copies()]
        copies += _whole_modules(inner, config, adapter_name, saved, place)
    for tensor, value in copies:
        overwrite(tensor, value)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | Mapping[str, int] | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Pad the adapters in a model with zeros to a higher rank, so that `hotswap_adapter` can later put adapters of up
    to that rank in their place: peft's function of this name for every method of genft. For peft's own LoRA it calls
    that function. Call it after the first adapter is loaded, before the model is compiled.

    ΔW stays the same: where the scale is α/r, what the new rank takes from it is multiplied into a factor. All layers
    get the same rank, and the configurations in the model say so. Scales need no preparation. The adapters get new
    parameters: create an optimizer afterwards.

    Args:
        model: a `PeftModel`, or a module with injected adapters.
        target_rank: the highest rank among the adapters that will be swapped in. For a method with two ranks, such as
            GenFT, one number for both, or {"generator_share_dim": 32, "individual_features": 5}. None: unchanged.
        config: further configurations to be given the new ranks; those in the model always are.
        check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model is compiled, has no adapters, or one that is merged, sharded, of a higher rank, or of a
            kind whose ΔW padding would change, such as GIFT's blocks with LayerNorm. Nothing is changed.
    """
    inner: Any = unwrapped(model)
    own = {n: one for n, one in getattr(inner, "peft_config", {}).items() if isinstance(one, GeneratorConfig)}
    if not own:
        of_peft.prepare_model_for_compiled_hotswap(
            model, target_rank=cast(Any, target_rank), config=cast(Any, config), check_compiled=check_compiled
        )
        return
    _check_compiled(model, check_compiled)
    more = [] if config is None else list(config.values()) if isinstance(config, Mapping) else [config]
    for one in more:
        if not isinstance(one, GeneratorConfig):
            raise TypeError(f"config: got {type(one).__name__}, expected a configuration of genft as in the model")
    if target_rank is None:
        return
    changes = [(one, one.widened(_ranks(one, target_rank))) for one in (*own.values(), *cast(Any, more))]
    padded = [_Padded.of(inner, name, wide) for name, (_, wide) in zip(own, changes, strict=False)]
    for adapter in padded:
        adapter.install()
    for one, wide in changes:
        vars(one).update(vars(wide))


@dataclass
class _Pair:
    """A holder of tensors and the one whose place it takes; `theirs` is None if ΔW is to be 0."""

    layer: str
    mine: Holder
    theirs: Holder | None
    gain: float

    def values(self) -> dict[str, Tensor]:
        try:
            return self.mine.values_for(self.theirs, self.gain)
        except ValueError as error:
            raise ValueError(f"{self.layer}: {error}") from None

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors in the model and their values."""
        tensors = {**dict(self.mine.named_parameters()), **dict(self.mine.named_buffers())}
        return [(tensors[name], value) for name, value in self.values().items()]


def _pairs(mine: dict[str, Generator], theirs: dict[str, Generator], config: GeneratorConfig) -> list[_Pair]:
    """The holders of the updates `mine`, each once, with those of `theirs`. Raises ValueError unless `mine` can be as
    `theirs`."""
    if added := [name for name in theirs if name not in mine]:
        raise ValueError(f"target_modules: the adapter has {some(added)}, expected only layers adapted in the model")
    found: dict[int, _Pair] = {}
    for name, generator in mine.items():
        other = theirs.get(name)
        gain = 1.0 if other is None or other.scale == generator.scale else _ratio(name, other.scale, generator.scale)
        holders, others = generator.holders(), {} if other is None else other.holders()
        if larger := others.keys() - holders.keys():
            raise ValueError(f"{_fields(config)}: {name} has {some(larger)}, which the model has no room for")
        for part, holder in holders.items():
            pair = _Pair(name, holder, others.get(part), gain)
            _refuse_rank(pair, config)
            _refuse_sharing(found.setdefault(id(holder), pair), pair, config)
    return list(found.values())


def _ratio(name: str, wanted: float, scale: float) -> float:
    if not scale:
        raise ValueError(f"{name}: its scale in the model is 0, which no factor makes {wanted:g}")
    return wanted / scale


def _refuse_rank(pair: _Pair, config: GeneratorConfig) -> None:
    """Raises ValueError if the tensors do not fit into those of the model."""
    rooms = pair.mine.held()
    for name, tensor in ({} if pair.theirs is None else pair.theirs.held()).items():
        if any(size > room for size, room in zip(tensor.shape, rooms[name].shape, strict=True)):
            raise ValueError(
                f"{_fields(config)}: {pair.layer} has {name} {list(tensor.shape)}, expected at most "
                f"{list(rooms[name].shape)} as in the model; see prepare_model_for_compiled_hotswap"
            )


def _refuse_sharing(first: _Pair, pair: _Pair, config: GeneratorConfig) -> None:
    """Raises ValueError if layers that share a holder would need different values of it."""
    both = f"{first.layer} and {pair.layer} share factors"
    if first.theirs is not pair.theirs:
        if first.theirs is None or pair.theirs is None:
            lacking, present = sorted((first, pair), key=lambda one: one.theirs is not None)
            raise ValueError(
                f"target_modules: the adapter has {present.layer} and not {lacking.layer}, which share factors; "
                "expected both or none"
            )
        raise ValueError(f"{_fields(config)}: {both} if their ranks are equal, but not in the adapter")
    if pair.theirs is not None and not math.isclose(first.gain, pair.gain, rel_tol=1e-12):
        raise ValueError(f"{', '.join(config.free)}: {both}, expected scales in the same proportion as in the model")


def _leaves(layers: dict[str, AdaptedLayer], adapter_name: str) -> dict[str, Generator]:
    """The generators of single updates by the names of their layers and of their parts."""
    return {
        f"{name}.{part}".rstrip("."): leaf
        for name, layer in layers.items()
        for part, leaf in cast(Generator, layer.genft_generators[adapter_name]).leaves().items()
    }


def _layers(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers with the adapter, by their names in the base model. Raises ValueError if the adapter is merged or its
    parameters are FSDP's."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in model.modules()):
        raise ValueError("model: its parameters are sharded by FSDP, expected a model without it; see restore_adapter")
    layers = adapted_layers(base_of(model), adapter_name)
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(f"adapter_name: {adapter_name!r} is merged into {some(merged)}; call unmerge_adapter() first")
    return layers


def _refuse_differences(mine: GeneratorConfig, other: PeftConfig) -> None:
    """Raises ValueError if the configurations differ in a field that is part of the graph."""
    if type(other) is not type(mine):
        raise ValueError(f"peft_type: got {other.peft_type}, expected {mine.peft_type} as in the model")
    may_differ = {*FREE, *mine.free, *mine.ranks, *mine.ranks.values()}
    theirs = other.to_dict()
    for field, value in mine.to_dict().items():
        if field not in may_differ and _comparable(value) != _comparable(theirs.get(field)):
            raise ValueError(f"{field}: got {shown(theirs.get(field))}, expected {shown(value)} as in the model")
    if reason := mine.refuses_padding():
        for field in mine.ranks:
            if theirs[field] != getattr(mine, field):
                raise ValueError(f"{field}: got {theirs[field]}, expected {getattr(mine, field)}, because {reason}")


def _comparable(value: Any) -> str:
    """A field's value as text; the order of names does not matter."""
    if isinstance(value, (list, tuple, set)) and all(isinstance(one, str) for one in value):
        value = sorted(set(value))
    return json.dumps(value, sort_keys=True)


def _whole_modules(
    model: nn.Module, config: GeneratorConfig, adapter_name: str, saved: dict[str, Tensor], place: Path
) -> list[tuple[Tensor, Tensor]]:
    """The tensors in the model, and their values, of what the adapter has beside ΔW: modules_to_save and biases."""
    found = {key: tensor for key, tensor in saved.items() if not _of_update(key)}
    if not found and config.bias == "none" and not config.modules_to_save:
        return []
    state = model.state_dict()
    names = {key: name for key, name in adapter_keys(model, adapter_name).items() if not _of_update(key)}
    refuse_misfits(str(place / WEIGHTS), found, {key: state[name] for key, name in names.items()}, {})
    return [(state[name], found[key]) for key, name in names.items()]


def _of_update(key: str) -> bool:
    return any(f".{container}." in key for container in AdaptedLayer.adapter_layer_names)


def _local(name: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> Path:
    """The directory of an adapter, downloaded if there is none of this name."""
    if not os.path.isdir(name):
        prefix = f"{subfolder}/" if subfolder else ""
        name = snapshot_download(str(name), allow_patterns=[f"{prefix}{CONFIG}", f"{prefix}{WEIGHTS}"], **kwargs)
    return Path(name, subfolder or "")


def _fields(config: GeneratorConfig) -> str:
    """The fields with ranks."""
    return ", ".join(field for field in (*config.ranks, *config.ranks.values()) if field)


def _ranks(config: GeneratorConfig, target: int | Mapping[str, int]) -> dict[str, int]:
    """Field of the configuration → its new rank."""
    ranks = dict(target) if isinstance(target, Mapping) else dict.fromkeys(config.ranks, target)
    for field, rank in ranks.items():
        check_choice("target_rank", field, tuple(config.ranks))
        check_rank("target_rank", rank)
    return ranks


def _check_compiled(model: nn.Module, check: str) -> None:
    check_choice("check_compiled", check, ("error", "warn", "ignore"))
    compiled = any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in model.modules()
    )
    told = "prepare_model_for_compiled_hotswap: the model is compiled already, expected one before torch.compile"
    if compiled and check == "error":
        raise ValueError(told)
    if compiled and check == "warn":
        warnings.warn(f"{told}: it will be compiled again", stacklevel=3)


@dataclass
class _Padded:
    """An adapter with higher ranks, not yet in the model."""

    name: str
    layers: dict[str, AdaptedLayer]  # of the model
    trial: dict[str, AdaptedLayer]  # of its copy, with the new generators

    @classmethod
    def of(cls, model: nn.Module, name: str, config: GeneratorConfig) -> _Padded:
        layers = _layers(model, name)
        trial = adapted_layers(injected(base_of(model), config, name), name)
        former = _leaves(layers, name)
        wide = {one: leaf for one, leaf in _leaves(trial, name).items() if one in former}
        for pair in _pairs(wide, former, config):
            held = [] if pair.theirs is None else [*pair.theirs.held().values()]
            like = [*held, *former[pair.layer].adapter_parameters().values()][0]
            values = {
                key: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
                for key, value in pair.values().items()
            }
            pair.mine.load_state_dict(values, strict=False, assign=True)
            pair.mine.requires_grad_(like.requires_grad)
        return cls(name, layers, trial)

    def install(self) -> None:
        """Put the generators into the model, in the place of the former ones."""
        for name, layer in self.layers.items():
            wide = cast(Generator, self.trial[name].genft_generators[self.name])
            layer.genft_generators[self.name] = wide
            if wide.shared:
                layer.genft_shared[self.name] = nn.ModuleList(wide.shared)
                factors = self.trial[name].containers[self.name].genft_shared[self.name]
                layer.containers[self.name].genft_shared[self.name] = factors.train(layer.training)
