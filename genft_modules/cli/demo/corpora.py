"""The two texts that every Python installation carries: its library's source code and its documentation's prose."""

from __future__ import annotations

import hashlib
import importlib
import re
import sysconfig
from pathlib import Path

from genft_modules.cli.console import UserError
from genft_modules.cli.data import hold_out, normal

# Left out of the code: tests (repetitive), tables of encodings (numbers), and the documentation topics themselves,
# which the demo adapts to and must not have seen.
_LEFT_OUT = {"test", "tests", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
SHARED_RUN = 64  # characters that held-out and training prose may at most have in common


def stdlib_code(limit: int) -> str:
    """About `limit` characters of the standard library's source code: whole files in an order fixed by their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)]
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    texts, size = [], 0
    for path in files:
        if size >= limit:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        size += len(text)
    if size < limit / 2:
        raise UserError(f"the demo needs the standard library's source code, and {root} holds {size} characters of it")
    return "\n".join(texts)[:limit]


def pydoc_prose(fraction: float = 0.08) -> tuple[str, str]:
    """(training, held out): the prose of Python's documentation topics, `fraction` of it held out in contiguous blocks.

    The topics quote one another at length (a fifth of the text stands there twice), so each paragraph is taken once
    only, and a held-out paragraph that shares a run of SHARED_RUN characters with the training part is dropped.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("the demo needs pydoc_data, the documentation topics that come with Python") from None
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
    """Every stretch of SHARED_RUN characters in a paragraph, white space normalised; the whole of a shorter one."""
    text = normal(paragraph)
    return {text[i : i + SHARED_RUN] for i in range(max(1, len(text) - SHARED_RUN + 1))}
