"""What adapters of experts cost and are worth: that both parts run and what their files say."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from benchmarks import experts
from benchmarks.measure import results


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_step_beside_the_frozen_experts_and_peft(tmp_path, monkeypatch):
    command = [
        "step",
        "--tiny",
        "--threads",
        "1",
        "--experts",
        "4",
        "--rounds",
        "2",
        "--out",
        str(tmp_path / "it.json"),
    ]
    assert experts.main(command) == 0
    data = json.loads((tmp_path / "it.json").read_text())
    records = {record["contender"]: record for record in data["step"]}
    assert list(records) == ["frozen", "genft-wegeft", "genft-wegeft-per-expert", "peft-lora"]
    assert all(record["gate"] and record["ms"]["rounds"] == 2 for record in records.values())
    # φ and ψ of both projections, K = 16; for each of 4 experts; A and B of 4 experts, N = 32 and 16
    assert [record["parameters"] for record in records.values()] == [0, 2 * 64, 4 * 2 * 64, 4 * 2 * (16 + 32 + 16 + 16)]
    monkeypatch.setattr(experts, "agrees", lambda model, *_: False)
    assert experts.main(command) == 0
    records = {record["contender"]: record for record in json.loads((tmp_path / "it.json").read_text())["step"]}
    assert [name for name, record in records.items() if "ms" in record] == ["frozen"]


def test_outputs_that_differ_are_told():
    shape = experts.Shape(tokens=8, hidden=16, intermediate=16, r=2)
    models = experts.contenders(4, shape)
    x = torch.randn(8, 16)
    assert experts.agrees(models["genft-wegeft"], models["frozen"], x)
    with models["genft-wegeft"].disable_adapter():
        assert not experts.agrees(models["genft-wegeft"], models["frozen"], x)


def test_quality_of_every_entrant(tmp_path, monkeypatch):
    def texts(task, folder):
        (folder / "it.txt").write_text("so it goes, and then it goes on\n" * 20)
        return dict.fromkeys(("train", "held-out"), folder / "it.txt")

    monkeypatch.setattr(experts.corpora, "stdlib_code", lambda size: "x = x + 1\n" * 50)
    monkeypatch.setattr(experts.demo, "write_texts", texts)
    out, cache = tmp_path / "it.json", tmp_path / "cache"
    assert experts.main(["quality", "--tiny", "--seeds", "1", "--out", str(out), "--cache-dir", str(cache)]) == 0
    data = json.loads(out.read_text())["quality"]
    assert list(data["entrants"]) == list(experts.ENTRANTS)
    assert all(len(entrant["tuning"]) == 3 and entrant["bits_per_byte"] for entrant in data["entrants"].values())


def test_entrants_have_equally_many_parameters():
    model = experts.Task().model()
    counts = []
    for entrant in experts.ENTRANTS.values():
        adapted = experts.get_peft_model(model, entrant.config())
        counts.append(sum(one.numel() for one in adapted.parameters() if one.requires_grad))
        model = adapted.unload()
    assert max(counts) < 1.05 * min(counts)


def test_the_guide_has_the_figures_of_the_file():
    (path,) = results.FOLDER.glob("*/experts/quality.json")
    found = json.loads(path.read_text())["quality"]
    guide = (results.ROOT / "docs" / "guides" / "moe.md").read_text()
    assert f"Before adaptation it is {found['before']:.3f}" in guide
    for name, entrant in found["entrants"].items():
        bits = entrant["bits_per_byte"]
        span = f"{min(bits):.3f} to {max(bits):.3f}"
        assert f"| {name} | {entrant['parameters']:,} | {statistics.fmean(bits):.3f} | {span} |" in guide
