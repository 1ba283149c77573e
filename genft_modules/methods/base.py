"""Base classes of the methods: config, generator, and shared tensors.

A method is one file in this package: a `GeneratorConfig` whose `build` creates a `Generator` for one layer, which
returns the form of the layer's update. Injection, saving and merging are common to all methods: see
`genft_modules.model.tuner` and `genft_modules.layer.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from genft_kernels.plan import BACKENDS
from genft_modules.card import write_card
from genft_modules.files import check_files
from genft_modules.methods.forms import Form

FactorsT = TypeVar("FactorsT", bound="Factors")


class MethodType(str):
    """The peft type of one of our methods. A stand-in for a member of peft's PeftType, which cannot be extended."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # same format as PeftType; peft's get_model_status splits it


@dataclass
class GeneratorConfig(PeftConfig):
    """Base class of the method configs, with the fields common to all peft methods.

    Args:
        target_modules: names of the layers to adapt: a list (matches the full name or its last components), a regular
            expression (must match the full name), "all-linear", or None for the architecture's default layers.
        exclude_modules: names of layers to exclude, in the same format.
        modules_to_save: other modules to train and save in full, such as a new head.
        layers_to_transform: indices of the transformer layers to adapt; None for all. Requires a target_modules list.
        layers_pattern: name of the `nn.ModuleList` that `layers_to_transform` refers to.
        bias: which biases of the base model are trainable: "none", "all", or "<method>_only", such as "lora_only",
            for those of the adapted layers.
        backend: "auto" (Triton on a GPU, else the reference), "triton" or "reference". Not saved, because it depends
            on the machine.
    """

    method: ClassVar[str]  # the name in METHODS; the peft type is GENFT_<METHOD>

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodType(f"GENFT_{self.method.upper()}")
        self.target_modules = module_names("target_modules", self.target_modules)
        self.exclude_modules = module_names("exclude_modules", self.exclude_modules)
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform: got {self.layers_to_transform!r}, expected None because target_modules is a "
                "string; select the layers in the regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: got {self.layers_pattern!r}, expected None because layers_to_transform is None"
            )
        check_choice("bias", self.bias, ("none", "all", f"{self.method}_only"))
        check_choice("backend", self.backend, BACKENDS)

    def to_dict(self) -> dict[str, Any]:
        """The saved fields, with sets sorted so that equal configs give equal files."""
        fields: dict[str, Any] = super().to_dict()
        del fields["backend"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in peft, and writes the model card. `PeftModel.save_pretrained`, transformers' and the Trainer's
        checkpoints all call this."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in peft. `PeftModel.from_pretrained` calls this first, so corrupt or pickled weights next to the config
        are rejected here, before the model is changed. Raises ValueError, naming the file."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if directory.is_dir():
            check_files(directory, weights=False)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> Generator:
        """Create the generator of one layer, initialised, on the CPU and in float32.

        Args:
            name: the layer's name in the model, "" for a single layer.
            in_features, out_features: K and N.
            shared: the adapter's shared factors, read and extended (see `share`); None for a single layer.
        """
        raise NotImplementedError

    def module_patterns(self) -> dict[str, list[str]]:
        """Field → its patterns of layer names. The tuner warns about patterns that match no adapted layer."""
        return {}


class Factors(nn.Module):
    """Parameters owned by one layer or shared by several. Layers can only share them if their `sizes` are equal."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes


class Generator(nn.Module):
    """The adapter of one layer.

    The layer's own parameters are registered here. Shared ones are in the model's `shared_generators`; this module
    holds an unregistered reference (`refer`) to the *module* with the parameters: unregistered so that a checkpoint
    contains them once, to the module because peft, FSDP and `load_state_dict(assign=True)` replace parameters.
    """

    backend = "auto"  # set by the layer

    def __init__(self) -> None:
        super().__init__()
        self.shared: tuple[Factors, ...] = ()

    def refer(self, name: str, factors: Factors, *, own: bool) -> None:
        """Set self.<name> to `factors`, registered only if this layer owns them."""
        if own:
            self.add_module(name, factors)
        else:
            object.__setattr__(self, name, factors)  # nn.Module.__setattr__ would register it
            self.shared = (*self.shared, factors)

    def form(self, weight: Tensor, *, dropout: bool = True) -> Form:
        """The form of ΔW for W0 `weight` [N, K]. `dropout=False` disables dropout even in training mode."""
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K] without dropout, in float32 or wider."""
        return self.form(weight, dropout=False).delta_weight(weight)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """A [r, K] and B [N, r] with ΔW = B A without dropout, in float32 or wider; None if ΔW has full rank."""
        return self.form(weight, dropout=False).low_rank_factors(weight)

    def check_ready(self) -> None:
        """Raises ValueError if the adapter cannot be applied or saved yet."""

    def modules_with_shared(self) -> tuple[nn.Module, ...]:
        """This module and the shared factors it refers to."""
        return (self, *self.shared)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of ΔW, own and shared, by their names in the released code."""
        return dict(self.named_parameters())


def share(
    shared: nn.ModuleDict,
    key: str,
    layer: str,
    make: Callable[[], FactorsT],
    sizes: dict[str, int],
    *,
    told_by: str = "",
) -> FactorsT:
    """The factors of `shared` under `key`, created on first use.

    Layers of other sizes share under a longer key; or, if sharing was requested by the field `told_by`, ValueError is
    raised.
    """
    if key not in shared and hasattr(shared, key):
        key += "_"  # nn.ModuleDict does not allow its attribute names, such as "keys"
    if key in shared and (others := cast(Factors, shared[key]).sizes) != sizes:
        if told_by:
            raise ValueError(
                f"{told_by}: {layer} has {_sizes(sizes)}, expected {_sizes(others)} as in the layers it shares with"
            )
        key = "_".join([key, *(f"{size}{value}" for size, value in sizes.items())])
    if key not in shared:
        shared[key] = make()
    return cast(FactorsT, shared[key])


def module_type(name: str) -> str:
    """The last component of a layer's name: "q_proj" for "model.layers.0.self_attn.q_proj"."""
    return name.rpartition(".")[2]


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The entry of a rank_pattern or alpha_pattern for layer `name`, matched as in peft."""
    return patterns.get(get_pattern_key(list(patterns), name), default)


def fits(pattern: str, name: str) -> bool:
    """Whether `pattern` matches layer `name` as in peft: the regular expression matches the end of the name."""
    return bool(get_pattern_key([pattern], name) == pattern)


def row_blocks(field: str, patterns: dict[str, list[bool]], name: str, out_features: int) -> list[bool]:
    """The flags of `field` for layer `name`: whether each of the equal row blocks of its weight is adapted."""
    flags = next((flags for pattern, flags in patterns.items() if fits(pattern, name)), [True])
    if out_features % len(flags):
        raise ValueError(
            f"{field}: got {len(flags)} flags for {name or 'the layer'}, expected a divisor of its "
            f"{out_features} output features"
        )
    return flags


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Disable autocast on the tensor's device; the meta device has no autocast. (Dynamo of torch 2.11 cannot trace
    `torch.amp.is_autocast_available`.)"""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext()


def beside(weight: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """The factors on the device of W0. Layers that share factors may be on several devices."""
    if factors[0].device == weight.device:
        return factors
    return tuple(factor.to(weight.device) for factor in factors)


# ---- checks of fields


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}: got {value!r}, expected one of {choices}")


def check_rank(field: str, value: object, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field}: got {value!r}, expected an integer >= {least}")
    if value < least:
        raise ValueError(f"{field}: got {value}, expected an integer >= {least}")


def check_number(field: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{field}: got {value!r}, expected a number")


def check_dropout(field: str, value: object) -> None:
    check_number(field, value)
    if not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ValueError(f"{field}: got {value}, expected 0 <= {field} < 1")


def check_patterns(field: str, patterns: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(patterns, dict):
        raise TypeError(f"{field}: got {patterns!r}, expected a dict of layer names or regular expressions to values")
    for pattern, value in patterns.items():
        check(f"{field}[{pattern!r}]", value)


def check_row_blocks(field: str, value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{field}: got {value!r}, expected a dict of layer names to lists of bool")
    for name, flags in value.items():
        if not isinstance(flags, (list, tuple)) or not all(isinstance(flag, bool) for flag in flags):
            raise TypeError(f"{field}[{name!r}]: got {flags!r}, expected one bool per row block")
        if not any(flags):
            raise ValueError(f"{field}[{name!r}]: got {flags!r}, expected at least one True")


def module_names(field: str, value: Any) -> Any:
    """Module names as in peft: a string as it is, a list as a set."""
    if value is None or isinstance(value, (str, set)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return set(value)
    raise TypeError(f"{field}: got {value!r}, expected a list of names, a regular expression or None")


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sizes.items())
