"""Saving and loading of adapters with stock peft, made safe: whole files only, and nothing that does not fit."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import Tensor, nn

from genft_kernels.sharded import is_sharded
from genft_modules.card import write_card
from genft_modules.files import CONFIG, PREFIX, WEIGHTS, refuse_misfits, replaced_adapter, some, whole_adapter
from genft_modules.methods.base import GeneratorConfig
from genft_modules.model.distributed import adapter_keys, barrier, gathered_adapter, rank, several, unwrapped


def save_adapter(model: PeftModel, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Saves an adapter as `model.save_pretrained` does, but so that the directory holds a whole adapter at any time.

    The files are those of peft. They are written beside, brought to the disk, and put in place one after the other:
    a process that dies on the way leaves the former adapter or the new one, see `genft_modules.files`. Whatever the
    adapter is called, its files are in `directory` itself. README.md names the method, the base model and what loading
    needs; one that is there already keeps its text, see `genft_modules.card`.

    Where torch.distributed runs, every process calls this: what is sharded is gathered, of the adapter alone, and the
    first process writes the file that a single one would write. `model` may be in DistributedDataParallel.

    Args:
        model: with the adapter.
        directory: for adapter_config.json and adapter_model.safetensors, which take the place of others of that name.
        adapter_name: which adapter.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: there is no such adapter, or `directory` is a file.
    """
    model = _with_adapter(model, adapter_name)
    state = gathered_adapter(model, adapter_name) if several() else None
    if rank() == 0:
        _write_adapter(model, Path(directory), adapter_name, state)
    barrier()


def _with_adapter(model: Any, adapter_name: str) -> PeftModel:
    model = unwrapped(model)
    if not isinstance(model, PeftModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a peft.PeftModel")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: got {adapter_name!r}, expected one of {list(model.peft_config)}")
    return model


def _write_adapter(model: PeftModel, directory: Path, adapter_name: str, state: dict[str, Tensor] | None) -> None:
    with replaced_adapter(directory) as partial:
        model.save_pretrained(str(partial), selected_adapters=[adapter_name], state_dict=state)
        if adapter_name != "default":  # peft gives it a folder
            for path in (partial / adapter_name).iterdir():
                os.replace(path, partial / path.name)
            (partial / adapter_name).rmdir()
        write_card(partial, former=directory)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """The model with a saved adapter, by `PeftModel.from_pretrained`, or `load_adapter` where it is a `PeftModel`; but
    the adapter is refused before the model is touched, unless its files are whole and fit the model in every tensor.

    Args:
        model: the base model, or a `PeftModel` to put one more adapter into.
        directory: with adapter_config.json and adapter_model.safetensors, of a method of genft or of stock peft.
        adapter_name: what to call the adapter.
        is_trainable: whether it is for more training; else it is frozen and the model in eval mode.
        kwargs: further arguments for peft.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    with whole_adapter(Path(directory)) as place:
        _checked(model, place, adapter_name)
        options = {"adapter_name": adapter_name, "is_trainable": is_trainable, **kwargs}
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, str(place), **options)
        try:
            model.load_adapter(str(place), **options)
        except Exception:
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            raise
        return model


def restore_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Fills an adapter that the model has already, and that may be sharded, from a saved one.

    Args:
        model: a `PeftModel`, under `fully_shard`, tensor parallelism, in DistributedDataParallel, or none of them.
        directory: of an adapter of the same configuration; every process reads it.
        adapter_name: which adapter to fill.

    Raises:
        TypeError: `model` is no `PeftModel`.
        ValueError: there is no such adapter, or naming the file and what is wrong with it. Nothing was changed.
    """
    model, directory = _with_adapter(model, adapter_name), Path(directory)
    read_config(directory)
    state = model.state_dict()
    ours = {key: state[name] for key, name in adapter_keys(model, adapter_name).items()}
    saved = load_file(directory / WEIGHTS)
    refuse_misfits(str(directory / WEIGHTS), saved, ours, {})
    with torch.no_grad():
        for key, tensor in ours.items():
            value = saved[key].to(tensor.device, tensor.dtype)
            if is_sharded(tensor):
                from torch.distributed.tensor import distribute_tensor

                sharded = cast(Any, tensor)
                value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
            tensor.copy_(value)


def check_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> PeftConfig:
    """The configuration of a saved adapter that `model` can load, which is left alone: the adapter is put for trial
    into a copy of the model that has no weights, and its tensors are compared with those of the file.

    `load_adapter` does this by itself. It is for transformers' `model.load_adapter`, which gives none of our classes a
    chance to look at the file before the model has the adapter.

    Args:
        model: the base model, or a `PeftModel`.
        directory: with adapter_config.json and adapter_model.safetensors.
        adapter_name: what the adapter would be called.

    Raises:
        ValueError: naming the file and what is wrong with it: not there, torn, a pickle, of an unknown method, tensors
            missing, unknown, or of another shape or kind.
    """
    with whole_adapter(Path(directory)) as place:
        return _checked(model, place, adapter_name)


def _checked(model: nn.Module, directory: Path, adapter_name: str) -> PeftConfig:
    config = _config_in(directory)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name in getattr(base, "peft_config", {}):
        raise ValueError(f"adapter_name: {adapter_name!r} is in the model already, expected a new name")
    saved = load_file(directory / WEIGHTS)
    if not isinstance(config, GeneratorConfig):
        _check_stock(base, directory, config, saved)
        return config
    found = {_in_model(key): tensor for key, tensor in saved.items()}
    trial = _without_weights(base)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # they come again when the adapter is loaded
        try:
            inject_adapter_in_model(copy.deepcopy(config), trial, adapter_name)
        except Exception as error:  # peft, transformers and torch have their own kinds
            raise ValueError(f"{directory / CONFIG}: does not fit the model: {error}") from error
        wanted = get_peft_model_state_dict(trial, adapter_name=adapter_name, save_embedding_layers=False)
        refuse_misfits(str(directory / WEIGHTS), found, wanted, trial.state_dict())
        try:
            set_peft_model_state_dict(trial, found, adapter_name, low_cpu_mem_usage=True)
        except RuntimeError as error:  # what a method says of its values
            raise ValueError(f"{directory / WEIGHTS}: {' '.join(str(error).split())}") from None
    return config


def _in_model(key: str) -> str:
    """The name in the base model of what a checkpoint calls `key`; a name that no model has, if that is not peft's."""
    return key[len(PREFIX) :] if key.startswith(PREFIX) else f"{key} (without {PREFIX!r})"


def _check_stock(base: nn.Module, directory: Path, config: PeftConfig, saved: dict[str, Tensor]) -> None:
    """Raises ValueError unless an adapter of one of peft's own methods fits: peft itself would load what it knows and
    take no notice of the rest. What peft renames is renamed; a method that does not work on tensors without memory, or
    that is not put into layers, is left to peft."""
    if config.is_prompt_learning or str(config.peft_type.value) == "XLORA":
        return
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # others are made from W0
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            trial = get_peft_model(cast(Any, _without_weights(base)), config, "trial")
        except (NotImplementedError, RuntimeError):
            return
        except Exception as error:
            raise ValueError(f"{directory / CONFIG}: does not fit the model: {error}") from error
        wanted = get_peft_model_state_dict(trial, adapter_name="trial", save_embedding_layers=False)
        try:
            result = set_peft_model_state_dict(trial, saved, "trial", low_cpu_mem_usage=True)
        except Exception as error:  # a shape, or a key that peft did not expect
            raise ValueError(f"{directory / WEIGHTS}: does not fit the model: {' '.join(str(error).split())}") from None
    missing, unknown = (
        [key.replace(".trial", "") for key in keys] for keys in (result.missing_keys, result.unexpected_keys)
    )
    complaints = [
        f"{title}: {some(keys)}"
        for title, keys in (("missing", [key for key in missing if key in wanted]), ("unknown", unknown))
        if keys
    ]
    if complaints:
        raise ValueError(f"{directory / WEIGHTS}: does not fit the model: {'; '.join(complaints)}")


def read_config(directory: Path) -> PeftConfig:
    """The configuration of a saved adapter whose files are whole. Raises ValueError, naming the file."""
    with whole_adapter(directory) as place:
        return _config_in(place)


def _config_in(directory: Path) -> PeftConfig:
    path = directory / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    method = str(fields.get("peft_type")) if isinstance(fields, dict) else None
    if method == "GENFT":
        raise ValueError(f"{path}: is of the released GenFT code, expected one of genft; see load_released_genft")
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{path}: peft_type is {method!r}, which neither genft nor this version of peft knows")
    try:
        return cast(PeftConfig, PEFT_TYPE_TO_CONFIG_MAPPING[method].from_pretrained(str(directory)))
    except Exception as error:  # of a field that is missing, too many, or of the wrong type: peft has no one kind
        raise ValueError(f"{path}: {error}") from None


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    for module in model.modules():
        for value in vars(module).values():
            # the former's hooks may hold weights that are elsewhere, the latter's states the quantised ones
            if type(value).__module__.startswith(("accelerate.", "bitsandbytes.")):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)
