"""The comparison of methods at one budget: sizes, what is kept and made again, table and chart; in this process."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks import adaptation
from benchmarks.measure.store import Store
from benchmarks.report import budget
from benchmarks.report.__main__ import main as report
from benchmarks.report.text import spread
from genft_cli.demo import run as demo
from genft_cli.demo import stages
from genft_modules import METHODS

SMOKE = adaptation.SIZES["smoke"]


def in_process(command, environment=None):
    package = command[2]
    module = importlib.import_module(f"{package}.main" if package == "genft_cli" else package)
    assert module.main(command[3:]) == 0


def llama(folder: Path, task: demo.Demo) -> Path:
    """The base model's configuration, without its weights."""
    LlamaConfig(
        vocab_size=259,
        hidden_size=task.hidden,
        intermediate_size=task.feed_forward,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
    ).save_pretrained(folder)
    return folder


def test_the_command_trains_times_and_keeps(monkeypatch, tmp_path, capsys):
    """By the commands that would be processes, each with its own arguments."""
    monkeypatch.setattr(stages, "in_process", lambda stage, *arguments: stage(*arguments))
    monkeypatch.setattr(adaptation, "_call", in_process)
    small = dataclasses.replace(SMOKE, methods=("peft-lora",), seeds=(0,))
    monkeypatch.setitem(adaptation.SIZES, "smoke", small)
    monkeypatch.setattr(adaptation, "TUNING_FACTORS", (1.0,))
    places = ["--results", str(tmp_path / "results"), "--cache-dir", str(tmp_path / "cache")]
    assert adaptation.main(["--size", "smoke", "--workers", "1", *places]) == 0
    assert "adaptation/smoke.json" in capsys.readouterr().out
    (path,) = tmp_path.glob("results/*/adaptation/smoke.json")
    (row,) = budget.rows(json.loads(path.read_text()))
    assert abs(row.trainable - SMOKE.budget) < 0.2 * SMOKE.budget
    assert row.relative == (1.0, 1.0, 1.0)
    assert 1 < row.bits[0] < 8.1, "a byte has eight bits, and two steps from scratch save few of them"
    assert row.memory > row.idle > 0
    assert row.seconds > 0
    assert len(json.loads(path.read_text())["runs"]) == 2


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Runs that cost nothing; the names of those that were made."""
    made = []

    def train(job, *_):
        made.append(job.key)
        bits = {"bits_per_byte_before": 3.0, "bits_per_byte_after": 2.0 + job.lr + 0.1 * job.seed}
        counts = {"trainable_parameters": 1000 + job.value, "peak_memory_mib": 600.0, "idle_memory_mib": 500.0}
        return {"settings": job.settings, **bits, **counts, "commit": "abc", "load": 0.0}

    def steps(command):
        made.append("times")
        times = {each.method: [1.0, 2.0, 3.0] for each in adaptation.ENTRANTS}
        Path(command[-1]).write_text(json.dumps(times))

    base = llama(tmp_path / "base", SMOKE.task)
    monkeypatch.setattr(demo, "pretrained_base", lambda task, cache: (base, False))
    monkeypatch.setattr(adaptation, "fitted", lambda *_: (4, 1004))
    monkeypatch.setattr(adaptation, "train", train)
    monkeypatch.setattr(adaptation, "_call", steps)
    return made


def test_only_what_is_missing_is_made(trained, monkeypatch, tmp_path):
    def run(size=SMOKE):
        trained.clear()
        return json.loads(adaptation.run(size, tmp_path, tmp_path, workers=2).read_text())

    whole, calls = adaptation.train, []

    def failing(job, *rest):
        calls.append(job)
        if len(calls) == 12:
            raise RuntimeError("out of memory")
        return whole(job, *rest)

    monkeypatch.setattr(adaptation, "train", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    monkeypatch.setattr(adaptation, "train", whole)
    before = set(trained)
    assert len(before) >= 10
    data = run()
    tuning = {
        f"{each.method} lr={each.lr * factor:.3g} seed=1000" for each in SMOKE.entrants() for factor in (0.4, 1.0, 2.5)
    }
    compared = {
        f"{each.method} lr={0.4 * each.lr:g} seed={seed}" for each in SMOKE.entrants() for seed in SMOKE.seeds
    }  # bits per byte grow with the learning rate here, so the lowest is the best
    assert (len(tuning), len(compared)) == (9, 6)
    assert set(data["runs"]) == tuning | compared
    assert set(trained) == (tuning | compared) - before | {"times"}
    assert run() == data
    assert not trained

    # A changed setting: those runs alone, and the times, which are measured together.
    faster = [dataclasses.replace(each, lr=2 * each.lr) if each.method == "sas" else each for each in SMOKE.entrants()]
    monkeypatch.setattr(adaptation, "ENTRANTS", tuple(faster))
    again = run()
    assert sorted(trained) == [*sorted(set(again["runs"]) - tuning - compared), "times"]
    assert len(trained) == 3 + 2 + 1
    assert len(again["runs"]) == 9 + 6
    longer = dataclasses.replace(SMOKE, task=dataclasses.replace(SMOKE.task, adapt_steps=3))
    assert len(run(longer)["runs"]) == 9 + 6
    assert len(trained) == 9 + 6 + 1


def test_the_report_shows_it(trained, tmp_path):
    path = adaptation.run(SMOKE, tmp_path / "results", tmp_path, workers=1)
    data = json.loads(path.read_text())
    readme, arguments = (
        tmp_path / "README.md",
        ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")],
    )

    def made() -> tuple[str, str, list[str]]:
        readme.write_text("<!-- methods:start -->\n<!-- methods:end -->\n")
        assert report([*arguments, "--readme", str(readme)]) == 0
        charts = [chart.read_text() for chart in (tmp_path / "docs" / "charts").glob("*-adaptation.svg")]
        return (tmp_path / "docs" / "benchmarks.md").read_text(), readme.read_text(), charts

    assert made()[2] == [], "of the full size only"
    path.rename(path.with_name("full.json"))
    text, shown, (chart,) = made()
    assert "-adaptation.svg)" in text
    assert "3.000 bits per byte" in text
    assert "0.004: 102.004, 0.01: 102.010, 0.025: 102.025" in text
    for row in budget.rows(data):
        bits = spread(row.bits)
        assert bits.endswith(f"[{2 + row.lr:.3f}, {2.1 + row.lr:.3f}]")
        assert row.lr == pytest.approx(0.4 * next(each.lr for each in adaptation.ENTRANTS if each.method == row.method))
        assert f"| {row.name} | {row.knob} | {row.trainable:,} | {row.lr:g} | {bits} | 1.00 [1.00, 1.00] |" in text
        assert f"{row.name}, {row.trainable:,}" in chart
    leader = next(row for row in budget.rows(data) if row.method != "full")
    assert f"**{leader.name.split(' (')[0]} leads** on our small task" in shown
    assert made() == (text, shown, [chart]), "made twice, equal"


def test_every_method_comes_near_the_budget(tmp_path):
    size = adaptation.SIZES["full"]
    assert {*METHODS, "genft-gelu", "peft-lora", "full"} == set(size.methods)
    base = llama(tmp_path, size.task)
    for entrant in size.entrants():
        value, trainable = adaptation.fitted(entrant, size, base)
        if entrant.knob:
            assert abs(trainable / size.budget - 1) < 0.1, (entrant.method, value, trainable)


def test_quartiles_and_order():
    about = {
        "methods": ["lora", "peft-lora"],
        "seeds": [0, 1],
        "learning_rates": {"lora": 0.1, "peft-lora": 0.1},
        "values": {"lora": ["r", 4], "peft-lora": ["r", 4]},
    }
    runs = {
        f"{method} lr=0.1 seed={seed}": {
            "trainable_parameters": 7,
            "bits_per_byte_after": bits + seed,
            "peak_memory_mib": 10 + seed,
            "idle_memory_mib": 5,
        }
        for method, bits in (("lora", 2.0), ("peft-lora", 1.0))
        for seed in (0, 1)
    }
    steps = {"seconds": {"lora": [1.0, 2.0, 3.0, 4.0, 5.0], "peft-lora": [1.0] * 5}}
    found = budget.rows({"about": about, "runs": runs, "steps": steps})
    assert [row.method for row in found] == ["peft-lora", "lora"], "the best first"
    assert found[1].bits == [2.0, 3.0]
    assert found[1].relative == (3.0, 2.0, 4.0)
    assert (found[1].seconds, found[1].memory, found[1].knob) == (3.0, 10.5, "r = 4")


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "full.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match=r"full.json: not a file of schema 1; remove it to begin again"):
        Store(path, budget.SCHEMA)
