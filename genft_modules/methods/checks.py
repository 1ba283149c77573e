"""Checks of the fields of a configuration. Messages name the field, what came, cut to one line, and what fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genft_modules.methods.patterns import check_pattern, end

MOST = 2**16  # of a rank, or of another size of an adapter's tensors
DEEPEST = 256  # of layers in sequence inside an adapter
LARGEST = 1e30  # of a number: its float32 is finite, and so is its product with a weight
MOST_NAMES = 2**16
MOST_PATTERNS = 10_000


def shown(value: object, most: int = 100) -> str:
    """`repr` on one line, without control characters, cut to `most` characters."""
    try:
        return one_line(repr(value), most)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        return f"a {type(value).__name__} too large to show"


def one_line(text: object, most: int = 500) -> str:
    """A text on one line, without control characters, cut to `most` characters."""
    text = str(text)[: 4 * most].encode("utf-8", "backslashreplace").decode()  # names of files may not be UTF-8
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{field}: got {shown(value)}, expected one of {choices}")


def check_rank(field: str, value: object, least: int = 1, most: int = MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field}: got {shown(value)}, expected an integer >= {least}")
    if value < least:
        raise ValueError(f"{field}: got {shown(value)}, expected an integer >= {least}")
    if value > most:
        raise ValueError(f"{field}: got {shown(value)}, expected an integer <= {most}")


def check_number(field: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{field}: got {shown(value)}, expected a number")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{field}: got {shown(value)}, expected a finite number, at most {LARGEST:g}")


def check_dropout(field: str, value: object) -> None:
    check_number(field, value)
    if not 0.0 <= value < 1.0:  # type: ignore[operator]
        raise ValueError(f"{field}: got {value}, expected 0 <= {field} < 1")


def check_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field}: got {shown(value)}, expected True or False")


def check_text(field: str, value: object) -> None:
    """None or a string of printable characters."""
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{field}: got {shown(value)}, expected a string or None")
    if not value.isprintable() or len(value) > 4096:
        raise ValueError(f"{field}: got {shown(value)}, expected at most 4096 printable characters")


def check_patterns(field: str, patterns: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(patterns, dict):
        raise TypeError(
            f"{field}: got {shown(patterns)}, expected a dict of layer names or regular expressions to values"
        )
    _check_keys(field, patterns)
    for pattern, value in patterns.items():
        check(f"{field}[{shown(pattern)}]", value)


def check_row_blocks(field: str, value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{field}: got {shown(value)}, expected a dict of layer names to lists of bool")
    _check_keys(field, value)
    for name, flags in value.items():
        if not isinstance(flags, (list, tuple)) or not all(isinstance(flag, bool) for flag in flags):
            raise TypeError(f"{field}[{shown(name)}]: got {shown(flags)}, expected one bool per row block")
        if not any(flags):
            raise ValueError(f"{field}[{shown(name)}]: got {shown(flags)}, expected at least one True")
        if len(flags) > DEEPEST:
            raise ValueError(f"{field}[{shown(name)}]: got {len(flags)} flags, expected at most {DEEPEST}")


def _check_keys(field: str, patterns: dict[Any, Any]) -> None:
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"{field}: got {len(patterns)} entries, expected at most {MOST_PATTERNS}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{field}: got the key {shown(pattern)}, expected a layer name or a regular expression")
        check_pattern(field, pattern, end(pattern))


def module_names(field: str, value: Any) -> Any:
    """Module names as in peft: a string as it is, a list as a set."""
    if value is None:
        return value
    if isinstance(value, str):
        check_pattern(field, value, value)
        return value
    if isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value):
        if len(value) > MOST_NAMES:
            raise ValueError(f"{field}: got {len(value)} names, expected at most {MOST_NAMES}")
        return set(value)
    raise TypeError(f"{field}: got {shown(value)}, expected a list of names, a regular expression or None")


def check_names(field: str, value: object) -> None:
    """None or a list of names."""
    if value is None:
        return
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{field}: got {shown(value)}, expected a list of names or None")
    if len(value) > MOST_NAMES:
        raise ValueError(f"{field}: got {len(value)} names, expected at most {MOST_NAMES}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())
