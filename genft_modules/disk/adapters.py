"""Safe saving and loading of adapters in peft's format: atomic writes, and checks before the model is changed."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast, overload

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genft_kernels.sharded import is_sharded
from genft_modules.card import write_card
from genft_modules.files import CONFIG, PREFIX, WEIGHTS, refuse_misfits, replaced_adapter, some, whole_adapter
from genft_modules.methods.base import GeneratorConfig, check_peft_fields, read_fields, refusing
from genft_modules.methods.checks import is_finite, one_line, shown
from genft_modules.methods.patterns import check_matching
from genft_modules.model.distributed import adapter_keys, barrier, gathered_adapter, rank, several, unwrapped


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter like `model.save_pretrained`, but atomically.

    The files are written to a temporary directory, synced to disk and then renamed: if the process dies, the directory
    contains the previous or the new adapter, see `genft_modules.files`. The files are always in `directory` itself,
    whatever the adapter's name. README.md names the method, the base model and what loading needs; an existing one
    keeps its text, see `genft_modules.card`.

    With torch.distributed, every rank must call this: sharded adapter tensors are gathered, and rank 0 writes the same
    files as a single process. `model` may be wrapped in DistributedDataParallel.

    Args:
        model: a `PeftModel`, or a module into which the adapter was injected, by `peft.inject_adapter_in_model` or the
            `add_adapter` of transformers or diffusers. The files are the same.
        directory: for adapter_config.json and adapter_model.safetensors, which are replaced if they exist.
        adapter_name: name of the adapter.

    Raises:
        TypeError: `model` has no adapters.
        ValueError: the adapter does not exist, or `directory` is a file.
        OSError: something cannot be written; names the directory and the reason. What was there is unchanged.
    """
    model = with_adapter(model, adapter_name)
    state = gathered_adapter(model, adapter_name) if several() else None
    if rank() == 0:
        _write_adapter(model, Path(directory), adapter_name, state)
    barrier()


def with_adapter(model: Any, adapter_name: str) -> Any:
    """The model without wrappers. Raises TypeError if it has no adapters, ValueError if it has none of that name."""
    model = unwrapped(model)
    if not hasattr(model, "peft_config"):
        raise TypeError(f"model: got {type(model).__name__}, expected a module with adapters, such as a peft.PeftModel")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: got {adapter_name!r}, expected one of {list(model.peft_config)}")
    return model


def _write_adapter(model: nn.Module, directory: Path, adapter_name: str, state: dict[str, Tensor] | None) -> None:
    with replaced_adapter(directory) as partial:
        if isinstance(model, PeftModel):
            model.save_pretrained(str(partial), selected_adapters=[adapter_name], state_dict=state)
        else:
            _write_injected(model, partial, adapter_name, state)
        if isinstance(model, PeftModel) and adapter_name != "default":  # peft uses a subdirectory
            for path in (partial / adapter_name).iterdir():
                os.replace(path, partial / path.name)
            (partial / adapter_name).rmdir()
        write_card(partial, former=directory)


def _write_injected(model: Any, directory: Path, adapter_name: str, state: dict[str, Tensor] | None) -> None:
    """As `PeftModel.save_pretrained`, for a module that is not in a `PeftModel`."""
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name)
    # copies, because safetensors stores no tensor under two names
    whole = {PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(whole, directory / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[adapter_name])
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or model.__dict__.get("name_or_path") or None
    kind = type(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=None if config.task_type else mapping)


@overload
def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    in_place: Literal[False] = False,
    **kwargs: Any,
) -> PeftModel: ...


@overload
def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    in_place: Literal[True],
) -> nn.Module: ...


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    in_place: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Load a saved adapter with `PeftModel.from_pretrained`, or `load_adapter` for a `PeftModel`. Before the model is
    changed, checks that the files are valid and match the model in every tensor.

    Args:
        model: the base model, or a `PeftModel` to add the adapter to.
        directory: adapter directory, with adapter_config.json and adapter_model.safetensors, of genft or peft.
        adapter_name: name for the adapter.
        is_trainable: whether to train the adapter further; else it is frozen and the model is in eval mode.
        in_place: inject the adapter into `model` itself instead of a `PeftModel` around it, and make it the active one,
            as the `add_adapter` of transformers and diffusers does. So a pipeline keeps its own model. Needed for a
            module that has injected adapters already.
        kwargs: other arguments for peft; none with `in_place`.

    Returns:
        A `PeftModel`; with `in_place`, `model`.

    Raises:
        TypeError: `model` or `kwargs` do not go with `in_place`.
        ValueError: the adapter is invalid; the message names the file and the problem.
    """
    wrapped = isinstance(model, PeftModel)
    if in_place and wrapped:
        raise TypeError("in_place: got True for a PeftModel, expected False")
    if not in_place and not wrapped and hasattr(model, "peft_config"):
        raise TypeError("in_place: got False for a module with injected adapters, expected True")
    if in_place and kwargs:
        raise TypeError(f"kwargs: got {list(kwargs)}, expected none with in_place=True")
    with whole(directory) as place:
        config = _checked(model, place, adapter_name)
        if in_place:
            _inject(model, place, config, adapter_name, is_trainable)
            return model
        options = {"adapter_name": adapter_name, "is_trainable": is_trainable, **kwargs}
        if not isinstance(model, PeftModel):
            return cast(nn.Module, PeftModel.from_pretrained(model, str(place), **options))
        try:
            model.load_adapter(str(place), **options)
        except Exception:
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            raise
        return cast(nn.Module, model)


def _inject(model: Any, place: Path, config: PeftConfig, adapter_name: str, is_trainable: bool) -> None:
    if hasattr(model, "_hf_peft_config_loaded"):  # of transformers or diffusers, whose own functions keep account of it
        model.add_adapter(config, adapter_name=adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)
    saved = {_in_model(key): tensor for key, tensor in load_file(place / WEIGHTS).items()}
    set_peft_model_state_dict(model, saved, adapter_name)
    if not is_trainable:
        state = dict(model.named_parameters())
        for name in adapter_keys(model, adapter_name).values():
            if name in state:  # a buffer is not
                state[name].requires_grad_(False)
        model.eval()


def restore_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Load saved values into an existing, possibly sharded adapter.

    Args:
        model: a `PeftModel` or a module with an injected adapter, with or without `fully_shard`, tensor parallelism or
            DistributedDataParallel.
        directory: directory of a saved adapter with the same configuration; every rank reads it.
        adapter_name: name of the adapter in the model.

    Raises:
        TypeError: `model` has no adapters.
        ValueError: the adapter does not exist, or the saved one is invalid; nothing is changed.
    """
    model, directory = with_adapter(model, adapter_name), Path(directory)
    read_config(directory)
    state = model.state_dict()
    ours = {key: state[name] for key, name in adapter_keys(model, adapter_name).items()}
    saved = load_file(directory / WEIGHTS)
    refuse_misfits(str(directory / WEIGHTS), saved, ours, {})
    for key, tensor in ours.items():
        overwrite(tensor, saved[key])


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into a tensor, which may be sharded."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded = cast(Any, tensor)
        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    tensor.copy_(value)


def check_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> PeftConfig:
    """Check that `model` can load a saved adapter, and return its configuration. The adapter is injected into a copy of
    the model on the meta device, and its tensors are compared with those of the file; `model` is not changed.

    `load_adapter` includes this check. Use it before transformers' `model.load_adapter`, which changes the model before
    the file can be checked.

    Args:
        model: the base model, or a `PeftModel`.
        directory: adapter directory, with adapter_config.json and adapter_model.safetensors.
        adapter_name: name for the adapter.

    Raises:
        ValueError: one line that names the file and the problem: missing, corrupt, a pickle, an unknown method, a
            field that does not fit or could take very long to match, or tensors that are missing, unknown, not finite,
            or of the wrong shape or dtype.
    """
    with whole(directory) as place:
        return _checked(model, place, adapter_name)


def _checked(model: nn.Module, directory: Path, adapter_name: str) -> PeftConfig:
    base = base_of(model)
    if adapter_name in getattr(base, "peft_config", {}):
        raise ValueError(f"adapter_name: {adapter_name!r} already exists in the model, expected a new name")
    config, saved = read_adapter(base, directory)
    if isinstance(config, GeneratorConfig):
        trial_with(base, config, saved, adapter_name, directory)
    else:
        _check_stock(base, directory, config, saved)
    return config


def base_of(model: nn.Module) -> nn.Module:
    """The model that has the adapted layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def read_adapter(
    base: nn.Module, directory: Path, device: str | torch.device = "cpu"
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """A saved adapter's configuration and tensors. Raises ValueError if they are invalid in any model, or if matching
    the names of this one could take very long."""
    config = _config_in(directory)
    with refusing(directory / CONFIG):
        check_matching(config, (name for name, _ in base.named_modules()))
    with refusing(directory / WEIGHTS):
        saved = load_file(directory / WEIGHTS, device=str(device))
        if broken := [key for key, tensor in saved.items() if not is_finite(tensor)]:
            raise ValueError(f"non-finite elements in {some(broken)}")
    return config, saved


def trial_with(
    base: nn.Module, config: GeneratorConfig, saved: dict[str, Tensor], adapter_name: str, directory: Path
) -> nn.Module:
    """A copy of the model on the meta device with the adapter in it. Raises ValueError if they do not match."""
    found = {_in_model(key): tensor for key, tensor in saved.items()}
    try:
        trial = injected(base, config, adapter_name)
    except Exception as error:  # peft, transformers and torch raise many types
        raise ValueError(one_line(f"{directory / CONFIG}: does not match the model: {error}")) from error
    with refusing(directory / WEIGHTS), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        wanted = get_peft_model_state_dict(trial, adapter_name=adapter_name, save_embedding_layers=False)
        refuse_misfits(str(directory / WEIGHTS), found, wanted, trial.state_dict())
        set_peft_model_state_dict(trial, found, adapter_name, low_cpu_mem_usage=True)
    return trial


def injected(base: nn.Module, config: GeneratorConfig, adapter_name: str) -> nn.Module:
    """A copy of the model on the meta device with a new adapter."""
    trial = without_weights(base)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # repeated when the adapter is loaded
        inject_adapter_in_model(copy.deepcopy(config), trial, adapter_name)
    return trial


def _in_model(key: str) -> str:
    """The name of a checkpoint's tensor in the base model; one that no model has if `key` lacks peft's prefix."""
    return key[len(PREFIX) :] if key.startswith(PREFIX) else f"{key} (without {PREFIX!r})"


def _check_stock(base: nn.Module, directory: Path, config: PeftConfig, saved: dict[str, Tensor]) -> None:
    """Raises ValueError unless the adapter of one of peft's own methods matches the model; peft ignores unknown and
    missing tensors. Not checked: prompt learning, X-LoRA, and methods that do not work on the meta device."""
    if config.is_prompt_learning or str(config.peft_type.value) == "XLORA":
        return
    config = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other initialisations read W0
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            trial = get_peft_model(cast(Any, without_weights(base)), config, "trial")
        except (NotImplementedError, RuntimeError):
            return
        except Exception as error:
            raise ValueError(one_line(f"{directory / CONFIG}: does not match the model: {error}")) from error
        wanted = get_peft_model_state_dict(trial, adapter_name="trial", save_embedding_layers=False)
        try:
            result = set_peft_model_state_dict(trial, saved, "trial", low_cpu_mem_usage=True)
        except Exception as error:  # a wrong shape or key
            raise ValueError(one_line(f"{directory / WEIGHTS}: does not match the model: {error}")) from None
    missing, unknown = (
        [key.replace(".trial", "") for key in keys] for keys in (result.missing_keys, result.unexpected_keys)
    )
    complaints = [
        f"{title}: {some(keys)}"
        for title, keys in (("missing", [key for key in missing if key in wanted]), ("unknown", unknown))
        if keys
    ]
    if complaints:
        raise ValueError(one_line(f"{directory / WEIGHTS}: does not match the model: {'; '.join(complaints)}"))


@contextmanager
def whole(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """As `whole_adapter`; what it refuses is said on one line."""
    with ExitStack() as stack:
        with refusing(Path(directory) / CONFIG):
            place = stack.enter_context(whole_adapter(Path(directory)))
        yield place


def read_config(directory: Path) -> PeftConfig:
    """The configuration of a saved adapter. Raises ValueError, naming the file, if a file is missing or invalid."""
    with whole(directory) as place:
        return _config_in(place)


def _config_in(directory: Path) -> PeftConfig:
    path = directory / CONFIG
    with refusing(path):
        method = read_fields(path).get("peft_type")
        if method in ("GENFT", "WeGeFT"):
            raise ValueError(f"{path}: got an adapter of the released {method} code; use load_released")
        if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(f"{path}: got peft_type {shown(method)}, unknown to genft and to this version of peft")
        config = cast(PeftConfig, PEFT_TYPE_TO_CONFIG_MAPPING[method].from_pretrained(str(directory)))
        check_peft_fields(config)
        return config


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    for module in model.modules():
        for value in vars(module).values():
            # not copied: accelerate's hooks may hold offloaded weights, bitsandbytes' states quantised ones
            if type(value).__module__.startswith(("accelerate.", "bitsandbytes.")):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)
