"""From a user's file, or a data set on the hub, to windows of token ids.

`read_records` reads and checks, `split_records` holds some of it out, `encode` makes windows, `collate` makes batches.
Nothing here touches a model.
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

from genft_modules.cli.console import UserError, one_line
from genft_modules.progress import bar

IGNORED = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class Record:
    """A piece of text to learn; with a prompt, the text is the completion and the prompt is only read."""

    text: str
    prompt: str | None = None


# --- reading -----------------------------------------------------------------------------------------------------


def read_records(source: str, split: str = "train") -> list[Record]:
    """Read `source`: a .txt file, a .jsonl file, or the name of a data set on the hub (then its `split`).

    Raises UserError naming the file, and the line where there is one, for anything that cannot be learned from.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"--dataset {source}: is a directory; give a .txt or .jsonl file")
    if path.is_file():
        records = _read_jsonl(path) if path.suffix in {".jsonl", ".json"} else _read_text(path)
    elif path.suffix in {".txt", ".jsonl", ".json"} or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"--dataset {source}: no such file")
    else:
        records = _read_hub(source, split)
    records = [record for record in records if record.text.strip()]
    if not records:
        raise UserError(f"--dataset {source}: holds no text")
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
    # Only "\n" ends a line of jsonl: str.splitlines would also break inside strings, at U+2028 and its like.
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
        raise UserError(f"--dataset {name}: no such file; to read it from the hub, pip install datasets")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # whatever the hub or its client raises is, to the user, one thing
        raise UserError(f"--dataset {name}: no such file, and not read from the hub ({one_line(error)})") from None
    return [_record(row, f"--dataset {name}: row {number}") for number, row in enumerate(rows)]


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object with fields")
    names = ("prompt", "completion") if "text" not in row else ("text",)
    for name in names:
        if not isinstance(row.get(name), str):
            raise UserError(f'{where} needs "text", or "prompt" and "completion", as strings')
    return Record(row["text"]) if names == ("text",) else Record(row["completion"], row["prompt"])


# --- holding out -------------------------------------------------------------------------------------------------


def split_records(records: Sequence[Record], fraction: float, blocks: int = 4) -> tuple[list[Record], list[Record]]:
    """(training, held out): `fraction` of the text is held out, in `blocks` contiguous blocks spread over the whole.

    Contiguous, because neighbouring text is alike: records drawn singly would be half known from their neighbours.
    A single text is cut at its paragraphs (its lines, if it has few). What is held out and stands word for word
    in the training part as well is dropped from the held-out part.

    Raises UserError if there is too little to hold anything out.
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
        raise UserError(
            "the data set is too small, or repeats itself too much, to hold anything out; give --eval-dataset"
        )
    if single:
        return [Record("".join(unit.text for unit in train))], [Record("".join(unit.text for unit in held))]
    return train, held


def hold_out(sizes: Sequence[int], fraction: float, blocks: int = 4) -> list[bool]:
    """Which of the units of these sizes are held out: `blocks` contiguous runs, each at the end of an equal share."""
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
    """The text with every run of white space as one blank: the same words in other lines are the same text."""
    return " ".join(text.split())


def _pieces(text: str, least: int) -> list[str]:
    for piece in (r".+?(?:\n\s*\n|\Z)", r".+?(?:\n|\Z)", r".+?(?:\s|\Z)"):  # paragraphs, lines, words
        pieces = re.findall(piece, text, re.DOTALL)
        if len(pieces) >= least:
            return pieces
    return [text]


# --- tokens ------------------------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Stretches of one row of token ids, with what is to be predicted in each.

    ids [T] int32; predicted [T] bool; spans: (first, last + 1) of each window; `bytes`: how many bytes of UTF-8 the
    predicted tokens stand for, so that losses of different tokenizers compare.
    """

    def __init__(self, ids: torch.Tensor, predicted: torch.Tensor, spans: list[tuple[int, int]], bytes_: int) -> None:
        self.ids, self.predicted, self.spans, self.bytes = ids, predicted, spans, bytes_

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, end = self.spans[index]
        ids = self.ids[first:end].long()
        labels = torch.where(self.predicted[first:end], ids, IGNORED)
        labels[0] = IGNORED  # nothing stands before it to predict it from
        return {"input_ids": ids, "labels": labels}

    @property
    def targets(self) -> int:
        """How many tokens are predicted in all."""
        return sum(int(self.predicted[first + 1 : end].sum()) for first, end in self.spans)


def encode(records: Sequence[Record], tokenizer: Any, seq_len: int, *, title: str = "reading") -> Windows:
    """Token windows of at most `seq_len` ids.

    Texts are laid end to end, each with the tokenizer's first and last token where it has them, and cut into windows
    that overlap by one token: each token but the very first is predicted exactly once. A record with a prompt is a
    window of its own, only its completion is predicted; where it is too long the prompt loses its beginning first.

    Raises UserError if nothing is left to predict.
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
        if not start and length:  # then the first token has no predecessor and is never predicted
            size -= len(tokenizer.decode(ids[0][:1].tolist()).encode())
    spans = [(first, end) for first, end in spans if end - first > 1]
    windows = Windows(torch.cat(ids), torch.cat(predicted), spans, max(size, 1))
    if not windows.targets:
        raise UserError(f"{title}: too little text: not one token to predict")
    return windows


def _fit(
    start: list[int], prompt: list[int], text: list[int], stop: list[int], seq_len: int
) -> tuple[list[int], int, list[int]]:
    """(ids of the window, where the predicted part begins, tokens of the completion that did not fit)."""
    room = seq_len - len(start) - len(stop)
    # One token of the prompt stays where no start token stands before the completion.
    kept_text = text[: room if start else room - 1]
    space = room - len(kept_text)
    kept_prompt = prompt[len(prompt) - min(space, len(prompt)) :]
    head = [*start, *kept_prompt]
    return [*head, *kept_text, *stop], len(head), text[len(kept_text) :]


def collate(rows: Sequence[dict[str, torch.Tensor]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch: rows padded on the right to the longest, [B,T]; an attention mask only where something was padded."""
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
    """A tokenizer whose ids 0 to 255 are the bytes themselves, then start, end and padding: 259 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The `tokenizers` library shows bytes as printable characters: those that are printable in Latin-1 as they
    # stand, the rest as the characters from U+0100 on.
    shown: Iterable[int] = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    vocab = {chr(byte if byte in shown else next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
