"""Terminal output: one-line errors, messages, tables.

Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own

INTERRUPTED = 130  # exit code after Ctrl-C


class UserError(Exception):
    """A user's mistake: the command prints it on one line and exits with code 2."""


class RunError(Exception):
    """A run that broke off for a reason that the message says: one line, and exit code 1."""


def quiet() -> None:
    """Silence the libraries' progress bars and log messages; the command has its own."""
    from transformers.utils import logging

    # On several GPUs the Trainer would wrap a single process in DataParallel, which adapters do not support.
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from datasets import disable_progress_bars

            disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|trl|datasets)\b")


def is_first() -> bool:
    """Whether this is rank 0, the only one that prints."""
    return os.environ.get("RANK", "0") == "0"


def one_line(error: BaseException | str) -> str:
    """The text of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def told(error: Exception) -> str:
    """What the command says of an error, on one line."""
    if isinstance(error, UserError):
        return f"error: {one_line(error)}"
    if isinstance(error, RunError):
        return one_line(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"[-500:]
    return f"{type(error).__name__}: {one_line(error)[:500]} (--debug shows where)"


def say(text: str = "") -> None:
    """Print a progress message to stderr."""
    if is_first():
        with tqdm.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr, flush=True)


def check_writable(option: str, name: str) -> None:
    """Raises UserError if nothing can be written in the directory `name` or, where it is missing, in the nearest one
    above it."""
    try:
        name.encode()
    except UnicodeEncodeError:  # safetensors and tokenizers take no such paths
        raise UserError(f"{option} {name}: is not UTF-8") from None
    path = Path(os.path.realpath(os.path.expanduser(name)))
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"{option} {name}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{option} {name}: {nearest} cannot be written")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
