"""FusedGenLinear: a frozen linear layer with its adapters, applied in one fused operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from genft_kernels.checks import FLOATS, autocast, check_tensor
from genft_kernels.dither import dithered_edit
from genft_kernels.operation import eager
from genft_kernels.sharded import is_sharded
from genft_modules.layer.adapted import (
    PLAIN_FORWARDS,
    PLAIN_TENSORS,
    AdaptedLayer,
    is_hooked,
    refuse_quantised,
    tensor_of,
    with_updates,
)
from genft_modules.layer.kept import Kept
from genft_modules.layer.mixed import MixedBatch, mixed_batch
from genft_modules.layer.sharded import frozen_view, sharded_forward
from genft_modules.methods import Generator, GeneratorConfig
from genft_modules.methods.base import without_autocast
from genft_modules.methods.forms import Form, InputEdit, LowRank, apply, apply_around, side_by_side
from genft_modules.methods.weights import QuantisedWeight, can_be_base, features_of, is_quantised, stored


class FusedGenLinear(AdaptedLayer):
    """y = x (W0 + ΔW)ᵀ + b [..., N] for x [..., K]: `base_layer` with the updates of its active adapters.

    The forward pass is one operation of `genft_kernels` for any number of active adapters (plus one for each additional
    adapter with a generated ΔW, and for each different dropout on x). If the base layer is quantised or has hooks, it
    computes its own product and the update is applied around it. Methods that read a quantised W0 dequantise it
    temporarily, in panels if the layer supports it, see `genft_modules.methods.weights`; methods that edit the input
    (WeGeFT, GIFT) do not read it.

    Create one with `FusedGenLinear.from_linear` for a single layer, or `peft.get_peft_model` for a model.

    Args:
        base_layer: `torch.nn.Linear` or transformers' `Conv1D` without adapters; may be quantised by bitsandbytes,
            torchao, HQQ, or another package whose layers have in_features, out_features and a packed weight, such as
            GPTQ.

    Raises:
        TypeError: `base_layer` is any other layer.
    """

    base_layer: Any  # nn.Linear, Conv1D or a quantised one
    original_weight: Tensor | None
    original_parameter: nn.Parameter  # the base layer's while adapters are merged

    def __init__(self, base_layer: nn.Module) -> None:
        if isinstance(base_layer, BaseTunerLayer) or not (
            isinstance(base_layer, (nn.Linear, Conv1D)) or can_be_base(base_layer)
        ):
            raise TypeError(
                f"base_layer: got {type(base_layer).__name__}, expected torch.nn.Linear or transformers' Conv1D"
            )
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise TypeError(
                "base_layer: got the out_proj of an nn.MultiheadAttention, which is never called, so an adapter would "
                'have no effect; use exclude_modules=["out_proj"]'
            )
        super().__init__(base_layer)
        self.plain_forward = type(base_layer).forward in PLAIN_FORWARDS
        self.transposed = isinstance(base_layer, Conv1D)  # Conv1D stores W0ᵀ [K, N]
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features, self.out_features = features_of(base_layer)
        self.kept = Kept()
        # W0 while adapters are merged. A buffer, to move with the layer; not saved.
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
        """Wrap `linear` in a layer with one adapter. `linear` is frozen and not copied.

        The adapter owns its parameters, regardless of sharing options in the config. They are float32, or float64 for a
        float64 weight, and ΔW = 0 unless the config specifies another initialisation.

        Args:
            linear: `torch.nn.Linear` or transformers' `Conv1D`.
            config: config of the method, such as `WeGeFTConfig(r=16)`.
            adapter_name: name of the adapter.
            name: the layer's name for patterns in the config (`rank_pattern`, `enable_gift`).
            backend: "auto", "triton" or "reference"; None for the config's.
        """
        layer = cls(linear)
        layer.add_adapter(adapter_name, config, name=name, backend=backend)
        layer._on_its_own(adapter_name)
        if config.bias != "none" and layer.bias is not None:
            layer.bias.requires_grad_(True)
        return layer

    def add_adapter(
        self,
        adapter_name: str,
        config: GeneratorConfig,
        *,
        name: str = "",
        shared: nn.ModuleDict | None = None,
        backend: str | None = None,
    ) -> None:
        """Add an adapter with the device and dtype of the base layer. The first one becomes active.

        Args:
            adapter_name: a new name.
            config: config of the method.
            name: the layer's name in its model.
            shared: the adapter's shared factors in the model; None if the layer owns its parameters.
            backend: as in `from_linear`.
        """
        self._check_new(adapter_name, config, backend)
        generator = config.build(name, self.in_features, self.out_features, shared)
        self._add(adapter_name, generator, config, backend)

    def forward(self, x: Tensor, adapter_names: MixedBatch | Sequence[str] | None = None) -> Tensor:
        """y [..., N] from x [..., K], in the dtype of x (under autocast, in the autocast dtype).

        `adapter_names` has one name per sample x[i], "__base__" for no adapter; it replaces the active adapters.
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
                    f"base_layer: got {type(base).__name__} with a sharded weight, expected torch.nn.Linear or "
                    "transformers' Conv1D"
                )
            return sharded_forward(base, x, generators, self.transposed)
        backend, plain = generators[0].backend, self._is_plain(weight)
        forms = self._forms(generators, weight, plain)
        if plain:
            return apply(forms, x, weight, tensor_of(base, "bias"), backend)
        check_tensor("x", x)
        return apply_around(base, forms, x, weight, backend)

    def _forms(self, generators: list[Generator], weight: Tensor, plain: bool) -> list[Form]:
        """The update in as few forms as possible. In eval mode without gradients they are cached, input edits in their
        low-rank form, so that W0 is read only for the product."""
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
        """As in `nn.Module`; also clears the inference cache."""
        self.kept.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FusedGenLinear:
        self.kept.clear()
        super()._apply(fn, recurse)
        return self

    def _mixed_forward(self, x: Tensor, batch: MixedBatch) -> Tensor:
        """The input edits of all adapters are one grouped operation, the low-rank updates another; updates of full rank
        or with dropout on x are applied per adapter to its samples."""
        base: Any = self._modules["base_layer"]
        check_tensor("x", x)
        if x.shape[0] != len(batch.names):
            batch.names_of(x.shape[0])
        if self.merged_adapters:
            self._refuse_mixed_merged()
        # Direct access to _modules because this runs in every call of every layer.
        known = cast(nn.Module, self._modules["genft_generators"])._modules
        present = [name for name in batch.adapters if name in known]
        if self._disable_adapters or not present:
            return cast(Tensor, base(x))
        weight = self._weight()
        if is_sharded(weight):
            raise ValueError(f"adapter_names: got {batch.names}, expected None because the weight is sharded")
        generator = cast(Generator, known[present[0]])
        backend = generator.backend
        if batch.single and self.training:  # one adapter for all, without what mixing costs
            with batch.dropout_of(present[0], self, x.device):
                form = generator.form(weight)
            with batch.dropout_of(present[0], self, x.device, draw=1):
                return self._applied(form, x, weight, backend)
        if batch.single:
            form = generator.form(weight, dropout=False)
            if isinstance(form, LowRank):
                return self._applied(form, x, weight, backend)
        made = batch.made(self, weight)
        alone = []
        for name, form in made.others.items():
            places = batch.samples(name, x)
            with batch.dropout_of(name, self, x.device, draw=1):
                alone.append((places, self._applied(form, x.index_select(0, places), weight, backend)))
        if sum(len(places) for places, _ in alone) == x.shape[0]:
            return torch.cat([y for _, y in alone])[torch.cat([places for places, _ in alone]).argsort()]
        if made.edits is not None:
            (x,) = autocast(x)
            x = dithered_edit(x, partial(batch.linear, made.edits, weight=None, bias=None, backend=backend))
        if made.low_rank is None:
            y = base(x)
        elif self._is_plain(weight):
            y = batch.linear(made.low_rank, x, weight, base.bias, backend)
        else:
            y = base(x) + batch.linear(made.low_rank, x, None, None, backend)
        for places, own in alone:
            y = y.index_copy(0, places, own.to(y.dtype))
        return cast(Tensor, y)

    def _applied(self, form: Form, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        """The layer with one update."""
        if self._is_plain(weight):
            return apply([form], x, weight, self.base_layer.bias, backend)
        return apply_around(self.base_layer, [form], x, weight, backend)

    def _weight(self) -> Tensor:
        """The current W0 [N, K] of the base layer; a `QuantisedWeight` if it is quantised."""
        weight: Any = tensor_of(self._modules["base_layer"], "weight")
        if (type(weight) not in PLAIN_TENSORS or weight.dtype not in FLOATS) and is_quantised(self.base_layer):
            return cast(Tensor, QuantisedWeight(self.base_layer))
        if weight.dim() != 2:
            raise ValueError(
                f"base_layer: its weight has shape {tuple(weight.shape)}, as in a layer that FSDP wraps by itself; "
                "expected FSDP of whole blocks (auto_wrap_policy), or fully_shard"
            )
        if weight.requires_grad and not weight.is_leaf:
            weight = frozen_view(weight)
        return cast(Tensor, weight.t() if self.transposed else weight)

    def _is_plain(self, weight: Tensor) -> bool:
        """Whether the base layer only computes y = x W0ᵀ + b: no hooks, custom forward, or special weight."""
        # Direct access to _modules because this runs in every call of every layer.
        base = cast(Any, self._modules["base_layer"])
        return self.plain_forward and type(weight) in PLAIN_TENSORS and not is_hooked(base)

    def get_delta_weight(self, adapter_name: str = "default") -> Tensor:
        """ΔW [N, K], in the orientation of `nn.Linear` also for a `Conv1D`; without dropout, in float32 or wider.
        Always computed from the original W0, even while adapters are merged."""
        generator = self._generator(adapter_name)
        with without_autocast(stored(self.base_layer)):
            return generator.delta_weight(self.frozen_weight())

    def low_rank_factors(self, adapter_name: str = "default") -> tuple[Tensor, Tensor] | None:
        """A [r, K] and B [N, r] with B A = `get_delta_weight`, exact and of the adapter's rank r; None if ΔW has full
        rank."""
        generator = self._generator(adapter_name)
        with without_autocast(stored(self.base_layer)):
            return generator.low_rank_factors(self.frozen_weight())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W0 by W0 + Σ ΔW, summed in float32 or wider.

        W0 is kept for `unmerge`, so a merged layer needs the memory of two weights; `merge_and_unload` frees W0 of each
        layer before it merges the next.

        Args:
            safe_merge: check that the merged weight is finite.
            adapter_names: the adapters to merge; None for the active ones.

        Raises:
            TypeError: the weight is quantised.
            ValueError: with `safe_merge`, the merged weight is not finite; the layer is unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.genft_generators]
        if not names:
            return
        base = self.base_layer
        refuse_quantised(base, stored(base))
        original: Tensor = base.weight.data if self.original_weight is None else self.original_weight
        names = [*self.merged_adapters, *names]
        with torch.no_grad():
            deltas = (self.get_delta_weight(name) for name in names)
            merged = with_updates(original, (delta.t() if self.transposed else delta for delta in deltas))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(  # in peft's words
                f"safe_merge: NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
            )
        if not self.merged_adapters:
            # A new parameter, because W0 may be tied to another layer, such as the embeddings.
            object.__setattr__(self, "original_parameter", base.weight)
            base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
        else:
            base.weight.data = merged
        self.original_weight = original
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Restore W0 exactly."""
        if self._warn_if_unmerged():
            return
        parameter: Any = self.original_parameter
        del self.original_parameter
        parameter.data = self.original_weight
        self.base_layer.weight = parameter
        self.original_weight = None
        self.merged_adapters = []

    def originals(self) -> dict[str, Tensor]:
        return {} if self.original_weight is None else {"weight": self.original_weight}

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` supports the layer: not for Conv1D, where it expects ΔW transposed."""
        return not self.transposed

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, active={self.active_adapters}"

    def frozen_weight(self) -> Tensor:
        """W0 [N, K] in floating point, even while adapters are merged."""
        if self.original_weight is not None:
            return self.original_weight.t() if self.transposed else self.original_weight
        weight: Any = self._weight()
        if is_sharded(weight):
            weight = weight.full_tensor()
        return cast(Tensor, weight.dequantised() if isinstance(weight, QuantisedWeight) else weight)
