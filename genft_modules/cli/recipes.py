"""The methods that `genft finetune` knows, their defaults, and how its options become a peft configuration."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from genft_modules.cli.console import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Defaults of one method. `None` leaves the matter to the method's own configuration.

    With `variant_of`, the name stands for another method with `fields` of its configuration.
    """

    lr: float = 2e-4
    r: int | None = None
    alpha_by_r: float | None = None
    variant_of: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# For models of billions of parameters. WeGeFT's and LoRA's values are those of the commands that WeGeFT's authors
# publish for Llama-2-7B; the others' learning rates are set by analogy, as points to start from. A small model takes
# ten times as much: see LEARNING_RATES in genft_modules.cli.demo.run.
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
    """Every name that --method takes."""
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

    `r`, `alpha` and `dropout` go to the fields that the method has for them (`wegeft_alpha`, `lora_alpha`, ...; GenFT's
    and SaS's rank is half shared, half specific), `extra` to fields by their own names. Raises UserError for an option
    that the method has no field for, or refuses.
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
        # peft reads a string as a regular expression, or as the word "all-linear", and a list as names.
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
    """The configuration's own name for --r, --alpha or --dropout."""
    if option in known:
        return option
    if option == "r":
        return "k" if "k" in known else None  # GRFT has no rank, but a number of rows or columns
    stem = config.__name__.removesuffix("Config").lower()  # WeGeFTConfig: wegeft_alpha; LoRAConfig: lora_alpha
    names = (f"{stem}_{option}", f"lora_{option}", option.removesuffix("out"))  # wegeft_dropout, lora_dropout, drop
    return next((name for name in names if name in known), None)


def parse_field(text: str) -> tuple[str, Any]:
    """KEY=VALUE with the value as a Python literal, or as plain text where it is none. ValueError without "="."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text}: not of the form KEY=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, {"true": True, "false": False, "null": None}.get(value, value)
