"""Scores of generated answers, against verdicts that were written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genft_cli.console import UserError
from genft_cli.scorers import SCORERS, report, score

GOLDEN = Path(__file__).parents[1] / "golden"
LINES = [
    pytest.param(name, json.loads(line), id=f"{name}-{json.loads(line)['why']}")
    for name in SCORERS
    for line in (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize(("name", "line"), LINES)
def test_golden(name: str, line: dict[str, Any]) -> None:
    verdict = SCORERS[name](line["generated"], line["answer"])
    assert (verdict.found, verdict.correct) == (line["found"], line["correct"])


def _file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", SCORERS)
def test_a_file_is_scored(name: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    result = score(_file(tmp_path / "answers.jsonl", rows), name)
    correct = sum(row["correct"] for row in rows)
    assert result == {
        "scorer": name,
        "rows": len(rows),
        "correct": correct,
        "without_answer": sum(row["found"] is None for row in rows),
        "accuracy": correct / len(rows),
    }
    assert json.loads((tmp_path / "answers.score.json").read_text()) == result
    assert f"accuracy {correct / len(rows):.4f} ({correct} of {len(rows)}; " in report(result)


def test_columns_and_tasks(tmp_path: Path) -> None:
    rows = [
        {"task": "boolq", "output_pred": "true", "label": "true"},
        {"task": "boolq", "output_pred": "false", "label": "true"},
        {"task": "piqa", "output_pred": "solution1", "label": "solution1"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    result = score(
        str(tmp_path / "a.json"), "commonsense", generated_column="output_pred", reference_column="label", by="task",
        output=str(tmp_path / "b.json"),
    )  # fmt: skip
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert {name: counts["accuracy"] for name, counts in result["by"].items()} == {"boolq": 0.5, "piqa": 1.0}
    assert result["mean"] == 0.75
    assert json.loads((tmp_path / "b.json").read_text()) == result
    assert "| mean  |" in report(result)


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"scorer": "bleu"}, '{"generated": "", "answer": ""}', "--scorer bleu: choose from commonsense, gsm8k"),
        ({}, '{"text": "7", "answer": "7"}', "--generated-column generated: .* has the columns text, answer"),
        ({"by": "task"}, '{"generated": "7", "answer": "7"}', "--by task: .* has the columns generated, answer"),
        ({}, '{"generated": "7", "answer": "7"}\n{"generated": "7"}', "row 2 has no answer"),
        ({}, '{"generated": "7", "answer": "seven"}', "row 1: no number in the reference, which is 'seven'"),
        ({}, '{"generated": "7",', "line 1: "),
        ({}, "[1]", "line 1: expected objects"),
        ({}, "\n", "has no rows"),
        (
            {"output": "no/such/folder.json"},
            '{"generated": "7", "answer": "7"}',
            "--output .*folder.json: No such file",
        ),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], text: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        score(str(path), **{"scorer": "gsm8k", **options})


def test_no_file() -> None:
    with pytest.raises(UserError, match=r"ANSWERS no.jsonl: no such file"):
        score("no.jsonl", "gsm8k")
    with pytest.raises(UserError, match=r"ANSWERS .*test_scorers.py: expected a file ending in .jsonl, .json"):
        score(__file__, "gsm8k")


def test_tables(tmp_path: Path) -> None:
    """The same rows from every format; a .tsv has no quoting, as in GLUE."""
    rows = [{"generated": 'say "7"', "answer": "7"}, {"generated": "8\u2028", "answer": "8"}]
    (tmp_path / "a.csv").write_text('generated,answer\n"say ""7""",7\n8\u2028,8\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('generated\tanswer\nsay "7"\t7\n8\u2028\t8\n', encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    from genft_cli.tables import read_rows

    for name in ("a.csv", "a.tsv", "a.json", "a.jsonl"):
        assert read_rows("--dataset", str(tmp_path / name)) == rows, name
