"""What the user of the command sees: one-line errors, progress bars, tables.

Progress goes to stderr, results go to stdout.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own

INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended


class UserError(Exception):
    """Something the user can put right: the command says it in one line and exits with code 2."""


def quiet() -> None:
    """Our own progress bars tell what happens: silence those of the libraries, and their chatter."""
    from transformers.utils import logging

    # The Trainer would spread one process over all GPUs with DataParallel, which no adapter is made for.
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)\b")


def is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def one_line(error: BaseException | str) -> str:
    """The text of an error with line breaks and indentation folded away."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str = "") -> None:
    """One line about what happens now; to stderr, so that stdout holds results alone."""
    if is_first():
        with tqdm.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr, flush=True)


class _Lines(io.TextIOBase):
    """A log file's view of a progress bar: every refresh is a line of its own instead of a carriage return."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.strip()
        if line and "| 0/" not in line:  # nothing done yet is not worth a line
            self._stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def bar(
    total: int | None, title: str, *, unit: str = "step", leave: bool = True, initial: int = 0, show: bool = True
) -> Any:
    """A progress bar over `total` units: live in a terminal, a line every 10 seconds in a log file.

    `total=None` where nobody knows how many there are. `leave=False` marks work of a few seconds: its bar vanishes from
    a terminal and never enters a log. `show=False` shows none.
    """
    common: dict[str, Any] = {"total": total, "desc": title, "unit": unit, "initial": initial, "leave": leave}
    if sys.stderr.isatty():
        return tqdm(**common, file=sys.stderr, dynamic_ncols=True, disable=not show)
    return tqdm(
        **common,
        file=_Lines(sys.stderr),
        disable=not (leave and show),
        ascii=" #",
        ncols=100,
        mininterval=10,
        maxinterval=60,
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
