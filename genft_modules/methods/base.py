"""Base classes of the methods: config, generator, and shared tensors.

A method is one file in this package: a `GeneratorConfig` whose `build` creates a `Generator` for one layer, which
returns the form of the layer's update. Injection, saving and merging are common to all methods: see
`genft_modules.model.tuner` and `genft_modules.layer.linear`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn

from genft_kernels.plan import BACKENDS
from genft_modules.card import write_card
from genft_modules.files import CONFIG, check_files, refuse_pickle
from genft_modules.methods.checks import (
    check_choice,
    check_flag,
    check_names,
    check_rank,
    check_text,
    module_names,
    one_line,
    shown,
)
from genft_modules.methods.forms import Form
from genft_modules.methods.patterns import check_expressions, fits

LARGEST_CONFIG = 2**22  # bytes
IMPORT = "genft_modules"

FactorsT = TypeVar("FactorsT", bound="Factors")
ConfigT = TypeVar("ConfigT", bound="GeneratorConfig")


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
        import_first: no option, always "genft_modules". It is in the file for those who open it, because peft knows the
            method only after that import and otherwise raises a KeyError.
    """

    method: ClassVar[str]  # the name in METHODS; the peft type is GENFT_<METHOD>
    ranks: ClassVar[Mapping[str, str]]  # field with a rank → field with its patterns, "" if there is none
    # Fields in which an adapter may differ from one whose place it takes in a compiled model, besides `ranks`: its
    # initialisation, its training, and the scale of ΔW. All others are taken to be part of the graph.
    free: ClassVar[tuple[str, ...]] = ()

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    backend: str = "auto"
    import_first: str = IMPORT

    def __post_init__(self) -> None:
        check_peft_fields(self)
        super().__post_init__()
        self.peft_type = MethodType(f"GENFT_{self.method.upper()}")
        self.target_modules = module_names("target_modules", self.target_modules)
        self.exclude_modules = module_names("exclude_modules", self.exclude_modules)
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, (list, tuple, set)) else [] if layers is None else [layers]:
            check_rank("layers_to_transform", layer, least=0)
        if not isinstance(self.layers_pattern, str):
            check_names("layers_pattern", self.layers_pattern)
        check_expressions(self, "layers_pattern", "modules_to_save")
        if layers is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform: got {shown(layers)}, expected None because target_modules is a "
                "string; select the layers in the regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: got {shown(self.layers_pattern)}, expected None because layers_to_transform is None"
            )
        check_choice("bias", self.bias, ("none", "all", f"{self.method}_only"))
        check_choice("backend", self.backend, BACKENDS)
        check_choice("import_first", self.import_first, (IMPORT,))

    def to_dict(self) -> dict[str, Any]:
        """The saved fields, with sets sorted so that equal configs give equal files."""
        fields: dict[str, Any] = super().to_dict()
        del fields["backend"]
        return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in peft, and writes the model card. `PeftModel.save_pretrained`, transformers' and the Trainer's
        checkpoints all call this. Raises ValueError if `PeftModel` has written the weights as a pickle."""
        if "auto_mapping_dict" in kwargs:  # passed by PeftModel, which has just written the weights
            refuse_pickle(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As in peft. `PeftModel.from_pretrained` calls this first, so corrupt or pickled weights next to the config
        are rejected here, before the model is changed. Raises ValueError, naming the file."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if not directory.is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        with refusing(directory / CONFIG):
            check_files(directory, weights=False)
            return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As in peft. Raises ValueError, see `read_fields`."""
        return read_fields(Path(path_json_file))

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> Generator:
        """Create the generator of one layer, initialised, on the CPU and in float32.

        Args:
            name: the layer's name in the model, "" for a single layer.
            in_features, out_features: K and N.
            shared: the adapter's shared factors, read and extended (see `share`); None for a single layer.
        """
        raise NotImplementedError

    def refuses_experts(self) -> str:
        """Why stacked experts cannot be adapted with this configuration, as the rest of "cannot adapt experts, "; "" if
        they can, by `build_experts`."""
        return f"because {self.method} does not edit the input"

    def build_experts(self, name: str, in_features: int, experts: int, shared: nn.ModuleDict | None) -> Generator:
        """Create the generator of one projection of stacked experts, whose form is an `InputEdit`; only if
        `refuses_experts` returns "".

        Args:
            name: the name of the stacked parameter in the model, such as "model.layers.0.mlp.experts.down_proj".
            in_features: K, what an expert's projection takes.
            experts: the number of experts.
            shared: as in `build`.
        """
        raise NotImplementedError

    def module_patterns(self) -> dict[str, list[str]]:
        """Field → its patterns of layer names. The tuner warns about patterns that match no adapted layer."""
        return {}

    def refuses_padding(self) -> str:
        """Why tensors that are padded with zeros to a higher rank do not give the same ΔW, as the rest of "because ";
        "" if they do."""
        return ""

    def widened(self: ConfigT, ranks: Mapping[str, int]) -> ConfigT:
        """This configuration with higher ranks, field of `ranks` → rank, the same for all layers.

        Raises:
            ValueError: a rank is lower than the adapter's, or `refuses_padding`.
        """
        wide = copy.deepcopy(self)
        for field, rank in ranks.items():
            patterns = getattr(self, self.ranks[field]) if self.ranks[field] else {}
            own = getattr(self, field)
            highest = max(own, *patterns.values()) if patterns else own
            if rank < highest:
                raise ValueError(f"target_rank: got {rank}, expected at least {highest}, the adapter's {field}")
            if rank > highest and (reason := self.refuses_padding()):
                raise ValueError(
                    f"target_rank: got {rank}, expected the adapter's {field}, {highest}, because {reason}"
                )
            setattr(wide, field, rank)
            if patterns:
                setattr(wide, self.ranks[field], {})
        wide.__post_init__()
        return wide


class Holder(nn.Module):
    """A module that holds tensors of an update: those of one layer, or those that layers share."""

    linear: tuple[str, ...] = ()  # the parameters that all are multiplied by c to multiply ΔW by c

    def held(self) -> dict[str, nn.Parameter]:
        """The parameters by name, without those of holders inside this one."""
        inner = tuple(f"{name}." for name, part in self.named_modules() if name and isinstance(part, Holder))
        return {name: one for name, one in self.named_parameters() if not name.startswith(inner)}

    def by_rank(self, name: str, tensor: Tensor) -> Tensor:
        """A view of parameter `name`, or of a tensor like it, in which every dimension that depends on a rank is padded
        at its end to get a higher rank."""
        return tensor

    def refuses_gain(self, gain: float) -> str:
        """Why `linear` cannot multiply ΔW by `gain`, as a sentence that names the field; "" if it can."""
        return ""

    def values_for(self, other: Any, gain: float) -> dict[str, Tensor]:
        """The values of the tensors with which ΔW is `gain` times that of `other`, a holder of the same kind with ranks
        that are lower or equal; on its device, in its dtype or a wider one. For None, those with which ΔW = 0.

        Raises:
            ValueError: `refuses_gain`.
        """
        if other is None:
            return {name: torch.zeros(one.shape, dtype=one.dtype) for name, one in self.held().items()}
        if gain != 1 and (reason := self.refuses_gain(gain)):
            raise ValueError(reason)
        found, values = other.held(), {}
        for name, one in self.held().items():
            source = found[name].detach()
            if gain != 1 and name in self.linear:
                wide = torch.promote_types(torch.promote_types(source.dtype, one.dtype), torch.float32)
                source = source.to(wide) * gain
            values[name] = torch.zeros(one.shape, dtype=source.dtype, device=source.device)
            source = other.by_rank(name, source)
            self.by_rank(name, values[name])[tuple(map(slice, source.shape))] = source
        return values


class Factors(Holder):
    """Parameters owned by one layer or shared by several. Layers can only share them if their `sizes` are equal."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes = sizes


class Generator(Holder):
    """The adapter of one layer.

    The layer's own parameters are registered here. Shared ones are in the model's `shared_generators`; this module
    holds an unregistered reference (`refer`) to the *module* with the parameters: unregistered so that a checkpoint
    contains them once, to the module because peft, FSDP and `load_state_dict(assign=True)` replace parameters.
    """

    backend = "auto"  # set by the layer
    scale = 1.0  # of ΔW; 1 for methods that have none

    def __init__(self) -> None:
        super().__init__()
        self.shared: tuple[Factors, ...] = ()
        self.referred: tuple[str, ...] = ()

    def refer(self, name: str, factors: Factors, *, own: bool) -> None:
        """Set self.<name> to `factors`, registered only if this layer owns them."""
        if own:
            self.add_module(name, factors)
        else:
            object.__setattr__(self, name, factors)  # nn.Module.__setattr__ would register it
            self.shared = (*self.shared, factors)
        self.referred = (*self.referred, name)

    def leaves(self) -> dict[str, Generator]:
        """The generators of single updates by name: those of its parts, such as row blocks, or else this one, ""."""
        parts = {name: part for name, part in self.named_children() if isinstance(part, Generator)}
        return parts or {"": self}

    def holders(self) -> dict[str, Holder]:
        """The modules that hold the tensors of ΔW, own and shared, by name; this one is ""."""
        return {"": self, **{name: getattr(self, name) for name in self.referred}}

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


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Whatever is raised while a stranger's file is read is raised as ValueError that names a file, on one line without
    control characters: peft, transformers and torch raise many types."""
    try:
        yield
    except Exception as error:
        named = str(error) if str(path.parent) in str(error) else f"{path}: {error or type(error).__name__}"
        raise ValueError(one_line(named)) from error


def read_fields(path: Path) -> dict[str, Any]:
    """The fields in a file adapter_config.json. Raises ValueError, naming the file, unless it is a JSON object of at
    most 4 MiB."""
    try:
        if (size := path.stat().st_size) > LARGEST_CONFIG:
            raise ValueError(f"{size} bytes, expected at most {LARGEST_CONFIG}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: is not JSON ({one_line(error, 200)})") from None
    except RecursionError:
        raise ValueError(f"{path}: is not the JSON of an adapter (nested too deep)") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: got peft_type None in {shown(fields)}, expected a JSON object")
    fields.pop("runtime_config", None)  # as in peft: valid at run time only
    return fields


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


def check_peft_fields(config: PeftConfig) -> None:
    """Raises ValueError or TypeError, naming the field, if a field that all methods of peft have is of a wrong type."""
    for field in ("task_type", "peft_version", "base_model_name_or_path", "revision"):
        check_text(field, getattr(config, field))
    check_flag("inference_mode", config.inference_mode)
    check_names("modules_to_save", getattr(config, "modules_to_save", None))
    if config.auto_mapping is None:
        return
    if not isinstance(config.auto_mapping, dict):
        raise TypeError(f"auto_mapping: got {shown(config.auto_mapping)}, expected a dict of names or None")
    for key, name in config.auto_mapping.items():
        check_text("auto_mapping", key)
        if not isinstance(name, bool):  # such as other packages add
            check_text(f"auto_mapping[{shown(key)}]", name)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sizes.items())
