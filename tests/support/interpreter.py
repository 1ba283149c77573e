"""Triton's interpreter without the work whose result nobody reads, which is a third of its time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from inspect import getmembers
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def _first_builtin(package: Any) -> str:
    return next(name for name, member in getmembers(package) if is_builtin(member))


def lighten() -> None:
    """Once, before the first kernel is interpreted."""
    builder, patch = interpreter.interpreter_builder, interpreter._patch_builtin
    # Each sum and product of integers is computed again in 64 bits for an assertion, which needs `debug` to be made.
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)

    # The launch replaces the functions of the language; so would each call of a helper, after looking for them all.
    def patch_once(package: Any, *rest: Any) -> None:
        if is_builtin(getattr(package, _first_builtin(package))):
            patch(package, *rest)

    interpreter._patch_builtin = patch_once
