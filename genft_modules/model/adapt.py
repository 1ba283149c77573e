"""Adapters for any torch module: which layers are adapted if the configuration does not say it."""

from __future__ import annotations

import copy
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from genft_modules.layer.linear import FusedGenLinear
from genft_modules.model.targets import target_names, targets_of


def adapt(model: nn.Module, config: PeftConfig, adapter_name: str = "default") -> PeftModel:
    """Adapt any torch module: a plain network, or a model of timm, torchvision, diffusers or transformers.

    Like `peft.get_peft_model`, which it calls, and which needs `target_modules` unless it knows the architecture. Here
    `target_modules=None` then means all linear layers but the output layer. (peft's "all-linear" finds the output layer
    of transformers models only; in other modules it adapts that too, and names layers that cannot be adapted.) The base
    is frozen, also its output layer: to train that in full, name it in `modules_to_save`; to adapt it, name all layers
    in `target_modules`.

    The result is a `PeftModel`, for all modules alike, because that is what peft's functions and its users expect:
    called like `model` itself, with `merge_and_unload`, `disable_adapter`, `set_adapter` and so on, and what
    `save_adapter` and `load_adapter` take and return. As in peft, the layers of `model` itself are replaced. To keep
    its class, as in a pipeline of diffusers, use the `add_adapter` that models of diffusers and transformers have.

    The output layer is what `get_output_embeddings` (transformers) or `get_classifier` (timm) returns; else a child
    called "classifier" or "score"; else the last module with parameters, in the order of `model.modules()`, if it is
    linear. A U-Net that ends with a convolution has none.

    Args:
        model: a module without adapters.
        config: configuration of one of genft's methods, or of peft's. It is not changed.
        adapter_name: name of the adapter.

    Raises:
        TypeError: `model` or `config` is of another type.
        ValueError: `model` has adapters already or, with `target_modules=None`, no linear layer but the output layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(config, PeftConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a configuration, such as WeGeFTConfig(r=16)")
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model: got a {type(model).__name__} with the adapters {list(cast(Any, model.peft_config))}, expected one "
            "without; add further ones with its add_adapter"
        )
    config = copy.deepcopy(config)
    if getattr(config, "target_modules", ()) is None and not _is_known(model, config):
        config.target_modules = linear_targets(model, getattr(config, "modules_to_save", None) or ())
    return cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name))


def _is_known(model: nn.Module, config: PeftConfig) -> bool:
    """Whether peft has default layers for the model's architecture."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    known = getattr(tuner, "target_module_mapping", {})
    return BaseTuner.get_model_config(cast(Any, model)).get("model_type") in known


def linear_targets(model: nn.Module, saved: Any = ()) -> list[str] | str:
    """A `target_modules` for all linear layers but the output layer and those inside the modules `saved` in full."""
    names = dict(model.named_modules())
    taken = [name for name in names if any(name == one or name.endswith(f".{one}") for one in saved)]
    heads = output_layers(model)
    linear = [name for name, module in names.items() if _is_adaptable(module)]
    targets = [
        name for name in linear if names[name] not in heads and not any(f"{name}.".startswith(f"{t}.") for t in taken)
    ]
    if not targets or not all(targets):
        found = f"has no linear layers but {linear}" if linear else "has no linear layers"
        raise ValueError(
            f"model: {type(model).__name__} {found}, expected some before the output layer; name layers in "
            "target_modules, or adapt a single one with FusedGenLinear.from_linear"
        )
    return targets_of(targets, target_names(model))


def output_layers(model: nn.Module) -> set[nn.Module]:
    """The modules of the model's output layer; empty if none is linear."""
    found: list[Any] = []
    for name in ("get_output_embeddings", "get_classifier"):
        if callable(get := getattr(model, name, None)):
            given = get()
            found += given if isinstance(given, (tuple, list)) else [given]
    found += [child for name, child in model.named_children() if name in SEQ_CLS_HEAD_NAMES]
    found = [head for head in found if isinstance(head, nn.Module) and next(head.parameters(), None) is not None]
    if not found:
        found = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None][-1:]
    return {part for head in found for part in head.modules()}


def _is_adaptable(module: nn.Module) -> bool:
    try:
        FusedGenLinear(module)
    except TypeError:
        return False
    return True
