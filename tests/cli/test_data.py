"""Reading, holding out, and windows of tokens."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genft_cli.console import UserError
from genft_cli.data import (
    IGNORED,
    Record,
    byte_tokenizer,
    collate,
    encode,
    hold_out,
    normal,
    read_records,
    split_records,
)
from tests.cli.conftest import PROSE


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


# --- the tokenizer


@given(st.text())
def test_bytes_are_their_own_ids(text: str) -> None:
    tokenizer = _shared_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def _shared_tokenizer(cache: list = []):  # noqa: B006 - hypothesis and fixtures do not mix; made once
    if not cache:
        cache.append(byte_tokenizer())
    return cache[0]


# --- reading


def test_text_is_one_record(prose: Path) -> None:
    assert read_records(str(prose)) == [Record(PROSE)]


def test_jsonl_of_both_kinds(texts: Path, pairs: Path) -> None:
    assert read_records(str(texts))[0] == Record("Paragraph 0: the colour of the cat is 0.")
    assert read_records(str(pairs))[0] == Record(" 0.", prompt="Paragraph 0: the colour of the cat is")


def test_jsonl_breaks_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "one\u2028two"}\r\n\n{"text": " "}\n{"text": "three"}', encoding="utf-8")
    assert [record.text for record in read_records(str(path))] == ["one\u2028two", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no text"),
        ("\n \n", "contains no text"),
        ('{"text": "a"}\n{"text": }\n', "line 2 is not JSON"),
        ('{"text": "a"}\n\n[1]\n', "line 3 is not a JSON object"),
        ('{"texts": "a"}', 'line 1 needs "text"'),
        ('{"prompt": "a"}', 'line 1 needs "text"'),
        ('{"text": 7}', 'line 1 needs "text"'),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "mixes records"),
    ],
)
def test_jsonl_that_cannot_be_learned_from(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_records(str(path))


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "a/b/c", "missing.jsonl"])
def test_missing_file(name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_records(name)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_records(str(tmp_path / "binary.txt"))
    with pytest.raises(UserError, match="is a directory"):
        read_records(str(tmp_path))


# --- holding out


@given(
    st.lists(st.integers(1, 20), min_size=60, max_size=300),
    st.floats(0.05, 0.5),
    st.integers(1, 5),
)
def test_hold_out_takes_contiguous_blocks_of_the_right_size(sizes: list[int], fraction: float, blocks: int) -> None:
    chosen = hold_out(sizes, fraction, blocks)
    runs = sum(now and not before for before, now in zip([False, *chosen], chosen, strict=False))
    assert 1 <= runs <= blocks
    share = sum(size for size, out in zip(sizes, chosen, strict=True) if out) / sum(sizes)
    assert abs(share - fraction) <= (blocks + 1) * max(sizes) / sum(sizes)


def test_split_of_one_text_keeps_every_paragraph_once() -> None:
    train, held = split_records([Record(PROSE)], 0.25)
    paragraphs = [p for part in (train, held) for p in part[0].text.split("\n\n") if p.strip()]
    assert sorted(paragraphs) == sorted(p for p in PROSE.split("\n\n") if p)
    assert not set(held[0].text.split("\n\n")) & set(train[0].text.split("\n\n")) - {""}


def test_split_drops_what_the_training_part_has_too() -> None:
    records = [Record(f"text {i}") for i in range(30)] + [Record("text  0\n"), Record("text 31")]
    train, held = split_records(records, 0.1, blocks=1)
    assert {normal(r.text) for r in train}.isdisjoint(normal(r.text) for r in held)
    assert len(train) + len(held) == 31


@pytest.mark.parametrize("records", [[Record("word")], [Record("same")] * 20])
def test_too_little_to_hold_out(records: list[Record]) -> None:
    with pytest.raises(UserError, match="too small"):
        split_records(records, 0.1)


# --- windows


@pytest.mark.parametrize("seq_len", [8, 31, 1000])
def test_each_token_is_predicted_once(tokenizer, seq_len: int) -> None:
    texts = ["first text", "and the second, longer", "x"]
    windows = encode([Record(text) for text in texts], tokenizer, seq_len)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    row = [i for text in texts for i in [start, *text.encode(), end]]
    predicted = [int(i) for window in windows for i in window["labels"] if i != IGNORED]
    assert predicted == row[1:]
    assert windows.targets == len(row) - 1
    assert windows.bytes == sum(len(text) for text in texts)
    assert max(len(window["input_ids"]) for window in windows) <= seq_len


def test_only_completions_are_predicted(tokenizer) -> None:
    windows = encode([Record(" 42", prompt="answer:"), Record("é", prompt="")], tokenizer, 32)
    first, second = windows[0], windows[1]
    assert tokenizer.decode(first["input_ids"]) == "<|start|>answer: 42<|end|>"
    assert [int(i) for i in first["labels"] if i != IGNORED] == [*b" 42", tokenizer.eos_token_id]
    assert [int(i) for i in second["labels"] if i != IGNORED] == [*"é".encode(), tokenizer.eos_token_id]
    assert windows.bytes == 5


def test_long_pairs_lose_the_beginning_of_the_prompt_then_the_end_of_the_completion(tokenizer) -> None:
    windows = encode([Record("cd", prompt="0123456789ab"), Record("x" * 50, prompt="y")], tokenizer, 12)
    assert tokenizer.decode(windows[0]["input_ids"]) == "<|start|>456789abcd<|end|>"
    assert tokenizer.decode(windows[1]["input_ids"]) == "<|start|>" + "x" * 10 + "<|end|>"
    assert windows.bytes == 12


def test_nothing_to_predict(tokenizer) -> None:
    class Plain:
        bos_token_id = eos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    with pytest.raises(UserError, match="too little text"):
        encode([Record("a")], Plain(), 8)
    windows = encode([Record("abc")], Plain(), 8)
    assert (windows.targets, windows.bytes) == (2, 2)  # nothing predicts the first


def test_collate_pads_and_masks() -> None:
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3], [4])]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in collate(rows[:1])


def test_records_survive_json(pairs: Path) -> None:
    for line, record in zip(pairs.read_text().splitlines(), read_records(str(pairs)), strict=True):
        assert json.loads(line) == {"prompt": record.prompt, "completion": record.text}


# --- the hub


def test_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the `datasets` package: no network in tests."""
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(name, split):\n"
        "    if name == 'nobody/nothing':\n"
        "        raise FileNotFoundError('no such\\n data set')\n"
        "    return [{'text': f'{name} {split}', 'id': 1}, {'text': ''}, {'text': 'two'}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    assert read_records("some/set", "dev") == [Record("some/set dev"), Record("two")]
    with pytest.raises(UserError, match=r"nobody/nothing: .*cannot be read from the Hub \(no such data set\)"):
        read_records("nobody/nothing")
    monkeypatch.delitem(sys.modules, "datasets")


def test_data_set_of_the_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no such file; to read it from the Hub, pip install datasets"):
        read_records("some/set")
