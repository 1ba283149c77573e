"""Data of the training commands: files in the field's formats, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from genft_cli import data
from genft_cli.arguments import parse
from genft_cli.console import UserError
from genft_cli.demo.bytes import byte_tokenizer, windows
from genft_cli.demo.corpora import hold_out

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SHAREGPT = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a b"},
    "pair": {"prompt": "a", "completion": "b"},
    "chat": {"messages": CHAT},
    "sharegpt": {"conversations": SHAREGPT},
    "tokens": {"input_ids": [1, 2]},
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
}


def load(path: object, *more: object, command: str = "finetune") -> tuple[Any, Any]:
    words = ["--model", "x", "--dataset", path, "--output", Path(str(path)).with_name("out"), *more]
    return data.load(parse(command, [str(word) for word in words]))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*((kind, ".jsonl") for kind in ROWS), ("pair", ".csv"), ("text", ".tsv"), ("chat", ".parquet"), ("pair", ".json")],
)
def test_formats(tmp_path: Path, kind: str, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [ROWS[kind]] * 10)
    train, held_out = load(path, "--eval_fraction", 0.2)
    assert (len(train), len(held_out)) == (8, 2)
    if kind == "alpaca":
        assert set(train.column_names) == {"prompt", "completion"}
        assert train[0]["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
        assert train[0]["completion"] == "3"
    else:
        assert train[0] == ROWS[kind]


def test_splits_of_a_folder_and_data_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": f"train {i}"} for i in range(3)])
    write(folder / "test.jsonl", [{"text": "test"}])
    train, held_out = load(folder)
    assert (len(train), held_out["text"]) == (3, ["test"])
    other = write(tmp_path / "other.csv", [{"text": "other"}])
    assert load(folder, "--eval_dataset", other)[1]["text"] == ["other"]
    assert load(folder, "--eval_strategy", "no")[1] is None


def test_one_long_text_is_cut_at_a_paragraph(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("".join(f"Paragraph {i} has\ntwo lines.\n\n" for i in range(40)))
    train, held_out = load(tmp_path / "notes.txt", "--eval_fraction", 0.1)
    assert train["text"][0] + held_out["text"][0] == (tmp_path / "notes.txt").read_text()
    assert held_out["text"][0].startswith("Paragraph 36")


def test_empty_rows_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": text} for text in ("b", " ", "c")])
    assert len(load(path, "--eval_strategy", "no")[0]) == 2
    assert "1 of 3 rows have no completion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\n1,2\n", "has the columns question, answer; expected .*messages.*instruction and"),
        ("a.jsonl", '{"text": "a", "messages": []}\n', "has messages as well as text"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b",}\n', "cannot be read .*(JSON|parse)"),
        ("a.jsonl", '{"text": ""}\n', "the column text is empty in every row"),
        ("a.csv", "text\n1\n2\n", "the column text has values of type int64; expected text"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "word", "too small for a held-out part"),
        ("a.jsonl", '{"text": "a"}\n', "too small for a held-out part"),
        ("a.bin", "x", "cannot read .bin; known are .json"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read .*(utf|decode)"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"--dataset .*{name}.*: .*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dataset_train_split", "best"), "has no split best; it has train"),
        (("--eval_dataset", "nothing.jsonl"), "--eval_dataset nothing.jsonl: no such file"),
        (("--dataset_test_split", "best"), "has no split best"),
        (("--eval_fraction", "1"), "--eval_fraction 1: must be"),
        (("--eval_fraction", "0"), "too small"),
        (("--eval_strategy", "no", "--eval_dataset", "x"), "--eval_strategy no does not use it"),
    ],
)
def test_refused_options(tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "a.jsonl", [ROWS["text"]] * 4), *more)


@pytest.mark.parametrize("name", ["missing.txt", "./nothing", "a/b/c"])
def test_missing(name: str) -> None:
    with pytest.raises(UserError, match=f"--dataset {name}: no such file"):
        load(name)


def test_preferences(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    assert len(load(path, command="dpo")[0]) == 3
    with pytest.raises(UserError, match="expected chosen and rejected"):
        load(write(tmp_path / "b.jsonl", [ROWS["pair"]] * 4), command="dpo")


# --- the demo's own ----------------------------------------------------------------------------------------------


def test_bytes_are_their_own_ids() -> None:
    tokenizer, text = byte_tokenizer(), "aä€\n 😀\x00"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert windows("abcdefg", tokenizer, 3).tolist() == [[97, 98, 99], [100, 101, 102]]


@pytest.mark.parametrize(
    ("sizes", "fraction", "blocks"), [([1] * 100, 0.1, 4), ([5, 1, 1, 7] * 20, 0.25, 2), ([3, 3], 0.1, 4)]
)
def test_hold_out_takes_contiguous_blocks_of_the_right_size(sizes: list[int], fraction: float, blocks: int) -> None:
    chosen = hold_out(sizes, fraction, blocks)
    held = sum(size for size, out in zip(sizes, chosen, strict=True) if out)
    assert abs(held - fraction * sum(sizes)) <= blocks * max(sizes)
    assert sum(now and not before for before, now in zip([False, *chosen], chosen, strict=False)) <= blocks
