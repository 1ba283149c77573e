"""What adapted layers have in common: their adapters, by name, and what W0 is while adapters are merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from genft_kernels.checks import FLOATS
from genft_kernels.plan import BACKENDS
from genft_modules.layer.shared import SharedGenerators
from genft_modules.methods import Generator, GeneratorConfig
from genft_modules.methods.checks import check_choice
from genft_modules.methods.weights import stored

PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
PLAIN_TENSORS = (nn.Parameter, Tensor)  # neither quantised nor distributed

LayerT = TypeVar("LayerT", bound="AdaptedLayer")


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A frozen `base_layer` with adapters: a generator for each, one or several of which are active."""

    adapter_layer_names = ("genft_generators", "genft_shared")

    base_layer: Any
    genft_shared: nn.ModuleDict
    active_adapters: Any  # peft's, untyped
    set_adapter: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.genft_generators = nn.ModuleDict()
        # Adapter → the factors it shares with other layers, and → where these are registered. Not registered here; but
        # what peft does to a layer's adapter (train, freeze, report), it does to `genft_shared`, too.
        object.__setattr__(self, "genft_shared", nn.ModuleDict())
        self.containers: dict[str, SharedGenerators] = {}
        self.merged_adapters: list[str] = []
        self.register_state_dict_post_hook(_save_unmerged)
        self.register_load_state_dict_pre_hook(_refuse_if_merged)

    def originals(self) -> dict[str, Tensor]:
        """While adapters are merged: the parameters of the base layer that they changed, by name, as they were."""
        raise NotImplementedError

    def names_of_targets(self, name: str, adapter_name: str) -> list[str]:
        """What the adapter changes, by the names that patterns of a config match; `name` is the layer's."""
        return [name]

    def _check_new(self, adapter_name: str, config: Any, backend: str | None) -> None:
        if not isinstance(config, GeneratorConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a config of genft_modules.METHODS")
        if adapter_name in self.genft_generators:
            raise ValueError(f"adapter_name: {adapter_name!r} already exists, expected a new name")
        if backend is not None:
            check_choice("backend", backend, BACKENDS)

    def _add(self, adapter_name: str, generator: Generator, config: GeneratorConfig, backend: str | None) -> None:
        """Register the generator with the device and dtype of the base layer. The first one becomes active."""
        generator.backend = backend or config.backend
        if not self.genft_generators:
            self._active_adapter = adapter_name
        self.genft_generators[adapter_name] = generator.train(self.training)
        if generator.shared:
            self.genft_shared[adapter_name] = nn.ModuleList(generator.shared)
        if (dtype := stored(self.base_layer).dtype) in FLOATS:
            for module in generator.modules_with_shared():
                module.to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft. The first layer to lose an adapter deletes what its layers share."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.containers:
            self.containers.pop(adapter_name).delete(adapter_name)

    def _on_its_own(self: LayerT, adapter_name: str) -> LayerT:
        """The layer outside of a model: the base layer frozen, the adapter in float32 or wider."""
        self.base_layer.requires_grad_(False)
        generator = self._generator(adapter_name)
        generator.to(torch.promote_types(next(generator.parameters()).dtype, torch.float32))
        return self.train(self.base_layer.training)

    def _active_generators(self) -> list[Generator]:
        # Direct access to _modules because this runs in every call of every layer.
        generators = cast(nn.Module, self._modules["genft_generators"])._modules
        return [cast(Generator, generators[name]) for name in self.active_adapters if name in generators]

    def adapter_parameters(self, adapter_name: str = "default") -> dict[str, nn.Parameter]:
        """The parameters of the adapter's ΔW by their released names, including those shared with other layers."""
        return self._generator(adapter_name).adapter_parameters()

    def _generator(self, adapter_name: str) -> Generator:
        if adapter_name not in self.genft_generators:
            raise ValueError(f"adapter_name: got {adapter_name!r}, expected one of {list(self.genft_generators)}")
        return cast(Generator, self.genft_generators[adapter_name])

    def _refuse_mixed_merged(self) -> None:
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _warn_if_unmerged(self) -> bool:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        return not self.merged

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft, for own and shared factors, but without the cast to the base layer's dtype: peft also calls this
        after loading with low_cpu_mem_usage, where a cast would round a float32 adapter to half precision."""
        if adapter_name not in self.genft_generators:
            return
        for module in self._generator(adapter_name).modules_with_shared():
            target = device or stored(self.base_layer).device
            if target.type == "meta" or not any(parameter.is_meta for parameter in module.parameters()):
                module.to(target)


def tensor_of(layer: Any, name: str) -> Any:
    """A layer's attribute or None; parameters bypass `nn.Module.__getattr__`, which takes half a microsecond."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name, None)


def is_hooked(module: Any) -> bool:
    """Whether a call of the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def refuse_quantised(layer: nn.Module, weight: Tensor) -> None:
    """Raise TypeError unless a weight can be changed by merging."""
    if type(weight) not in PLAIN_TENSORS or weight.dtype not in FLOATS:
        raise TypeError(
            f"merge: {type(layer).__name__} has a {type(weight).__name__} of {weight.dtype}, expected a plain "
            "floating-point weight: merge into the same model loaded without quantisation"
        )


def with_updates(original: Tensor, deltas: Iterable[Tensor]) -> Tensor:
    """W0 + Σ ΔW in the dtype of W0, summed in float32 or wider."""
    merged = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
    for delta in deltas:
        merged += delta
    return merged.to(original.dtype)


def _save_unmerged(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """W0 is what a state_dict contains also while adapters are merged: it contains the adapters, too, and where it is
    loaded they are added to W0 once."""
    for name, original in cast(AdaptedLayer, layer).originals().items():
        if (key := f"{prefix}base_layer.{name}") in state:
            state[key] = original


def _refuse_if_merged(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """A merged layer would go on without the ΔW of its adapters, or with W0 of before."""
    merged = cast(AdaptedLayer, layer)
    if any(f"{prefix}base_layer.{name}" in state for name in merged.originals()):
        raise ValueError(
            f"load_state_dict: {merged.merged_adapters} are merged into {prefix.rstrip('.') or 'the layer'}, expected "
            "an unmerged model: call unmerge_adapter() first"
        )
