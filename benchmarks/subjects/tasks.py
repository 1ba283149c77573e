"""Target tasks that every Python installation has the texts of: prose, and texts with labels.

Each has three parts: what is trained on, what settings are chosen by, and what is reported.
"""

from __future__ import annotations

import io
import itertools
import keyword
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from genft_cli.demo import corpora

HELD_OUT = 0.14  # of the prose, half of it to choose settings by
KINDS = ("name", "keyword", "op", "number", "string", "comment")  # as tokenize names them
TRAINED = 3072  # windows with labels


IGNORED = -100  # the label of what is not to be predicted


class Rows(NamedTuple):
    """Texts as bytes [count, length], and the bytes to predict or IGNORED, in the same places."""

    ids: Tensor
    labels: Tensor


def windows(text: str, length: int) -> Rows:
    """The text in windows, every byte to be predicted; what does not fill the last one is left out."""
    data = torch.tensor(list(text.encode()))
    ids = data[: len(data) // length * length].view(-1, length)
    return Rows(ids, ids)


class Task(NamedTuple):
    train: Rows
    tuning: Rows
    held_out: Rows


def prose(length: int, limit: int) -> Task:
    """The demo's: Python's documentation topics, in windows of `length` bytes, every byte predicted; at most `limit`
    bytes in each part that is held out."""
    text, held = corpora.pydoc_prose(HELD_OUT)
    whole = windows(held, length)
    half = len(whole.ids) // 2
    tuning, reported = (
        Rows(ids[: limit // length], ids[: limit // length]) for ids in (whole.ids[:half], whole.ids[half:])
    )
    return Task(windows(text, length), tuning, reported)


def labels(length: int, limit: int) -> Task:
    """Which of KINDS the token is that a piece of Python source ends in, or within, by Python's own tokenizer: windows
    of half of `length` bytes, the last of them the label, a digit, which alone is predicted.

    Every label is as frequent as any other. Whole files are held out; the files are the last in the order of which
    pre-training takes the first.
    """
    length //= 2
    files, parts = corpora.stdlib_files()[::-1], []
    for number, count in enumerate((TRAINED, limit // length, limit // length)):
        each = count // len(KINDS)
        found: list[list[str]] = [[] for _ in KINDS]
        for path in files[number :: len(Task._fields)]:
            if min(map(len, found)) >= each:
                break
            for texts, more in zip(found, _before(path, length - 1, most=each // 8), strict=True):
                texts.extend(more)
        rows = [f"{text}{kind}".encode() for kind, texts in enumerate(found) for text in texts[:each]]
        ids = torch.tensor([list(row) for row in rows])
        wanted = torch.full_like(ids, IGNORED)
        wanted[:, -1] = ids[:, -1]
        parts.append(Rows(ids, wanted))
    return Task(*parts)


def _before(path: Path, length: int, most: int) -> list[list[str]]:
    """For each of KINDS, `length` characters up to places in such tokens, `most` of them, spread over the file; none
    where the file is no plain Python in ASCII."""
    places: list[list[int]] = [[] for _ in KINDS]
    try:
        text = path.read_text(encoding="ascii")
        lines = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = tokenize.tok_name[token.type].lower()
            if kind == "name" and keyword.iskeyword(token.string):
                kind = "keyword"
            if kind in KINDS:
                begin, end = (lines[row - 1] + column for row, column in (token.start, token.end))
                places[KINDS.index(kind)] += range(max(begin, length - 1), end)
    except (ValueError, SyntaxError, tokenize.TokenError):
        return [[] for _ in KINDS]
    return [[text[at + 1 - length : at + 1] for at in own[:: max(1, -(-len(own) // most))]] for own in places]


TASKS: dict[str, Callable[[int, int], Task]] = {"prose": prose, "labels": labels}
