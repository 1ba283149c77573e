"""Many adapters in the same batches: that it runs, and that wrong gradients are not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import adapters
from benchmarks.measure import results


def test_a_step_mixed_and_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--tiny", "--adapters", "2", "--rounds", "2", "--threads", "1", "--results", str(tmp_path)]
    assert adapters.main(command) == 0
    (path,) = tmp_path.glob("*/adapters/step.json")
    records = json.loads(path.read_text())["records"]
    assert {(one["method"], one["way"]) for one in records} == {
        ("peft-lora", "one by one"),
        *((method, way) for method in ("lora", "wegeft") for way in ("one by one", "mixed")),
    }
    assert all(one["tokens_per_second"] > 0 and one["peak_mib"] > 0 for one in records)
    monkeypatch.setattr(adapters, "agree", lambda *_: False)
    assert adapters.main(command) == 1
    assert all("ms" not in one for one in json.loads(path.read_text())["records"] if one["way"] == "mixed")


def test_the_gate_sees_a_wrong_gradient() -> None:
    found = [torch.randn(3, 3), torch.randn(4)]
    assert adapters.agree(found, [one.clone() for one in found])
    assert not adapters.agree(found, found[:1])
    assert not adapters.agree(found, [found[0], found[1] * 1.01])


def test_the_guides_figures_are_those_of_the_file() -> None:
    (path,) = results.FOLDER.glob("*/adapters/step.json")
    found = {(r["adapters"], r["method"], r["way"]): r for r in json.loads(path.read_text())["records"]}
    guide = (results.ROOT / "docs" / "guides" / "many.md").read_text()
    columns = [("peft-lora", "one by one"), *((m, w) for m in ("lora", "wegeft") for w in ("one by one", "mixed"))]
    for count in (1, 4, 16, 32):
        speeds = [f"{found[(count, *column)]['tokens_per_second']:,.0f}" for column in columns]
        peak = f"{found[count, 'lora', 'mixed']['peak_mib']:.0f} MiB"
        assert f"| {' | '.join([str(count), *speeds, peak])} |" in guide
