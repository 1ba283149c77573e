"""What the user of the command sees: one-line errors, messages, tables.

Progress goes to stderr, results go to stdout.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

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
