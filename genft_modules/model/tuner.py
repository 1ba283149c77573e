"""The methods as peft tuners. Matching, injection, saving, loading and merging are inherited from peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from genft_modules.files import refuse_misfits
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.layer.mixed import BASE, mixed_batch
from genft_modules.methods import METHODS, Generator, GeneratorConfig
from genft_modules.methods.checks import one_line
from genft_modules.methods.patterns import check_matching, fits
from genft_modules.model.combine import combined

SHARED = "shared_generators"


class SharedGenerators(nn.Module, BaseTunerLayer):
    """Factors shared by layers: adapter → key → module. A child of the adapted model, so that it also exists without a
    `PeftModel`; a tuner layer, so that peft saves, casts, freezes and deletes its parameters.
    """

    adapter_layer_names = ("genft_shared",)
    weight = None  # override peft's properties, which access the base layer
    bias = None

    def __init__(self) -> None:
        super().__init__()
        self.genft_shared = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """The identity, because an adapted `nn.Sequential` calls all of its children."""
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Record the merged adapters; the layers do the merging."""
        names = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters = [*self.merged_adapters, *(name for name in names if name in self.genft_shared)]

    def unmerge(self) -> None:
        self.merged_adapters = []


class GenFTModel(BaseTuner):
    """The tuner that `peft.get_peft_model` creates for genft configs: replaces target layers by `FusedGenLinear`."""

    prefix = "genft_"
    tuner_layer_cls = (FusedGenLinear, SharedGenerators)
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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
        try:
            layer = target if isinstance(target, FusedGenLinear) else FusedGenLinear(target)
        except TypeError as error:
            raise TypeError(f"target_modules: {current_key}: {error}") from None
        shared = self._shared(adapter_name)
        layer.add_adapter(adapter_name, peft_config, name=current_key, shared=shared)
        if shared:
            self._keep(adapter_name, shared)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # Disables its fast path in eval mode, which reads the weights directly and would bypass the adapters. The
            # attribute has no other use.
            parent.activation_relu_or_gelu = 0
        if layer is not target:
            self._replace_module(parent, target_name, layer.train(target.training), target)

    def _shared(self, adapter_name: str) -> nn.ModuleDict:
        """The adapter's shared factors in the model, or an empty dict."""
        container = getattr(self.model, SHARED, None)
        if container is None or adapter_name not in container.genft_shared:
            return nn.ModuleDict()
        return cast(nn.ModuleDict, container.genft_shared[adapter_name])

    def _keep(self, adapter_name: str, shared: nn.ModuleDict) -> None:
        container = getattr(self.model, SHARED, None)
        if container is None:
            container = SharedGenerators().train(self.model.training)
            self.model.add_module(SHARED, container)
        container.genft_shared[adapter_name] = shared

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in peft, but refuses patterns that could take very long to match, restores the model if injection fails,
        and warns about patterns in the config that match no adapted layer."""
        if _adapted(model, adapter_name):
            raise ValueError(
                f"adapter_name: {adapter_name!r} already exists in the model, expected a new name; see `unload`"
            )
        check_matching(self.peft_config[adapter_name], (name for name, _ in model.named_modules()))
        _refuse_parameters(model, self.peft_config[adapter_name].target_modules)
        if state_dict and any(SharedGenerators.adapter_layer_names[0] in key for key in state_dict):
            state_dict = None  # keys of shared factors do not identify the adapted layers; use the config
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self._withdraw(model, adapter_name)
            raise
        adapted = _adapted(model, adapter_name)
        for field, patterns in self.peft_config[adapter_name].module_patterns().items():
            idle = [pattern for pattern in patterns if not any(fits(pattern, name) for name in adapted)]
            if idle:
                warnings.warn(f"{field}: {idle} match none of the adapted layers.", RuntimeWarning, stacklevel=2)

    def _withdraw(self, model: nn.Module, adapter_name: str) -> None:
        for name, layer in _adapted(model, adapter_name).items():
            del layer.genft_generators[adapter_name]
            if not layer.genft_generators:
                model.set_submodule(name, layer.base_layer)
        container = getattr(model, SHARED, None)
        if container is not None and adapter_name in container.genft_shared:
            del container.genft_shared[adapter_name]
            if not container.genft_shared:
                delattr(model, SHARED)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft also copies `weight`, which quantised layers and saved heads of several layers do not have; our layers
        contain the base layer and move their parameters to its device."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))
        if hasattr(model, SHARED):
            delattr(model, SHARED)
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
        ("__base__": none) and is passed to the layers by hooks."""
        if adapter_names is None:
            yield
            return
        batch = mixed_batch(adapter_names, _copies(self.model, kwargs))
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, (FusedGenLinear, AuxiliaryTrainingWrapper))]
        known = {name for layer in layers if isinstance(layer, FusedGenLinear) for name in layer.genft_generators}
        if unknown := set(batch.names) - known - {BASE}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # Modules of modules_to_save are peft's and take a list.
            names = batch if isinstance(module, FusedGenLinear) else batch.names_of(len(args[0]))
            return args, {**kwargs, "adapter_names": names}

        handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: PeftConfig, adapter_name: str, **kwargs: Any) -> Any:
        """As in peft, but raises ValueError if the adapter is not ready."""
        for layer in _adapted(model, adapter_name).values():
            cast(Generator, layer.genft_generators[adapter_name]).check_ready()
        return super()._get_adapter_state_dict(model=model, config=config, adapter_name=adapter_name, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """peft expects the adapter name near the end of a key; here it follows the container's name."""
        for container in FusedGenLinear.adapter_layer_names + SharedGenerators.adapter_layer_names:
            before, found, after = key.partition(f"{container}.{adapter_name}.")
            if found:
                return f"{before}{container}.{after}"
        return cast(str, super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in peft, but raises ValueError for unknown or missing keys, which peft ignores, before the model is
        changed. A state without any of the method's tensors is accepted with a warning."""
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict()
        # with bias="all", peft saves biases of modules_to_save twice, the second time under a key not in the model
        state = {key: tensor for key, tensor in state.items() if key in known or ".modules_to_save." not in key}
        containers = FusedGenLinear.adapter_layer_names + SharedGenerators.adapter_layer_names
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


def _refuse_parameters(model: nn.Module, targets: Any) -> None:
    """Raise TypeError if a target is a parameter, such as the fused experts of a layer; peft would ignore it if other
    targets match."""
    if not isinstance(targets, (set, list, tuple)):
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        for name, parameter in model.named_parameters():
            if name == target or name.endswith(f".{target}"):
                owner = name.rpartition(".")[0]
                raise TypeError(
                    f"target_modules: got {target!r}, a parameter {list(parameter.shape)} of {owner} "
                    f"({type(model.get_submodule(owner)).__name__}), expected a layer"
                )


def _copies(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How many sequences per sample `generate`, called with `kwargs`, uses. (An encoder sees one.)"""
    configs = [getattr(holder, "generation_config", None) for holder in (SimpleNamespace(**kwargs), model)]

    def number(name: str) -> int:
        found = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in found if isinstance(value, int)), 1)

    return max(number("num_beams"), number("num_return_sequences"))


def _adapted(model: nn.Module, adapter_name: str) -> dict[str, FusedGenLinear]:
    """The layers with the adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FusedGenLinear) and adapter_name in layer.genft_generators
    }


def register(config: type[GeneratorConfig]) -> None:
    """Register the method with peft. (`peft.utils.register_peft_method` accepts only members of PeftType.)"""
    peft_type = cast(PeftConfig, config()).peft_type
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = GenFTModel
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = GenFTModel.prefix


for _config in METHODS.values():
    register(_config)
