"""Stock LoRA on genft's operations: the layers of `peft.LoraConfig` stay peft's, only their forward pass is replaced.

The replacement is an attribute `forward` of the layer, as accelerate's hooks are: class, parameters and state of the
layer do not change, and removing the attribute restores it. Each call looks at the state that the layer is in and
computes what it serves; everything else (merged or disabled adapters, other variants, wrapped factors) is peft's own
forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners import lora
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from genft_kernels import draw_seed, rescaled_linear, row_squares
from genft_kernels.checks import FLOATS, autocasting
from genft_kernels.operation import eager
from genft_kernels.plan import BACKENDS
from genft_modules.layer.adapted import PLAIN_FORWARDS, PLAIN_TENSORS, is_hooked, tensor_of
from genft_modules.layer.mixed import BASE, Updates, mixed_batch
from genft_modules.methods.base import without_autocast
from genft_modules.methods.checks import check_choice
from genft_modules.methods.forms import LowRank, apply, apply_around, side_by_side
from genft_modules.methods.weights import weight_features

# Where peft's layers of quantised bases are, whose forward pass is that of LoRA on a linear layer.
_QUANTISED = {
    "peft.tuners.lora.bnb": ("Linear8bitLt", "Linear4bit"),
    "peft.tuners.lora.gptq": ("GPTQLoraLinear",),
    "peft.tuners.lora.awq": ("AwqLoraLinear",),
    "peft.tuners.lora.aqlm": ("AqlmLoraLinear",),
    "peft.tuners.lora.eetq": ("EetqLoraLinear",),
    "peft.tuners.lora.hqq": ("HqqLoraLinear",),
}


@dataclass(frozen=True)
class FusedLayer:
    """What `fuse_lora` did with a LoRA layer.

    Attributes:
        name: the layer's name in the model.
        fused: whether it runs on genft's operations.
        reason: why it does not, or which of its adapters peft still computes; "" if there is nothing to say.
    """

    name: str
    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {'fused' if self.fused else 'not fused'}{self.reason and f' ({self.reason})'}"


def fuse_lora(model: nn.Module, *, backend: str = "auto") -> list[FusedLayer]:
    """Let the linear LoRA layers of peft in `model` compute forward and backward as one of genft's operations.

    The layers stay peft's: class, parameters, state dict, files, merging, hot-swapping, `set_adapter`, adding and
    deleting adapters. Served are LoRA on linear layers, also quantised ones, with dropout (without storing a mask),
    any scale, initialisation and bias, several active adapters, one adapter per sample (`adapter_names`), and DoRA.
    Whatever a layer's state is not served is computed by peft, as before.

    A second call also fuses layers that were added since. `unfuse_lora` restores peft's forward pass.

    Args:
        model: a `PeftModel`, or any module with LoRA layers, such as a model of transformers after `add_adapter`.
        backend: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns:
        One `FusedLayer` per LoRA layer, in the order of `named_modules`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `backend` is unknown, or the model has no LoRA layers.
    """
    check_choice("backend", backend, BACKENDS)
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(
            f"model: got a {type(model).__name__} without LoRA layers, expected one from peft.get_peft_model(model, "
            "LoraConfig(...))"
        )
    found = []
    for name, layer in layers:
        reason = _refusal(layer)
        if not reason:
            FusedForward.onto(layer, backend)
            reason = "; ".join(_left_to_peft(layer))
            found.append(FusedLayer(name, True, reason))
        else:
            found.append(FusedLayer(name, False, reason))
    return found


def unfuse_lora(model: nn.Module) -> None:
    """Give every layer that `fuse_lora` has changed its own forward pass back. Raises TypeError if `model` is no
    module."""
    for _, layer in _lora_layers(model):
        if isinstance(layer.__dict__.get("forward"), FusedForward):
            del layer.forward, layer._replicate_for_data_parallel


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)]


def _refusal(layer: Any) -> str:
    """Why the layer cannot be fused; "" if it can."""
    forward = type(layer).forward
    quantised = getattr(forward, "__qualname__", "").removesuffix(".forward") in _QUANTISED.get(forward.__module__, ())
    if forward is not lora.Linear.forward and not quantised:
        return f"{type(layer).__name__} is no plain LoRA of a linear layer"
    if "forward" in layer.__dict__ and not isinstance(layer.forward, FusedForward):
        return "its forward was replaced by something else, such as accelerate's hooks"
    left = _left_to_peft(layer)
    return "; ".join(left) if len(left) == len(layer.lora_A) else ""


def _left_to_peft(layer: Any) -> list[str]:
    """The adapters that are computed by peft, each with its reason."""
    return [
        f"adapter {name!r} is a {type(variant).__name__}"
        for name, variant in layer.lora_variant.items()
        if type(variant) is not DoraLinearVariant
    ]


class FusedForward:
    """The forward pass of one of peft's LoRA layers; `layer.forward` while it is fused.

    It refers to the layer weakly: a model that is deleted is freed at once. Copies and pickles of the layer have one of
    their own.
    """

    def __init__(self, layer: Any, backend: str) -> None:
        self.layer = weakref.ref(layer)
        self.backend = backend
        self._squares: tuple[Any, ...] | None = None

    @classmethod
    def onto(cls, layer: Any, backend: str) -> None:
        """Replace the forward pass of `layer`, and of its replicas for DataParallel, which share its attributes."""
        forward = cls(layer, backend)
        layer.forward, layer._replicate_for_data_parallel = forward, forward.replicate

    def replicate(self) -> Any:
        replica = nn.Module._replicate_for_data_parallel(self.layer())  # type: ignore[arg-type]
        self.onto(replica, self.backend)
        return replica

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedForward, (self.layer(), self.backend)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layer()
        y = None
        if not args and not layer.merged_adapters and not layer._disable_adapters and _is_plain(x):
            names = kwargs.get("adapter_names")
            if names is None and not kwargs:
                y = self._active(layer, x)
            elif names is not None and len(kwargs) == 1:
                y = self._mixed(layer, x, names)
        elif layer.merged_adapters:
            self._squares = None  # peft merges through `.data`, which no version counter sees
        return cast(Tensor, type(layer).forward(layer, x, *args, **kwargs)) if y is None else y

    def _active(self, layer: Any, x: Tensor) -> Tensor | None:
        """y with the active adapters; None if peft has to compute it."""
        modules = layer._modules  # direct access, because this runs in every call of every layer
        known = modules["lora_A"]._modules
        names = [name for name in layer.active_adapters if name in known]
        adapters = [_Adapter.of(layer, name, x) for name in names]
        if not adapters or None in adapters:
            return None
        found = cast("list[_Adapter]", adapters)
        base = modules["base_layer"]
        weight = _weight(base, x)
        if layer.lora_variant and any(name in layer.lora_variant for name in names):
            return self._rescaled(layer, names[0], found[0], x, weight) if len(names) == 1 else None
        biases = [adapter.bias * adapter.scale for adapter in found if adapter.bias is not None]
        if weight is None:
            forms = side_by_side([adapter.form() for adapter in found], x, self.backend)
            y = apply_around(base, forms, x, x, self.backend)  # low rank reads no W0
            return y + torch.stack(biases).sum(0).to(y.dtype) if biases else y
        forms = side_by_side([adapter.form() for adapter in found], weight, self.backend)
        bias = tensor_of(base, "bias")
        if biases:
            total = torch.stack(biases).sum(0)
            bias = (total if bias is None else bias + total).to(weight.dtype)
        return apply(forms, x, weight, bias, self.backend)

    def _rescaled(self, layer: Any, name: str, adapter: _Adapter, x: Tensor, weight: Tensor | None) -> Tensor | None:
        """y with one DoRA adapter; None if peft has to compute it."""
        magnitude = layer.lora_magnitude_vector._modules.get(name)
        if weight is None or adapter.bias is not None or type(magnitude) is not DoraLinearLayer or is_hooked(magnitude):
            return None
        if magnitude._dora_cache or (dora.ENABLE_DORA_CACHING and not magnitude.training):
            return None  # the user wants peft's cache of norms, which only peft fills and clears
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Rounded as in peft, so that gain is 1 where the update is 0. As in peft, no gradient goes through the norm.
        norm = self._norm(layer, adapter, weight).to(adapter.a.dtype)
        gain = magnitude.weight.to(wide) / norm.to(wide)
        return rescaled_linear(
            x,
            weight,
            adapter.a.t(),
            adapter.b,
            gain,
            tensor_of(layer.base_layer, "bias"),
            scale=adapter.scale,
            dropout=adapter.dropout,
            seed=draw_seed(x.device) if adapter.dropout else None,
            backend=self.backend,
        )

    @torch.no_grad()
    def _norm(self, layer: Any, adapter: _Adapter, weight: Tensor) -> Tensor:
        """‖W0 + s B A‖ of each row [N], from ‖W0‖², W0 Aᵀ [N,r] and A Aᵀ [r,r], in float32 or wider."""
        with without_autocast(weight):
            squares = self._row_squares(layer, weight)
            a, b = adapter.a.to(squares.dtype), adapter.b.to(squares.dtype)
            cross = weight_features(weight, a, backend=self.backend)
            update = cross.mul(2.0).add_(b @ (a @ a.t()), alpha=adapter.scale).mul_(b).sum(1)
            return squares.add(update, alpha=adapter.scale).clamp_min_(0.0).sqrt_()

    def _row_squares(self, layer: Any, weight: Tensor) -> Tensor:
        """‖W0‖² of each row, kept until W0 changes."""
        stored = tensor_of(layer.base_layer, "weight")
        if not eager(weight) or stored.is_inference():  # inference tensors have no version counter
            return row_squares(weight)
        key = (stored._version, stored.data_ptr())
        if self._squares is None or self._squares[0] is not stored or self._squares[1] != key:
            self._squares = (stored, key, row_squares(weight))
        return cast(Tensor, self._squares[2])

    def _mixed(self, layer: Any, x: Tensor, names: Sequence[str]) -> Tensor | None:
        """y with one adapter per sample, as one grouped operation; None if peft has to compute it."""
        known = layer.lora_A._modules
        chosen = dict.fromkeys(name for name in names if name in known and name != BASE)
        if not chosen or x.dim() < 2:
            return None
        adapters = {name: _Adapter.of(layer, name, x) for name in chosen}
        for name, adapter in adapters.items():
            if adapter is None or adapter.bias is not None or adapter.dropout or name in layer.lora_variant:
                return None
        batch, base = mixed_batch(names), layer.base_layer
        weight = _weight(base, x)
        forms = {name: cast(_Adapter, one).form() for name, one in adapters.items()}
        if len(forms) == 1 and len(set(names)) == 1:  # without what mixing costs
            one = list(forms.values())
            if weight is None:
                return apply_around(base, one, x, x, self.backend)
            return apply(one, x, weight, tensor_of(base, "bias"), self.backend)
        updates = Updates.of(forms)
        if weight is None:
            return cast(Tensor, base(x)) + batch.linear(updates, x, None, None, self.backend)
        return batch.linear(updates, x, weight, tensor_of(base, "bias"), self.backend)


class _Adapter(NamedTuple):
    """One adapter of a layer: ΔW = scale·B A with a = A [r, K] and b = B [N, r]; bias [N] before the scale."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float
    dropout: float

    @classmethod
    def of(cls, layer: Any, name: str, x: Tensor) -> _Adapter | None:
        """The adapter `name`; None if peft has to compute it: another variant, factors that are hooked, wrapped or
        sharded, or of a dtype that the operations do not combine with x."""
        a, b, drop = (layer._modules[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
        if (
            type(layer.lora_variant.get(name)) not in (type(None), DoraLinearVariant)
            or type(a) is not nn.Linear
            or type(b) is not nn.Linear
            or type(drop) not in (nn.Identity, nn.Dropout)
            or is_hooked(a)
            or is_hooked(b)
            or is_hooked(drop)
        ):
            return None
        factors = tensor_of(a, "weight"), tensor_of(b, "weight")
        for factor in factors:
            if type(factor) not in PLAIN_TENSORS or not _fits(factor, x):
                return None
        dropout = drop.p if type(drop) is nn.Dropout and drop.training else 0.0
        if dropout >= 1.0:
            return None
        bias, scale = tensor_of(b, "bias"), layer.scaling[name]
        if isinstance(scale, Tensor):  # of a model prepared for hot-swapping: read on the device, never compiled in
            factors = (factors[0], factors[1] * scale.to(factors[1]))
            return cls(*factors, bias if bias is None else bias * scale.to(bias), 1.0, dropout)
        return cls(*factors, bias, float(scale), dropout)

    def form(self) -> LowRank:
        return LowRank(self.a.t(), self.b, self.scale, self.dropout)


def _fits(factor: Tensor, x: Tensor) -> bool:
    return factor.dtype == x.dtype or factor.dtype == torch.float32 or (autocasting(x) and factor.dtype in FLOATS)


def _is_plain(x: Any) -> bool:
    return type(x) in PLAIN_TENSORS and x.dtype in FLOATS and x.layout is torch.strided and not x.is_nested


def _weight(base: Any, x: Tensor) -> Tensor | None:
    """W0 [N, K] if the base layer only computes y = x W0ᵀ + b with a frozen W0: no hooks, custom forward, or special
    weight; else None."""
    if type(base).forward not in PLAIN_FORWARDS or is_hooked(base):
        return None
    weight: Any = tensor_of(base, "weight")
    if type(weight) not in PLAIN_TENSORS or weight.device != x.device:
        return None
    if weight.requires_grad:
        if torch.is_grad_enabled():
            return None  # it trains, or is a view of a flat parameter that does
        weight = weight.detach()
    if weight.dtype != x.dtype and not (autocasting(x) and weight.dtype in FLOATS):
        return None
    return cast(Tensor, weight.t() if isinstance(base, Conv1D) else weight)
