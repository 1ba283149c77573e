"""Data sets of the training commands: a local file or folder, or a data set on the Hub; read by `datasets`.

What TRL's trainers prepare themselves (text, prompt and completion, messages, preferences) is handed on as it is;
Alpaca's columns become prompt and completion, ShareGPT's conversations become messages. Anything else is refused with
the columns that were found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genft_cli.arguments import Options
from genft_cli.console import UserError, one_line, say

# The readers of `datasets` for single files.
READERS = {
    ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text",
}  # fmt: skip
# What TRL's trainers take, by command; the first that fits counts.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "finetune": (("input_ids",), ("messages",), ("prompt", "completion"), ("text",)),
    "dpo": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
}
# The prompts of Stanford Alpaca, with and without an input.
ALPACA = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
}


def load(options: Options) -> tuple[Any, Any]:
    """(training data, held-out data or None). Raises UserError if the data cannot be used."""
    script, run = options.script, options.run
    if not 0 <= run.eval_fraction < 1:
        raise UserError(f"--eval_fraction {run.eval_fraction:g}: must be at least 0 and below 1")
    if options.mixture.datasets:
        data = _mixture(options)
        name = "datasets"
    elif script.dataset_name:
        name = f"--dataset {script.dataset_name}"
        data = read(script.dataset_name, name, config=script.dataset_config, streaming=script.dataset_streaming)
    else:
        raise UserError(
            "--dataset is missing: a file (.jsonl, .csv, .parquet, .txt), a folder or a data set on the Hub"
        )
    train = prepared(_split(data, script.dataset_train_split, name), options, name)
    if options.training.eval_strategy != "no":
        return _held_out(options, data, train, name)
    if run.eval_dataset is not None:
        raise UserError("--eval_dataset: --eval_strategy no does not use it")
    return train, None


def read(source: str, option: str, *, config: str | None = None, streaming: bool = False) -> Any:
    """The splits of a local file or folder, or of a data set on the Hub, by name."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(source).expanduser()
    try:
        if path.is_file():
            if path.suffix not in READERS:
                raise UserError(f"{option}: cannot read {path.suffix or path.name}; known are {', '.join(READERS)}")
            if path.stat().st_size == 0:
                raise UserError(f"{option}: is empty")
            details: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            if path.suffix == ".txt":
                details = {"sample_by": "document"}
            return load_dataset(READERS[path.suffix], data_files=str(path), streaming=streaming, **details)
        if path.is_dir():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                found = load_from_disk(str(path))
                return found if isinstance(found, DatasetDict) else DatasetDict(train=found)
            return load_dataset(str(path), streaming=streaming)
        if path.suffix in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
            raise UserError(f"{option}: no such file")
        return load_dataset(source, config, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # pyarrow, pandas and the Hub's client raise many types
        where = "cannot be read" if path.exists() else "no such file, and cannot be read from the Hub"
        cause: BaseException = error.__cause__ or error
        raise UserError(f"{option}: {where} ({one_line(cause)[:200]})") from None


def _mixture(options: Options) -> Any:
    from trl import get_dataset

    try:
        return get_dataset(options.mixture)
    except Exception as error:  # as above
        raise UserError(f"datasets: {one_line(error.__cause__ or error)[:200]}") from None


def _split(data: Any, name: str, option: str) -> Any:
    if name not in data:
        raise UserError(f"{option}: has no split {name}; it has {', '.join(data)}")
    return data[name]


def _held_out(options: Options, data: Any, train: Any, name: str) -> tuple[Any, Any]:
    """(training data, held-out data): a data set of its own, the test split, or a part of the training data."""
    run, script = options.run, options.script
    if run.eval_dataset is not None:
        option = f"--eval_dataset {run.eval_dataset}"
        other = read(run.eval_dataset, option)
        split = next(split for split in (script.dataset_test_split, *other) if split in other)
        return train, prepared(other[split], options, option)
    for split in dict.fromkeys((script.dataset_test_split, "test", "validation", "eval")):
        if split in data:
            return train, prepared(data[split], options, name)
    if "dataset_test_split" in options.given:
        _split(data, script.dataset_test_split, name)
    small = f"{name}: too small for a held-out part; use --eval_dataset, or --eval_strategy no"
    if not hasattr(train, "__len__"):
        raise UserError(f"{name}: a stream has no held-out part; use --eval_dataset, or --eval_strategy no")
    if len(train) == 1 and "text" in train.column_names:
        return _cut(train, run.eval_fraction, small)
    if len(train) < 2 or not run.eval_fraction > 0:
        raise UserError(small)
    parts = train.train_test_split(test_size=max(1, round(run.eval_fraction * len(train))), seed=options.training.seed)
    return parts["train"], parts["test"]


def _cut(document: Any, fraction: float, small: str) -> tuple[Any, Any]:
    """One long text: its end is held out, from the nearest start of a paragraph, a line or a word on."""
    from datasets import Dataset

    text = document[0]["text"]
    want = len(text) * (1 - fraction)
    for mark in (r"\n\s*\n", r"\n", r"\s"):
        ends = [found.end() for found in re.finditer(mark, text) if text[found.end() :].strip()]
        near = [end for end in ends if abs(end - want) <= max(0.5 * fraction * len(text), 1)]
        if near:
            at = min(near, key=lambda end: abs(end - want))
            return Dataset.from_dict({"text": [text[:at]]}), Dataset.from_dict({"text": [text[at:]]})
    raise UserError(small)


# --- columns -----------------------------------------------------------------------------------------------------


def prepared(data: Any, options: Options, name: str) -> Any:
    """The data in columns that the trainer knows, without rows that have no text."""
    found = list(data.column_names or next(iter(data)))
    if options.command == "finetune" and {"instruction", "output"} <= set(found):
        data = data.map(
            _alpaca, remove_columns=[column for column in found if column in ("instruction", "input", "output")]
        )
        found = list(data.column_names or next(iter(data)))
    if "conversations" in found and "messages" not in found:
        data = data.map(_chatml, remove_columns=["conversations"])
        found = list(data.column_names or next(iter(data)))
    text = getattr(options.training, "dataset_text_field", "text")
    kinds = [tuple(text if column == "text" else column for column in kind) for kind in COLUMNS[options.command]]
    fits = [kind for kind in kinds if set(kind) <= set(found)]
    if not fits:
        known = ", or ".join(" and ".join(kind) for kind in kinds)
        if options.command == "finetune":
            known += ", or instruction and output"
        raise UserError(f"{name}: has the columns {', '.join(found)}; expected {known}")
    if len(fits) > 1:
        both = " as well as ".join(" and ".join(kind) for kind in fits)
        raise UserError(f"{name}: has {both}; remove the columns that are not meant")
    return _without_empty(data, fits[0], name)


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    values = {"instruction": row["instruction"] or "", "input": row.get("input") or ""}
    return {"prompt": ALPACA[bool(values["input"])].format(**values), "completion": row["output"]}


_ROLES = {"human": "user", "gpt": "assistant"}


def _chatml(row: Mapping[str, Any]) -> dict[str, Any]:
    """ShareGPT's conversations as messages; TRL would leave the roles as they are."""
    messages = []
    for turn in row["conversations"] or []:
        role, text = turn.get("from") or turn["role"], turn.get("value") or turn["content"]
        messages.append({"role": _ROLES.get(role, role), "content": text})
    return {"messages": messages}


def _without_empty(data: Any, columns: tuple[str, ...], name: str) -> Any:
    """Without rows in which the last of the columns is empty; says how many there were."""
    column = columns[-1]
    if not hasattr(data, "__len__"):
        return data
    for each in columns:
        kind = getattr(data.features[each], "dtype", "list")  # a list or a mapping has none
        if kind not in ("string", "large_string", "null", "list"):
            raise UserError(f"{name}: the column {each} has values of type {kind}; expected text")
    kept = data.filter(lambda value: bool(value.strip() if isinstance(value, str) else value), input_columns=column)
    if not len(kept):
        raise UserError(f"{name}: the column {column} is empty in every row")
    if lost := len(data) - len(kept):
        say(f"{name}: {lost} of {len(data)} rows have no {column} and are left out")
    return kept
