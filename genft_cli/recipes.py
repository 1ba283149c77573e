"""The methods of `genft finetune`, their defaults, and the peft configuration built from its options."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from genft_cli.console import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults of one method. `None` means the default of the method's configuration.

    With `variant_of`, the name is an alias of that method with the given `fields`.
    """

    lr: float = 2e-4
    r: int | None = None
    alpha_by_r: float | None = None
    variant_of: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# For models with billions of parameters. The values for WeGeFT and LoRA are from the commands published by WeGeFT's
# authors for Llama-2-7B; the other learning rates are chosen by analogy, as starting points. A small model needs about
# ten times more: see LEARNING_RATES in genft_cli.demo.run.
RECIPES: dict[str, Recipe] = {
    "wegeft": Recipe(lr=2e-4, r=64, alpha_by_r=2),
    "gift": Recipe(lr=2e-4, r=64),
    "genft": Recipe(lr=2e-4, r=16),
    "genft-gelu": Recipe(
        lr=2e-4, r=16, variant_of="genft", fields={"inner_activation": "gelu", "outer_activation": "gelu"}
    ),
    "grft": Recipe(lr=2e-4, r=16),
    "sas": Recipe(lr=2e-4, r=16),
    "peanut": Recipe(lr=2e-4, r=16),
    "lora": Recipe(lr=2e-4, r=16, alpha_by_r=2),
    "peft-lora": Recipe(lr=2e-4, r=16, alpha_by_r=2),
    "full": Recipe(lr=2e-5),
}


def methods() -> list[str]:
    """All names accepted by --method."""
    return [*_configs(), *(name for name, recipe in RECIPES.items() if recipe.variant_of), "full"]


def _configs() -> dict[str, type]:
    from peft import LoraConfig

    from genft_modules import METHODS

    return {**METHODS, "peft-lora": LoraConfig}


def recipe(method: str) -> Recipe:
    return RECIPES.get(method, Recipe())


def peft_config(
    method: str,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    target_modules: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> Any:
    """The peft configuration of `method`, or None for "full".

    `r`, `alpha` and `dropout` set the corresponding fields of the method (`wegeft_alpha`, `lora_alpha`, ...; for GenFT
    and SaS, half of the rank is shared and half specific), `extra` sets fields by name. Raises UserError for an option
    without a field or an invalid value.
    """
    if method not in methods():
        raise UserError(f"--method {method}: unknown; choose from {', '.join(methods())}")
    if backend != "auto" and method in {"peft-lora", "full"}:
        raise UserError(f"--backend {backend}: {method} runs none of genft's operations")
    given = {"--r": r, "--alpha": alpha, "--dropout": dropout, "--target-modules": target_modules}
    if method == "full":
        for option, value in {**given, "--config": extra or None}.items():
            if value is not None:
                raise UserError(f"{option}: full fine-tuning has no adapter to set this for")
        return None
    defaults = recipe(method)
    config = _configs()[defaults.variant_of or method]
    known = {field.name for field in dataclasses.fields(config)}
    if r is not None and r < 1:
        raise UserError(f"--r {r}: the rank must be at least 1")
    if alpha is not None and not math.isfinite(alpha):
        raise UserError(f"--alpha {alpha}: must be a finite number")
    if dropout is not None and not 0 <= dropout < 1:
        raise UserError(f"--dropout {dropout}: must be at least 0 and below 1")
    r = r or defaults.r
    if alpha is None and r and defaults.alpha_by_r:
        alpha = defaults.alpha_by_r * r
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", **defaults.fields}
    if "backend" in known:
        fields["backend"] = backend
    if target_modules:
        # peft takes a string as a regular expression or "all-linear", and a list as names.
        only = target_modules[0] if len(target_modules) == 1 else ""
        pattern = only == "all-linear" or not re.fullmatch(r"[\w.]*", only)
        fields["target_modules"] = only if pattern else list(target_modules)
    for shared, specific in (("generator_share_dim", "individual_features"), ("r_shared", "r_specific")):
        if r is not None and shared in known:
            fields |= {shared: r - r // 2, specific: r // 2}
            r = None
    for option, value in (("r", r), ("alpha", alpha), ("dropout", dropout)):
        name = _field(option, known, config)
        if value is not None and name is None:
            raise UserError(f"--{option}: {method} has no such setting")
        if value is not None and name is not None:
            fields[name] = int(value) if value == int(value) and option != "dropout" else value
    for name, value in (extra or {}).items():
        if name not in known:
            raise UserError(f"--config {name}: {method} has no such field; it has {', '.join(sorted(known))}")
        fields[name] = value
    try:
        return config(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"--method {method}: {one_line(error)}") from None


def _field(option: str, known: set[str], config: type) -> str | None:
    """The configuration's field for --r, --alpha or --dropout."""
    if option in known:
        return option
    if option == "r":
        return "k" if "k" in known else None  # GRFT: number of rows or columns
    stem = config.__name__.removesuffix("Config").lower()  # WeGeFTConfig: wegeft_alpha; LoRAConfig: lora_alpha
    names = (f"{stem}_{option}", f"lora_{option}", option.removesuffix("out"))  # wegeft_dropout, lora_dropout, drop
    return next((name for name in names if name in known), None)


def parse_field(text: str) -> tuple[str, Any]:
    """Parse KEY=VALUE, with the value as a Python literal or else as text. Raises ValueError without "="."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text}: expected KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False, "null": None}.get(value, value)
