"""The methods of the commands: their defaults, their learning rates, and the peft configuration built from options."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from genft_cli.console import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Method:
    """Defaults of one method. `None` means the default of the method's configuration.

    `lr` is the peak learning rate for a model of 3 to 30 billion parameters. With `variant_of`, the name is an alias of
    that method with the given `fields`.
    """

    lr: float = 2e-4
    r: int | None = None
    alpha_by_r: float | None = None
    variant_of: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# WeGeFT's and LoRA's learning rates are those of the commands published by WeGeFT's authors for Llama-2-7B; the others
# are in proportion to what worked best on the demo's small model (HiRA's: also about that of peft's comparison on a
# model of 3 billion; its steps are large because its factors multiply the small elements of W0).
METHODS: dict[str, Method] = {
    "wegeft": Method(r=64, alpha_by_r=2),
    "gift": Method(r=64),
    "genft": Method(lr=1e-4, r=16),
    "genft-gelu": Method(r=16, variant_of="genft", fields={"inner_activation": "gelu", "outer_activation": "gelu"}),
    "grft": Method(r=16),
    "sas": Method(lr=5e-4, r=16),
    "peanut": Method(lr=5e-4, r=16),
    "hira": Method(lr=4e-3, r=32),
    "lora": Method(r=16, alpha_by_r=2),  # peft's, computed by genft's operations
    "peft-lora": Method(r=16, alpha_by_r=2),
    "full": Method(lr=2e-5),
}

STOCK = ("lora", "peft-lora")  # adapters of peft's own LoraConfig
PLAIN = ("peft-lora", "full")  # run none of genft's operations

# Small models need larger steps: (parameters below which the factor holds, factor). The first comes from the demo's
# model, the last but one from Llama-2-7B, and those between lie on a power law through the two.
LR_FACTORS = ((30e6, 20.0), (300e6, 5.0), (3e9, 2.0), (30e9, 1.0), (math.inf, 0.5))


def names() -> list[str]:
    """All names accepted by --method."""
    return list(METHODS)


def learning_rate(method: str, parameters: float) -> float:
    """The default peak learning rate for a model with this number of parameters."""
    factor = next(factor for below, factor in LR_FACTORS if parameters < below)
    return float(f"{METHODS[method].lr * factor:.2g}")


def config_class(method: str) -> Any:
    """The class of the method's peft configuration; None for "full"."""
    if method == "full":
        return None
    if method in STOCK:
        from peft import LoraConfig

        return LoraConfig
    from genft_modules import METHODS as classes

    return classes[METHODS[method].variant_of or method]


def apply_fused(model: Any, method: str, backend: str = "auto") -> None:
    """Let an adapted model compute as its method does in training: "lora" by genft's operations."""
    if method == "lora":
        from genft_modules import fuse_lora

        fuse_lora(model, backend=backend)


def fields(method: str, taken: Collection[str]) -> list[tuple[str, str]]:
    """(name, help) of the fields of the method's configuration that a user may set, without the names in `taken`."""
    config = config_class(method)
    if config is None:
        return []
    internal = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    internal |= {"import_first"}
    described = _described(config)
    return [
        (f.name, str(f.metadata.get("help") or described.get(f.name, "see peft's documentation")).replace("%", "%%"))
        for f in dataclasses.fields(config)
        if f.name not in internal and f.name not in taken
    ]


def _described(config: type) -> dict[str, str]:
    """What the docstrings of a configuration and its bases say of each field, in their sections "Args"."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        section = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("Args:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(r"^ {4}([\w, ]+): (.+(?:\n {8}.+)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def peft_config(
    method: str,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    target_modules: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    backend: str = "auto",
    task_type: str | None = "CAUSAL_LM",
) -> Any:
    """The peft configuration of `method`, or None for "full".

    `r`, `alpha` and `dropout` set the corresponding fields of the method (`wegeft_alpha`, `lora_alpha`, ...; for GenFT
    and SaS, half of the rank is shared and half specific), `extra` sets fields by name. Raises UserError for an option
    without a field or an invalid value.
    """
    if method not in METHODS:
        raise UserError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")
    if backend != "auto" and method in PLAIN:
        raise UserError(f"--backend {backend}: {method} runs none of genft's operations")
    if r is not None and r < 1:
        raise UserError(f"--r {r}: the rank must be at least 1")
    if alpha is not None and not math.isfinite(alpha):
        raise UserError(f"--alpha {alpha}: must be a finite number")
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"--dropout {dropout}: must be at least 0 and below 1")
    if method == "full":
        for option, given in {"--r": r, "--alpha": alpha, "--dropout": dropout}.items():
            if given is not None:
                raise UserError(f"{option}: full fine-tuning has no adapter to set this for")
        return None
    defaults, config, extra = METHODS[method], config_class(method), dict(extra or {})
    known = {field.name for field in dataclasses.fields(config)}
    values: dict[str, Any] = {"task_type": task_type, **defaults.fields}
    if "backend" in known:
        values["backend"] = backend
    if target_modules:
        values["target_modules"] = _targets(target_modules)
    sizes = (("generator_share_dim", "individual_features"), ("r_shared", "r_specific"))
    for name in ("k", *(part for pair in sizes for part in pair)):
        if r is not None and name in extra:
            raise UserError(f"--r and --{name} are mutually exclusive")
    r = r or defaults.r
    if alpha is None and r and defaults.alpha_by_r:
        alpha = defaults.alpha_by_r * r
    for shared, specific in sizes:
        if r is not None and shared in known:
            values |= {shared: r - r // 2, specific: r // 2}
            r = None
    for option, value in (("r", r), ("alpha", alpha), ("dropout", dropout)):
        field = _field(option, known, config)
        if value is not None and field is None:
            raise UserError(f"--{option}: {method} has no such setting")
        if value is not None and field is not None:
            values[field] = int(value) if value == int(value) and option != "dropout" else value
    for name, value in extra.items():
        if name not in known:
            raise UserError(f"--{name}: {method} has no such field; it has {', '.join(sorted(known))}")
        values[name] = value
    try:
        return config(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"--method {method}: {one_line(error)}") from None


def _targets(names: Sequence[str]) -> str | list[str]:
    """peft takes a string as a regular expression or "all-linear", and a list as names."""
    names = [names] if isinstance(names, str) else names
    only = names[0] if len(names) == 1 else ""
    pattern = only == "all-linear" or not re.fullmatch(r"[\w.]*", only)
    return only if pattern else list(names)


def _field(option: str, known: Collection[str], config: type) -> str | None:
    """The configuration's field for --r, --alpha or --dropout."""
    if option in known:
        return option
    if option == "r":
        return "k" if "k" in known else None  # GRFT: number of rows or columns
    stem = config.__name__.removesuffix("Config").lower()  # WeGeFTConfig: wegeft_alpha; LoRAConfig: lora_alpha
    choices = (f"{stem}_{option}", f"lora_{option}", option.removesuffix("out"))  # wegeft_dropout, lora_dropout, drop
    return next((name for name in choices if name in known), None)


def number(value: Any) -> Any:
    """`value`, or the number it spells: YAML reads 1e-3 as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value
