"""FusedGenLinear: a frozen linear layer, its adapters, and the one fused operation of their form."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from genft_kernels import grouped_lowrank_linear
from genft_kernels.checks import FLOATS
from genft_kernels.operation import eager
from genft_kernels.plan import BACKENDS
from genft_kernels.sharded import is_sharded
from genft_modules.layer.kept import Kept
from genft_modules.layer.mixed import MixedBatch, mixed_batch
from genft_modules.layer.sharded import sharded_forward
from genft_modules.methods import Generator, GeneratorConfig
from genft_modules.methods.base import check_choice
from genft_modules.methods.forms import Form, InputEdit, apply, apply_around, side_by_side
from genft_modules.methods.weights import QuantisedWeight, can_be_base, features_of, is_quantised, stored

_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
_PLAIN_TENSORS = (nn.Parameter, Tensor)  # not a quantised or a distributed one


class FusedGenLinear(nn.Module, BaseTunerLayer):
    """y = x (W0 + ΔW)ᵀ + b [..., N] for x [..., K]: `base_layer` with the updates of its active adapters.

    The forward pass is one operation of `genft_kernels`, whatever the number of active adapters (one more for each
    further adapter whose ΔW is generated, and for each other share of x that adapters drop). Where the base layer is
    more than its weight, because it is quantised or somebody hooked it, it makes its own product and the update is
    applied around it. A method that reads a quantised W0 has it in floating point for a moment, panel by panel where
    the layer allows, see `genft_modules.methods.weights`; one that edits the input (WeGeFT, GIFT) never does.

    Two ways to get one: `FusedGenLinear.from_linear` for a single layer, `peft.get_peft_model` for a model.

    Args:
        base_layer: `torch.nn.Linear` or transformers' `Conv1D`, without adapters so far; also quantised, by
            bitsandbytes, torchao or HQQ, or by another package whose layers have in_features, out_features and a packed
            weight, such as GPTQ's.

    Raises:
        TypeError: for any other layer, by name.
    """

    adapter_layer_names = ("genft_generators",)

    base_layer: Any  # nn.Linear, Conv1D or a quantised one
    original_weight: Tensor | None
    original_parameter: nn.Parameter  # the base layer's while adapters are merged
    active_adapters: Any  # peft's, untyped
    set_adapter: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if isinstance(base_layer, BaseTunerLayer) or not (
            isinstance(base_layer, (nn.Linear, Conv1D)) or can_be_base(base_layer)
        ):
            raise TypeError(
                f"base_layer: got {type(base_layer).__name__}, expected torch.nn.Linear or transformers' Conv1D"
            )
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise TypeError(
                "base_layer: got the out_proj of an nn.MultiheadAttention, which uses its weight and never calls it, "
                'so that an adapter would do nothing; leave it out with exclude_modules=["out_proj"]'
            )
        self.base_layer = base_layer
        self.plain_forward = type(base_layer).forward in _PLAIN_FORWARDS
        self.transposed = isinstance(base_layer, Conv1D)  # a Conv1D keeps W0ᵀ, [K, N]
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features, self.out_features = features_of(base_layer)
        self.genft_generators = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.kept = Kept()
        # W0 while adapters are merged. A buffer, so that it moves with the layer; not saved.
        self.register_buffer("original_weight", None, persistent=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: GeneratorConfig,
        adapter_name: str = "default",
        *,
        name: str = "",
        backend: str | None = None,
    ) -> FusedGenLinear:
        """A layer with one adapter around `linear`, which is kept, not copied, and frozen.

        The adapter owns its parameters, whatever the config says of sharing. They are float32, or float64 beside a
        float64 weight, and ΔW = 0 unless the config asks for another start.

        Args:
            linear: `torch.nn.Linear` or transformers' `Conv1D`.
            config: of the method, such as `WeGeFTConfig(r=16)`.
            adapter_name: its name.
            name: what the patterns in the config (`rank_pattern`, `enable_gift`) are to take for the layer's name.
            backend: "auto", "triton" or "reference"; None for the config's.
        """
        layer = cls(linear)
        layer.add_adapter(adapter_name, config, name=name, backend=backend)
        linear.requires_grad_(False)
        if config.bias != "none" and layer.bias is not None:
            layer.bias.requires_grad_(True)
        generator = layer.genft_generators[adapter_name]
        generator.to(torch.promote_types(next(generator.parameters()).dtype, torch.float32))
        return layer.train(linear.training)

    def add_adapter(
        self,
        adapter_name: str,
        config: GeneratorConfig,
        *,
        name: str = "",
        shared: nn.ModuleDict | None = None,
        backend: str | None = None,
    ) -> None:
        """Adds an adapter on the device and in the dtype of the base layer; active if it is the first.

        Args:
            adapter_name: its name, not taken yet.
            config: of the method.
            name: the layer's name in its model.
            shared: the adapter's shared factors in the model; None lets the layer own its parameters.
            backend: as in `from_linear`.
        """
        if not isinstance(config, GeneratorConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a config of genft_modules.METHODS")
        if adapter_name in self.genft_generators:
            raise ValueError(f"adapter_name: {adapter_name!r} exists already, expected a new name")
        if backend is not None:
            check_choice("backend", backend, BACKENDS)
        generator = config.build(name, self.in_features, self.out_features, shared)
        generator.backend = backend or config.backend
        if not self.genft_generators:
            self._active_adapter = adapter_name
        self.genft_generators[adapter_name] = generator.train(self.training)
        if (dtype := stored(self.base_layer).dtype) in FLOATS:
            for module in generator.modules_with_shared():
                module.to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, adapter_names: MixedBatch | Sequence[str] | None = None) -> Tensor:
        """y [..., N] in the dtype of x (under autocast, in the autocast dtype) from x [..., K].

        `adapter_names` has a name for each x[i], "__base__" for no adapter; the active adapters do not count then.
        """
        base = cast(Any, self._modules["base_layer"])
        if adapter_names is not None:
            return self._mixed_forward(x, mixed_batch(adapter_names))
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        generators = self._active_generators()
        if self._disable_adapters or self.merged_adapters or not generators:
            return cast(Tensor, base(x))
        weight = self._weight()
        if is_sharded(weight):
            if not self.plain_forward:
                raise TypeError(
                    f"base_layer: {type(base).__name__} makes its product in its own way, expected torch.nn.Linear or "
                    "transformers' Conv1D where the weight is sharded"
                )
            return sharded_forward(base, x, generators, self.transposed)
        backend, plain = generators[0].backend, self._is_plain(weight)
        forms = self._forms(generators, weight, plain)
        if plain:
            return apply(forms, x, weight, _tensor_of(base, "bias"), backend)
        return apply_around(base, forms, x, backend)

    def _forms(self, generators: list[Generator], weight: Tensor, plain: bool) -> list[Form]:
        """The update, as few forms side by side. In eval mode and without gradient they are kept, input edits as the
        low-rank updates that they are, so that W0 is read for its product alone."""
        keeping = not self.training and not torch.is_grad_enabled() and eager()
        key = [*generators, plain]
        if keeping and (kept := self.kept.forms(key)) is not None:
            return kept
        backend = generators[0].backend
        forms = side_by_side([generator.form(weight) for generator in generators], weight, backend)
        if keeping:
            if plain:
                forms = [form.low_rank(weight, backend) if isinstance(form, InputEdit) else form for form in forms]
            sources = [self.base_layer, *(module for one in generators for module in one.modules_with_shared())]
            self.kept.keep(key, forms, sources)
        return forms

    def train(self, mode: bool = True) -> FusedGenLinear:
        """As of `nn.Module`. What was kept for inference goes."""
        self.kept.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FusedGenLinear:
        self.kept.clear()
        super()._apply(fn, recurse)
        return self

    def _mixed_forward(self, x: Tensor, batch: MixedBatch) -> Tensor:
        """Input edits and low-rank updates of all adapters are one grouped operation each; an adapter whose ΔW has
        full rank takes its samples out of the batch."""
        base = self.base_layer
        batch.names_of(x.shape[0])
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        present = [name for name in batch.names if name in self.genft_generators]
        if self._disable_adapters or not present:
            return cast(Tensor, base(x))
        weight = self._weight()
        if is_sharded(weight):
            raise ValueError(f"adapter_names: got {batch.names}, expected None because the weight is sharded")
        backend = self._generator(present[0]).backend
        made = batch.made(self, weight)
        if made.edits is not None:
            x = x + batch.updates(made.edits, x, backend)
        if made.low_rank is None:
            y = base(x)
        elif self._is_plain(weight):
            _, p, q = made.low_rank
            rows = batch.rows(made.low_rank.adapters, x)
            y = grouped_lowrank_linear(x, weight, p, q, rows, base.bias, backend=backend)
        else:
            y = base(x) + batch.updates(made.low_rank, x, backend)
        for name, form in made.others.items():
            places = batch.samples(name, x)
            y = y.index_add(0, places, form.update(x.index_select(0, places), backend).to(y.dtype))
        return cast(Tensor, y)

    def _weight(self) -> Tensor:
        """W0 [N, K] as the base layer has it now; of a quantised one, what stands for it."""
        weight: Any = _tensor_of(self._modules["base_layer"], "weight")
        if (type(weight) not in _PLAIN_TENSORS or weight.dtype not in FLOATS) and is_quantised(self.base_layer):
            return cast(Tensor, QuantisedWeight(self.base_layer))
        return cast(Tensor, weight.t() if self.transposed else weight)

    def _active_generators(self) -> list[Generator]:
        # The plain dicts inside, here and in the next: this runs in every call of every layer.
        generators = cast(nn.Module, self._modules["genft_generators"])._modules
        return [cast(Generator, generators[name]) for name in self.active_adapters if name in generators]

    def _is_plain(self, weight: Tensor) -> bool:
        """Whether y = x W0ᵀ + b is all that the base layer does: no hook, no other forward, no other kind of weight."""
        base = cast(Any, self._modules["base_layer"])
        hooked = (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or "forward" in base.__dict__
        )
        return self.plain_forward and type(weight) in _PLAIN_TENSORS and not hooked

    def adapter_parameters(self, adapter_name: str = "default") -> dict[str, nn.Parameter]:
        """The parameters that make the adapter's ΔW, those shared with other layers included, by the released names."""
        return self._generator(adapter_name).adapter_parameters()

    def get_delta_weight(self, adapter_name: str = "default") -> Tensor:
        """ΔW [N, K], as `nn.Linear` orients it also where the base layer is a `Conv1D`; without dropout, in float32 or
        wider. While adapters are merged, it is still made from W0."""
        generator = self._generator(adapter_name)
        with torch.autocast(stored(self.base_layer).device.type, enabled=False):
            return generator.delta_weight(self.frozen_weight())

    def low_rank_factors(self, adapter_name: str = "default") -> tuple[Tensor, Tensor] | None:
        """A [r, K] and B [N, r] with B A = `get_delta_weight`, of the adapter's own rank r and not decomposed from ΔW;
        None where ΔW has full rank."""
        generator = self._generator(adapter_name)
        with torch.autocast(stored(self.base_layer).device.type, enabled=False):
            return generator.low_rank_factors(self.frozen_weight())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts W0 + Σ ΔW, summed in float32 or wider, in the place of W0.

        W0 itself is kept for `unmerge`, so a merged layer takes the memory of two weights; `merge_and_unload` lets W0
        of one layer go before it merges the next.

        Args:
            safe_merge: refuse a merged weight that is not finite.
            adapter_names: the adapters to merge; None for the active ones.

        Raises:
            TypeError: the weight is quantised.
            ValueError: `safe_merge` and the merged weight is not finite; the layer is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.genft_generators]
        if not names:
            return
        base = self.base_layer
        if type(weight := stored(base)) not in _PLAIN_TENSORS or weight.dtype not in FLOATS:
            raise TypeError(
                f"merge: {type(base).__name__} keeps a {type(weight).__name__} of {weight.dtype}, expected a plain "
                "floating-point weight: merge into the same model, loaded without quantisation"
            )
        original: Tensor = base.weight.data if self.original_weight is None else self.original_weight
        names = [*self.merged_adapters, *names]
        with torch.no_grad():
            merged = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
            for name in names:
                delta = self.get_delta_weight(name)
                merged += delta.t() if self.transposed else delta
            merged = merged.to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"safe_merge: the weight merged with {names} has elements that are not finite")
        if not self.merged_adapters:
            # A parameter of its own: another layer may share W0's (embeddings tied to a head) and is not to be merged.
            object.__setattr__(self, "original_parameter", base.weight)
            base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
        else:
            base.weight.data = merged
        self.original_weight = original
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Puts W0 back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        parameter: Any = self.original_parameter
        del self.original_parameter
        parameter.data = self.original_weight
        self.base_layer.weight = parameter
        self.original_weight = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True where `peft.convert_to_lora` fits: it expects ΔW of a Conv1D transposed."""
        return not self.transposed

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, active={self.active_adapters}"

    def _generator(self, adapter_name: str) -> Generator:
        if adapter_name not in self.genft_generators:
            raise ValueError(f"adapter_name: got {adapter_name!r}, expected one of {list(self.genft_generators)}")
        return cast(Generator, self.genft_generators[adapter_name])

    def frozen_weight(self) -> Tensor:
        """W0 [N, K] in floating point, also while adapters are merged."""
        if self.original_weight is not None:
            return self.original_weight.t() if self.transposed else self.original_weight
        weight: Any = self._weight()
        if is_sharded(weight):
            weight = weight.full_tensor()
        return cast(Tensor, weight.dequantised() if isinstance(weight, QuantisedWeight) else weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft for the adapter's own and shared factors, except for dtype: peft calls this after loading with
        low_cpu_mem_usage, too, where its cast to a half-precision base layer would cut a float32 adapter."""
        if adapter_name not in self.genft_generators:
            return
        for module in self._generator(adapter_name).modules_with_shared():
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(device or stored(self.base_layer).device)


def _tensor_of(layer: Any, name: str) -> Any:
    """A layer's attribute or None; of a parameter without `nn.Module.__getattr__`, which takes half a microsecond."""
    parameters = layer._parameters
    return parameters[name] if name in parameters else getattr(layer, name, None)
