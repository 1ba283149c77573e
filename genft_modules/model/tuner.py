"""The methods as peft tuners. Matching, injection, saving, loading and merging are inherited from peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn

from genft_modules.files import PREFIX, refuse_misfits
from genft_modules.layer.adapted import AdaptedLayer
from genft_modules.layer.experts import FusedGenExperts, projections
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.layer.mixed import BASE, MixedBatch, mixed_batch
from genft_modules.layer.shared import SHARED, InjectedGenerators, SharedGenerators
from genft_modules.methods import METHODS, Generator, GeneratorConfig
from genft_modules.methods.checks import one_line
from genft_modules.methods.patterns import check_matching, fits
from genft_modules.model.combine import combined
from genft_modules.model.distributed import unwrapped
from genft_modules.model.targets import projections_of, target_names


class GenFTModel(BaseTuner):
    """The tuner that `peft.get_peft_model` creates for genft configs: replaces target layers by `FusedGenLinear`, and
    modules of stacked experts whose parameters are targets by `FusedGenExperts`."""

    prefix = "genft_"
    tuner_layer_cls = (AdaptedLayer, InjectedGenerators)
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], *args: Any, **kwargs: Any):
        # `PeftModel` passes a dict and keeps the tuner; `inject_adapter_in_model` passes a config and keeps the model.
        self.stays = isinstance(peft_config, dict)
        configs = getattr(model, "peft_config", {})
        former = dict(configs)
        try:
            super().__init__(model, peft_config, *args, **kwargs)
        except Exception:
            configs.clear()
            configs.update(former)
            raise

    def _create_and_replace(
        self,
        peft_config: GeneratorConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        home, kind = (self, SharedGenerators) if self.stays else (unwrapped(self.model), InjectedGenerators)
        container = home._modules.get(SHARED) or kind().train(self.model.training)
        shared = cast(dict[str, nn.ModuleDict], container.genft_shared._modules).get(adapter_name) or nn.ModuleDict()
        try:
            layer = target if isinstance(target, AdaptedLayer) else _layer(target)
            if isinstance(layer, FusedGenExperts):
                targets = _targeted(peft_config, current_key, layer)
                if not targets:
                    raise TypeError(
                        f"got {type(layer.base_layer).__name__}, expected the name of a parameter of it, "
                        f"{' or '.join(f'{target_name}.{one}' for one in layer.projections)}"
                    )
                name = _plain(current_key)
                layer.add_adapter(adapter_name, peft_config, targets=targets, name=name, shared=shared)
        except TypeError as error:
            raise TypeError(f"target_modules: {current_key}: {error}") from None
        if isinstance(layer, FusedGenLinear):
            layer.add_adapter(adapter_name, peft_config, name=_plain(current_key), shared=shared)
        if shared:
            container.genft_shared[adapter_name] = shared
            setattr(home, SHARED, container)
            layer.containers[adapter_name] = container
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Disables its fast path in eval mode, which reads the weights directly and would bypass the adapters. The
            # attribute has no other use.
            parent.activation_relu_or_gelu = 0
        if layer is not target:
            self._replace_module(parent, target_name, layer.train(target.training), target)

    def _check_target_module_exists(self, peft_config: GeneratorConfig, key: str) -> Any:
        """As in peft; also whether a module holds stacked experts of which a parameter is a target."""
        found = super()._check_target_module_exists(peft_config, key)
        if found or isinstance(found, _ExcludedModule):
            return found
        try:
            module = self.model.get_submodule(key)
        except AttributeError:  # a part of experts that have been wrapped
            return found
        results = [check_target_module_exists(peft_config, f"{key}.{one}") for one in projections_of(module)]
        return next((one for one in sorted(results, key=bool, reverse=True)), found)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in peft, but refuses patterns that could take very long to match, restores the model if injection fails,
        and warns about patterns in the config that match no adapted layer. An adapter of the same name, which peft lets
        pass only where the model gets another tuner, is replaced, in all of its layers."""
        check_matching(self.peft_config[adapter_name], target_names(model))
        _refuse_parameters(model, self.peft_config[adapter_name])
        _include_experts(model, self.peft_config[adapter_name])
        # Keys of shared factors do not identify the adapted layers: then the config does.
        shared = state_dict is not None and any(".genft_shared." in f".{key}" for key in state_dict)
        layers = None if shared else state_dict
        former = _take(model, adapter_name)
        try:
            with warnings.catch_warnings():
                # peft compares them with modules; below they are compared with stacked parameters, too.
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, layers)
        except Exception:
            _take(model, adapter_name)
            _give_back(former, adapter_name)
            raise
        finally:
            self._clear(model)
        adapted = adapted_layers(model, adapter_name)
        if state_dict is not None and shared:
            _compare(state_dict, adapted, adapter_name)
        names = [one for name, layer in adapted.items() for one in layer.names_of_targets(name, adapter_name)]
        config = self.peft_config[adapter_name]
        ranks = {field: list(getattr(config, field, ())) for field in ("rank_pattern", "alpha_pattern")}
        for field, patterns in {**config.module_patterns(), **ranks}.items():
            idle = [pattern for pattern in patterns if not any(fits(pattern, name) for name in names)]
            if idle:
                warnings.warn(f"{field}: {idle} match none of the adapted layers.", RuntimeWarning, stacklevel=2)

    def _clear(self, model: nn.Module) -> None:
        """Remove layers without adapters and containers without factors."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, AdaptedLayer) and not (layer.genft_generators or layer.merged_adapters):
                model.set_submodule(name, layer.base_layer)
        for home in (self, unwrapped(model)):
            if SHARED in home._modules and not home._modules[SHARED].genft_shared:
                delattr(home, SHARED)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft also copies `weight`, which quantised layers and saved heads of several layers do not have; our layers
        contain the base layer and move their parameters to its device."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))
        for home in (self, unwrapped(model)):
            if SHARED in home._modules:
                delattr(home, SHARED)
        return model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter with ΔW = Σ weightᵢ ΔWᵢ of low-rank adapters of any methods. The new adapter is a
        `genft_modules.LoRAConfig` with its own factors, frozen and not active.

        The updates ΔW are added, computed from the current W0. (peft's "linear" for LoRA adds A and B instead.)

        Args:
            adapters: names of adapters in the model.
            weights: one per adapter; may be negative.
            adapter_name: name of the new adapter.
            combination_type: "cat", exact, its rank is the sum of the ranks; or "svd", the best approximation of rank
                `svd_rank` (default: the largest rank among the layer's adapters).
            svd_rank: rank for "svd".

        Raises:
            ValueError, TypeError: an adapter does not exist, has a full-rank ΔW, or trains full modules or biases.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: {adapter_name!r} already exists in the model, expected a new name")
        config, factors = combined(self, adapters, weights, combination_type, svd_rank)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for name, (a, b) in factors.items():
            parameters = cast(FusedGenLinear, self.model.get_submodule(name)).adapter_parameters(adapter_name)
            parameters["lora_A"].data.copy_(a)
            parameters["lora_B"].data.copy_(b)
        self.set_requires_grad(adapter_name, False)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Entered by peft around the forward pass and `generate`. `adapter_names` has one adapter per sample
        ("__base__": none) and is passed to the layers by hooks. Unlike peft's, it may be passed in training, too."""
        if adapter_names is None:
            yield
            return
        batch = mixed_batch(adapter_names, _copies(self.model, kwargs))
        layers = [module for module in self.modules() if isinstance(module, AdaptedLayer)]
        known = {name for layer in layers for name in layer.genft_generators}
        if unknown := set(batch.names) - known - {BASE}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        if self.training:
            batch.draw_seeds()  # now: what is drawn in a checkpointed block would not be drawn again
        with _giving(batch, self), _giving_again(batch, self):
            yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft, and what layers share."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        container = self._modules.get(SHARED)
        if autocast_adapter_dtype and container is not None and adapter_name in container.genft_shared:
            for parameter in container.genft_shared[adapter_name].parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: PeftConfig, adapter_name: str, **kwargs: Any) -> Any:
        """As in peft, but raises ValueError if the adapter is not ready."""
        for layer in adapted_layers(model, adapter_name).values():
            cast(Generator, layer.genft_generators[adapter_name]).check_ready()
        return super()._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """peft expects the adapter name near the end of a key; here it follows the container's name. In files, what
        layers share is a child of the model, wherever it is kept, and names are those of the uncompiled model."""
        for container in AdaptedLayer.adapter_layer_names:
            before, found, after = key.partition(f"{container}.{adapter_name}.")
            if found:
                before = f"{PREFIX}{SHARED}." if before == f"base_model.{SHARED}." else _plain(before)
                return f"{before}{container}.{after}"
        return cast(str, super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in peft, but raises ValueError for unknown or missing keys, which peft ignores, before the model is
        changed. A state without any of the method's tensors is accepted with a warning."""
        state_dict = {_plain(key) if ".genft_" in key else key: tensor for key, tensor in state_dict.items()}
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict()
        # with bias="all", peft saves biases of modules_to_save twice, the second time under a key not in the model
        state = {key: tensor for key, tensor in state.items() if key in known or ".modules_to_save." not in key}
        containers = AdaptedLayer.adapter_layer_names
        own = {k: t for k, t in known.items() if any(f"{name}.{adapter_name}." in k for name in containers)}
        if own and not own.keys() & state.keys():
            message = (
                f"adapter {adapter_name!r}: the state contains none of its {len(own)} tensors; they are not changed"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            own = {}
        try:
            refuse_misfits(f"adapter {adapter_name!r}", state, own, known)
        except ValueError as error:  # with keys from a stranger's file
            raise ValueError(one_line(error)) from None
        return state


def _compare(state: dict[str, Tensor], adapted: dict[str, AdaptedLayer], adapter_name: str) -> None:
    """Warn as peft does about layers that only one of the state and the config has. (Layers without tensors of their
    own do not appear in a state.)"""
    inside = ".genft_generators."
    found = {key.partition(inside)[0].removeprefix(PREFIX) for key in state if inside in key}
    own = {name for name, layer in adapted.items() if list(layer.genft_generators[adapter_name].parameters())}
    message = "".join(
        f"The {which} contained these additional target modules: {sorted(names)}. "
        for which, names in (("PEFT config", own - found), ("state_dict", found - own))
        if names
    )
    if message:
        message = (
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
            "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
            f"{message}The config counts, because layers share factors."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _layer(module: nn.Module) -> FusedGenLinear | FusedGenExperts:
    return FusedGenExperts(module) if projections(module) else FusedGenLinear(module)


def _targeted(config: GeneratorConfig, name: str, module: nn.Module) -> list[str]:
    """The stacked projections of a module that are targets, matched as peft matches names of modules."""
    if isinstance(check_target_module_exists(config, name), _ExcludedModule):
        return []
    return [one for one in projections_of(module) if check_target_module_exists(config, f"{name}.{one}")]


def _include_experts(model: nn.Module, config: GeneratorConfig) -> None:
    """Make "all-linear" the names of the linear layers, as peft does, and those of stacked experts."""
    if str(config.target_modules).lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND or config.refuses_experts():
        return
    stacked = {
        name: module
        for name, module in model.named_modules()
        if projections_of(module) and not name.endswith(".base_layer")
    }
    if not stacked:
        return
    _maybe_include_all_linear_layers(config, model)
    every = {f"{name}.{one}" for name, module in stacked.items() for one in projections_of(module)}
    targets: Any = {*cast(set[str], config.target_modules), *every}
    config.target_modules = targets
    experts = [f"{name}.{one}" for name, module in stacked.items() for one in _targeted(config, name, module)]
    if not experts:
        return
    warnings.warn(
        f'target_modules: "all-linear" includes {len(experts)} parameters of stacked experts, such as {experts[0]}; '
        'exclude_modules=["experts.gate_up_proj", "experts.down_proj"] leaves them out.',
        stacklevel=3,
    )


def _refuse_parameters(model: nn.Module, config: GeneratorConfig) -> None:
    """Raise TypeError if a target is a parameter that the method cannot adapt; peft would ignore it if other targets
    match."""
    targets: Any = config.target_modules
    if not isinstance(targets, (set, list, tuple)):
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        for name, parameter in model.named_parameters():
            if name != target and not name.endswith(f".{target}"):
                continue
            owner, _, short = name.rpartition(".")
            module = model.get_submodule(owner)
            came = f"{target!r}, a parameter {list(parameter.shape)} of {owner} ({type(module).__name__})"
            if short not in projections_of(module):
                raise TypeError(f"target_modules: got {came}, expected a layer")
            if reason := config.refuses_experts():
                raise TypeError(
                    f"target_modules: got {came}, but {type(config).__name__} cannot adapt experts, {reason}; expected "
                    "a layer, WeGeFTConfig or GIFTConfig with their default options, or peft's "
                    "LoraConfig(target_parameters=...)"
                )


def _copies(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many sequences per sample `generate`, called with `kwargs`, uses. (An encoder sees one.)"""
    configs = [getattr(holder, "generation_config", None) for holder in (SimpleNamespace(**kwargs), model)]

    def number(name: str) -> int:
        found = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in found if isinstance(value, int)), 1)

    return max(number("num_beams"), number("num_return_sequences"))


def _plain(name: str) -> str:
    """A name without what `torch.compile` adds to it."""
    return name.replace("_orig_mod.", "")


@dataclass
class _Taken:
    """An adapter that was taken out of a layer."""

    layer: AdaptedLayer
    generator: Generator
    container: SharedGenerators | None
    factors: nn.Module | None


@contextmanager
def _giving(batch: MixedBatch, module: nn.Module) -> Iterator[None]:
    """Pass the adapters of the samples to the adapted layers in `module`."""

    def give(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Modules of modules_to_save are peft's and take a list.
        names = batch if isinstance(layer, AdaptedLayer) else batch.names_of(len(args[0]))
        return args, {**kwargs, "adapter_names": names}

    layers = [layer for layer in module.modules() if isinstance(layer, (AdaptedLayer, AuxiliaryTrainingWrapper))]
    handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _giving_again(batch: MixedBatch, module: nn.Module) -> Iterator[None]:
    """Gradient checkpointing computes a block again in the backward pass, after the call: with the same adapters."""
    blocks = [block for block in module.modules() if block.training and getattr(block, "gradient_checkpointing", False)]
    checkpoints = [cast(Any, block)._gradient_checkpointing_func for block in blocks]
    ended = False

    def checkpointed(block: nn.Module, checkpoint: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        def again(*args: Any, **kwargs: Any) -> Any:
            with _giving(batch, block) if ended else nullcontext():
                return function(*args, **kwargs)

        return checkpoint(again, *args, **kwargs)

    for block, checkpoint in zip(blocks, checkpoints, strict=True):
        cast(Any, block)._gradient_checkpointing_func = partial(checkpointed, block, checkpoint)
    try:
        yield
    finally:
        ended = True
        for block, checkpoint in zip(blocks, checkpoints, strict=True):
            cast(Any, block)._gradient_checkpointing_func = checkpoint


def _take(model: nn.Module, adapter_name: str) -> list[_Taken]:
    """Take the adapter out of the model's layers, to replace it. Raises ValueError if it is merged."""
    layers = adapted_layers(model, adapter_name)
    if merged := [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(
            f"adapter_name: {adapter_name!r} is merged into {merged[0]}, expected a new name or an unmerged model"
        )
    taken = []
    for layer in layers.values():
        container = layer.containers.pop(adapter_name, None)
        factors = None if container is None else container.genft_shared[adapter_name]
        if adapter_name in layer.genft_shared:
            del layer.genft_shared[adapter_name]
        generator = cast(Generator, layer.genft_generators.pop(adapter_name))
        taken.append(_Taken(layer, generator, container, factors))
    for one in taken:
        if one.container is not None:
            one.container.delete(adapter_name)
    return taken


def _give_back(taken: list[_Taken], adapter_name: str) -> None:
    for one in taken:
        one.layer.genft_generators[adapter_name] = one.generator
        if one.generator.shared:
            one.layer.genft_shared[adapter_name] = nn.ModuleList(one.generator.shared)
        if one.container is not None and one.factors is not None:
            one.layer.containers[adapter_name] = one.container
            one.container.genft_shared[adapter_name] = one.factors


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers with the adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.genft_generators
    }


def register(config: type[GeneratorConfig]) -> None:
    """Register the method with peft. (`peft.utils.register_peft_method` accepts only members of PeftType.)"""
    peft_type = cast(PeftConfig, config()).peft_type
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = GenFTModel
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = GenFTModel.prefix


for _config in METHODS.values():
    register(_config)
