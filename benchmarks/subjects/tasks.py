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
TRAINED = 1024  # windows with labels
OF_A_FILE = 8  # windows at most


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
    """Which of KINDS each byte of Python source belongs to, by Python's own tokenizer: windows of `length` bytes, and
    for each byte but the last a digit, predicted where the byte after it would be; none for blanks and line ends. At
    most `limit` bytes in each part that is held out.

    Whole files are held out; the files are the last in the order of which pre-training takes the first.
    """
    files, parts = corpora.stdlib_files()[::-1], []
    for number, count in enumerate((TRAINED, limit // length, limit // length)):
        found = itertools.chain.from_iterable(_tagged(path, length) for path in files[number :: len(Task._fields)])
        ids, labels = zip(*itertools.islice(found, count), strict=True)
        parts.append(Rows(torch.tensor(ids), torch.tensor(labels)))
    return Task(*parts)


def _tagged(path: Path, length: int) -> list[tuple[list[int], list[int]]]:
    """Windows and their labels, at most OF_A_FILE of them, spread over the file; none where it is no plain Python in
    ASCII."""
    try:
        text = path.read_text(encoding="ascii")
        lines = io.StringIO(text).readlines()
        begins = [0, *itertools.accumulate(map(len, lines))]
        digits = [IGNORED] * (len(text) + 1)
        for token in tokenize.generate_tokens(iter(lines).__next__):
            kind = tokenize.tok_name[token.type].lower()
            if kind == "name" and keyword.iskeyword(token.string):
                kind = "keyword"
            if kind in KINDS:
                begin, end = (begins[row - 1] + column for row, column in (token.start, token.end))
                # A byte's label stands where the byte after it does: a causal model is asked before it reads that one.
                digits[begin + 1 : end + 1] = [ord(str(KINDS.index(kind)))] * (end - begin)
    except (ValueError, SyntaxError, tokenize.TokenError):
        return []
    count = min(OF_A_FILE, len(text) // length)
    starts = [(2 * index + 1) * (len(text) - length) // (2 * count) for index in range(count)]
    return [(list(text[at : at + length].encode()), [IGNORED, *digits[at + 1 : at + length]]) for at in starts]


TASKS: dict[str, Callable[[int, int], Task]] = {"prose": prose, "labels": labels}
