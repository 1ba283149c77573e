"""Two corpora found in every Python installation: the standard library's source code and the documentation topics."""

from __future__ import annotations

import hashlib
import importlib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from genft_cli.console import UserError

# Excluded from the code: tests (repetitive), encoding tables (numbers), and the documentation topics, which the demo
# fine-tunes on.
_LEFT_OUT = {"test", "tests", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
SHARED_RUN = 64  # in characters: held-out paragraphs that share a substring of this length with training are dropped


def stdlib_files() -> list[Path]:
    """The standard library's source files, in a fixed pseudo-random order."""
    root = _stdlib()
    files = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def stdlib_code(limit: int) -> str:
    """Up to `limit` characters of the standard library's source code, from the first of `stdlib_files` on."""
    texts, size = [], 0
    for path in stdlib_files():
        if size >= limit:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        size += len(text)
    if size < limit / 2:
        where = _stdlib()
        raise UserError(f"the demo needs the standard library's source code; {where} has only {size} characters of it")
    return "\n".join(texts)[:limit]


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def pydoc_prose(fraction: float = 0.08) -> tuple[str, str]:
    """(training, held out): Python's documentation topics, `fraction` of them held out in contiguous blocks.

    A fifth of the text is duplicated, so paragraphs are deduplicated, and held-out paragraphs that share a substring of
    SHARED_RUN characters with the training part are dropped.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("the demo needs pydoc_data, the documentation topics shipped with Python") from None
    paragraphs = list(
        {
            normal(paragraph): paragraph.strip("\n")
            for name in sorted(topics)
            for paragraph in re.split(r"\n\s*\n", topics[name])
            if paragraph.strip()
        }.values()
    )
    chosen = hold_out([len(paragraph) for paragraph in paragraphs], fraction)
    train = [paragraph for paragraph, out in zip(paragraphs, chosen, strict=True) if not out]
    known = {run for paragraph in train for run in runs(paragraph)}
    held = [
        paragraph
        for paragraph, out in zip(paragraphs, chosen, strict=True)
        if out and known.isdisjoint(runs(paragraph))
    ]
    return "\n\n".join(train), "\n\n".join(held)


def runs(paragraph: str) -> set[str]:
    """All substrings of SHARED_RUN characters of a paragraph with normalised whitespace; a shorter one as a whole."""
    text = normal(paragraph)
    return {text[i : i + SHARED_RUN] for i in range(max(1, len(text) - SHARED_RUN + 1))}


def hold_out(sizes: Sequence[int], fraction: float, blocks: int = 4) -> list[bool]:
    """Which units of these sizes are held out: `blocks` contiguous runs, each at the end of an equal share."""
    total = sum(sizes)
    chosen, before = [], 0
    for size in sizes:
        middle = (before + size / 2) / total * blocks if total else 0.0
        chosen.append(middle % 1.0 >= 1.0 - fraction)
        before += size
    if not any(chosen) and fraction > 0 and len(chosen) > 1:
        chosen[-1] = True  # few large units: their middles may all miss the blocks
    return chosen


def normal(text: str) -> str:
    """The text with each run of whitespace collapsed to one space."""
    return " ".join(text.split())
