"""What every method shares: the fields of its config, the contract of its generator, the sharing of tensors.

A method is one file beside this one: a config (a `GeneratorConfig`) whose `build` makes, for one layer, a `Generator`
that yields the form of the layer's update. Where a method is applied, how it is saved and merged is peft's business and
is written once, in `genft_modules.model.tuner` and `genft_modules.layer.linear`.
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
    """The peft name of one of our methods. peft's own enum is closed, but all that peft asks of a name is this."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"  # as peft's members print; peft's status report splits it


@dataclass
class GeneratorConfig(PeftConfig):
    """Where and how a method is applied: the fields that mean in every peft method what they mean here.

    Args:
        target_modules: names of the layers to adapt: a list (a name fits if it is the layer's name or its end), a
            regular expression (must match the whole name), "all-linear", or None for the architecture's usual ones.
        exclude_modules: names of layers to leave out, in the same way.
        modules_to_save: other modules to train and save in full, such as a new head.
        layers_to_transform: indices of the transformer layers to adapt; None for all. Needs a list of target_modules.
        layers_pattern: name of the `nn.ModuleList` that `layers_to_transform` counts in.
        bias: which biases of the base model train: "none", "all" or, as in "lora_only", the method's name and
            "_only" (those of the adapted layers).
        backend: what runs the operations: "auto" (Triton on a GPU, else the reference), "triton" or "reference".
            A matter of the machine: it is not saved.
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
                "string; say it in the regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: got {self.layers_pattern!r}, expected None because layers_to_transform is None"
            )
        check_choice("bias", self.bias, ("none", "all", f"{self.method}_only"))
        check_choice("backend", self.backend, BACKENDS)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved; names in order, so that the same config makes the same file."""
        fields: dict[str, Any] = super().to_dict()
        del fields["backend"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in peft; and the card beside it says what the adapter is and how to load it. Everything that saves one of
        our adapters ends here: `PeftModel.save_pretrained`, transformers' own, the Trainer's checkpoints."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in peft. `PeftModel.from_pretrained` begins here, so weights beside the config that are torn, or a pickle,
        are refused here, before the model has the adapter. Raises ValueError, naming the file."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if directory.is_dir():
            check_files(directory, weights=False)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> Generator:
        """The generator of one layer, its parameters initialised, on the CPU and in float32.

        Args:
            name: the layer's name in the model, "" for a layer on its own.
            in_features, out_features: K and N.
            shared: the adapter's shared factors, to read and to add to (see `share`); None for a layer on its own.
        """
        raise NotImplementedError

    def module_patterns(self) -> dict[str, list[str]]:
        """Field → patterns of layer names in it. The tuner warns about those that fit no adapted layer."""
        return {}


class Factors(nn.Module):
    """Parameters that one layer owns or several share. `sizes` is what layers must have in common to share them."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes


class Generator(nn.Module):
    """The adapter of one layer.

    Parameters of the layer's own are registered here. Shared ones live in the model's `shared_generators`; this module
    holds a reference to the *module* that has them (`refer`), because peft, FSDP and `load_state_dict(assign=True)`
    replace parameters, and does not register it, so that a checkpoint has them once.
    """

    backend = "auto"  # what runs its operations; the layer sets it

    def __init__(self) -> None:
        super().__init__()
        self.shared: tuple[Factors, ...] = ()

    def refer(self, name: str, factors: Factors, *, own: bool) -> None:
        """Makes `factors` self.<name>, registered only if it is this layer's own."""
        if own:
            self.add_module(name, factors)
        else:
            object.__setattr__(self, name, factors)  # which nn.Module's own would register
            self.shared = (*self.shared, factors)

    def form(self, weight: Tensor, *, dropout: bool = True) -> Form:
        """The form of ΔW for W0 `weight` [N, K]. `dropout`: False leaves every dropout out, also in training."""
        raise NotImplementedError

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K] without dropout, in float32 or wider."""
        return self.form(weight, dropout=False).delta_weight(weight)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """A [r, K] and B [N, r] with ΔW = B A without dropout, in float32 or wider; None where ΔW has full rank."""
        return self.form(weight, dropout=False).low_rank_factors(weight)

    def check_ready(self) -> None:
        """Raises ValueError, and says what is missing, where the adapter cannot be applied or saved yet."""

    def modules_with_shared(self) -> tuple[nn.Module, ...]:
        """This module and the factors that it only refers to."""
        return (self, *self.shared)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter that makes ΔW, own and shared, by the released code's name."""
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
    """The factors of `shared` under `key`, made by the first layer that asks.

    A layer whose sizes differ gets factors under a longer key, together with others of its sizes; or, if `told_by`
    names the field that told it to share, ValueError.
    """
    if key not in shared and hasattr(shared, key):
        key += "_"  # nn.ModuleDict refuses the names of its own attributes, such as "keys"
    if key in shared and (others := cast(Factors, shared[key]).sizes) != sizes:
        if told_by:
            raise ValueError(
                f"{told_by}: {layer} has {_sizes(sizes)}, expected {_sizes(others)} as the layers it joins"
            )
        key = "_".join([key, *(f"{size}{value}" for size, value in sizes.items())])
    if key not in shared:
        shared[key] = make()
    return cast(FactorsT, shared[key])


def module_type(name: str) -> str:
    """The last part of a layer's name: "q_proj" of "model.layers.0.self_attn.q_proj"."""
    return name.rpartition(".")[2]


def pattern_value(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The entry for layer `name` of a rank_pattern or alpha_pattern, by peft's matching."""
    return patterns.get(get_pattern_key(list(patterns), name), default)


def fits(pattern: str, name: str) -> bool:
    """Whether layer `name` is meant by `pattern`, by peft's matching: the expression fits the end of the name."""
    return bool(get_pattern_key([pattern], name) == pattern)


def row_blocks(field: str, patterns: dict[str, list[bool]], name: str, out_features: int) -> list[bool]:
    """The flags that `field` has for layer `name`: for each of the equal row blocks of its weight, adapted or not."""
    flags = next((flags for pattern, flags in patterns.items() if fits(pattern, name)), [True])
    if out_features % len(flags):
        raise ValueError(
            f"{field}: got {len(flags)} flags for {name or 'the layer'}, expected a number of row blocks that divides "
            f"its {out_features} output features"
        )
    return flags


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast off where a tensor is; the meta device has none. (Dynamo of torch 2.11 cannot trace
    `torch.amp.is_autocast_available`.)"""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext()


def beside(weight: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """The factors where W0 is. They are on one device; layers that share them may be spread over several."""
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
        raise TypeError(f"{field}: got {patterns!r}, expected a dict from layer name or regular expression to value")
    for pattern, value in patterns.items():
        check(f"{field}[{pattern!r}]", value)


def check_row_blocks(field: str, value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{field}: got {value!r}, expected a dict from layer name to flags")
    for name, flags in value.items():
        if not isinstance(flags, (list, tuple)) or not all(isinstance(flag, bool) for flag in flags):
            raise TypeError(f"{field}[{name!r}]: got {flags!r}, expected one True or False per row block")
        if not any(flags):
            raise ValueError(f"{field}[{name!r}]: got {flags!r}, expected at least one True")


def module_names(field: str, value: Any) -> Any:
    """Module names as peft keeps them: a string as it is, a list as a set."""
    if value is None or isinstance(value, (str, set)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return set(value)
    raise TypeError(f"{field}: got {value!r}, expected a list of names, a regular expression or None")


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sizes.items())
