"""Data loading: from a user's file or a dataset on the Hub to windows of token ids.

`read_records` reads and checks, `split_records` makes the held-out split, `encode` makes windows, `collate` makes
batches. No model is needed.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genft_cli.console import UserError, one_line
from genft_modules.progress import bar

IGNORED = -100  # the label that transformers' losses ignore


@dataclass(frozen=True)
class Record:
    """A training text; with a prompt, the text is its completion and only the completion has labels."""

    text: str
    prompt: str | None = None


# --- reading -----------------------------------------------------------------------------------------------------


def read_records(source: str, split: str = "train") -> list[Record]:
    """Read `source`: a .txt file, a .jsonl file, or the `split` of a dataset on the Hub.

    Raises UserError, with file and line number, if the data cannot be used.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"--dataset {source}: is a directory, expected a .txt or .jsonl file")
    if path.is_file():
        records = _read_jsonl(path) if path.suffix in {".jsonl", ".json"} else _read_text(path)
    elif path.suffix in {".txt", ".jsonl", ".json"} or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"--dataset {source}: no such file")
    else:
        records = _read_hub(source, split)
    records = [record for record in records if record.text.strip()]
    if not records:
        raise UserError(f"--dataset {source}: contains no text")
    if len({record.prompt is None for record in records}) > 1:
        raise UserError(f'--dataset {source}: mixes records with "text" and records with "prompt"')
    return records


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset {path}: not UTF-8 text ({one_line(error)})") from None
    except OSError as error:
        raise UserError(f"--dataset {path}: {error.strerror or one_line(error)}") from None


def _read_text(path: Path) -> list[Record]:
    return [Record(_decode(path))]


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    # Not str.splitlines, which also splits at U+2028 and other separators inside strings.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--dataset {path}: line {number} is not JSON ({error})") from None
        records.append(_record(row, f"--dataset {path}: line {number}"))
    return records


def _read_hub(name: str, split: str) -> list[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"--dataset {name}: no such file; to read it from the Hub, pip install datasets")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the Hub's client raises many types
        raise UserError(
            f"--dataset {name}: no such file, and cannot be read from the Hub ({one_line(error)})"
        ) from None
    return [_record(row, f"--dataset {name}: row {number}") for number, row in enumerate(rows)]


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object")
    names = ("prompt", "completion") if "text" not in row else ("text",)
    for name in names:
        if not isinstance(row.get(name), str):
            raise UserError(f'{where} needs "text", or "prompt" and "completion", as strings')
    return Record(row["text"]) if names == ("text",) else Record(row["completion"], row["prompt"])


# --- holding out -------------------------------------------------------------------------------------------------


def split_records(records: Sequence[Record], fraction: float, blocks: int = 4) -> tuple[list[Record], list[Record]]:
    """Split into (training, held out): `fraction` of the text is held out, in `blocks` evenly spread blocks.

    Contiguous blocks, because neighbouring records are similar and random ones would leak. A single text is split at
    paragraphs, or at lines or words if it has too few. Held-out text that also occurs verbatim in the training part is
    dropped.

    Raises UserError if the data is too small to split.
    """
    single = len(records) == 1
    units = [Record(piece) for piece in _pieces(records[0].text, 2 * blocks)] if single else list(records)
    chosen = hold_out([len(unit.text) for unit in units], fraction, blocks)
    train = [unit for unit, out in zip(units, chosen, strict=True) if not out]
    known = {(unit.prompt, normal(unit.text)) for unit in train}
    held = [
        unit for unit, out in zip(units, chosen, strict=True) if out and (unit.prompt, normal(unit.text)) not in known
    ]
    if not train or not held:
        raise UserError("--dataset: too small, or too repetitive, for a held-out split; use --eval-dataset")
    if single:
        return [Record("".join(unit.text for unit in train))], [Record("".join(unit.text for unit in held))]
    return train, held


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


def _pieces(text: str, least: int) -> list[str]:
    for piece in (r".+?(?:\n\s*\n|\Z)", r".+?(?:\n|\Z)", r".+?(?:\s|\Z)"):  # paragraphs, lines, words
        pieces = re.findall(piece, text, re.DOTALL)
        if len(pieces) >= least:
            return pieces
    return [text]


# --- tokens ------------------------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows over one sequence of token ids, with a mask of the tokens to predict.

    ids [T] int32; predicted [T] bool; spans: (first, last + 1) of each window; `bytes`: the number of UTF-8 bytes of
    the predicted tokens, to compare losses across tokenizers.
    """

    def __init__(self, ids: torch.Tensor, predicted: torch.Tensor, spans: list[tuple[int, int]], bytes_: int) -> None:
        self.ids, self.predicted, self.spans, self.bytes = ids, predicted, spans, bytes_

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, end = self.spans[index]
        ids = self.ids[first:end].long()
        labels = torch.where(self.predicted[first:end], ids, IGNORED)
        labels[0] = IGNORED  # has no context
        return {"input_ids": ids, "labels": labels}

    @property
    def targets(self) -> int:
        """The total number of predicted tokens."""
        return sum(int(self.predicted[first + 1 : end].sum()) for first, end in self.spans)


def encode(records: Sequence[Record], tokenizer: Any, seq_len: int, *, title: str = "reading") -> Windows:
    """Token windows of at most `seq_len` ids.

    Texts are concatenated, each with the tokenizer's BOS and EOS tokens if it has them, and cut into windows that
    overlap by one token: every token except the first is predicted exactly once. A record with a prompt is a window of
    its own, with labels on the completion only; if it is too long, the prompt is truncated from the left first.

    Raises UserError if there is nothing to predict.
    """
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    stop = [i for i in (tokenizer.eos_token_id,) if i is not None]
    ids: list[torch.Tensor] = []
    predicted: list[torch.Tensor] = []
    spans: list[tuple[int, int]] = []
    size, length = 0, 0
    with bar(len(records), title, unit="record", leave=False) as progress:
        for record in records:
            text = tokenizer(record.text, add_special_tokens=False)["input_ids"]
            size += len(record.text.encode())
            if record.prompt is None:
                row, from_ = [*start, *text, *stop], 0
            else:
                prompt = tokenizer(record.prompt, add_special_tokens=False)["input_ids"]
                row, from_, lost = _fit(start, prompt, text, stop, seq_len)
                size -= len(tokenizer.decode(lost).encode()) if lost else 0
                spans.append((length, length + len(row)))
            ids.append(torch.tensor(row, dtype=torch.int32))
            predicted.append(torch.arange(len(row)) >= from_)
            length += len(row)
            progress.update()
    if not spans:
        spans = [(i, min(i + seq_len, length)) for i in range(0, length - 1, seq_len - 1)]
        if not start and length:  # without BOS the first token is never predicted
            size -= len(tokenizer.decode(ids[0][:1].tolist()).encode())
    spans = [(first, end) for first, end in spans if end - first > 1]
    windows = Windows(torch.cat(ids), torch.cat(predicted), spans, max(size, 1))
    if not windows.targets:
        raise UserError(f"{title}: too little text, no token to predict")
    return windows


def _fit(
    start: list[int], prompt: list[int], text: list[int], stop: list[int], seq_len: int
) -> tuple[list[int], int, list[int]]:
    """(ids of the window, index of the first predicted token, truncated tokens of the completion)."""
    room = seq_len - len(start) - len(stop)
    # Without BOS, keep at least one token of the prompt.
    kept_text = text[: room if start else room - 1]
    space = room - len(kept_text)
    kept_prompt = prompt[len(prompt) - min(space, len(prompt)) :]
    head = [*start, *kept_prompt]
    return [*head, *kept_text, *stop], len(head), text[len(kept_text) :]


def collate(rows: Sequence[dict[str, torch.Tensor]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch: rows right-padded to the longest, [B,T]; an attention mask only if there is padding."""
    longest = max(len(row["input_ids"]) for row in rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch = {}
    for name, filler in (("input_ids", pad_id), ("labels", IGNORED)):
        batch[name] = torch.stack(
            [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=filler) for row in rows]
        )
    if int(lengths.min()) < longest:
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def byte_tokenizer() -> Any:
    """A byte-level tokenizer: ids 0 to 255 are the bytes, then start, end and padding; 259 in total."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The `tokenizers` library maps bytes to printable characters: those printable in Latin-1 to themselves, the rest
    # to U+0100 and up.
    shown: Iterable[int] = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    vocab = {chr(byte if byte in shown else next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
