"""The embedded demo in miniature, by the same path: pre-training, cache, processes, table, picture, reload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genft_cli.demo import run as demo
from genft_cli.demo import stages
from genft_cli.demo.run import Demo

MINIATURE = Demo(
    hidden=32, layers=2, heads=2, feed_forward=48, seq_len=64, batch_size=2, pretrain_steps=2, pretrain_batch=2,
    adapt_steps=2, timing_rounds=2, held_out=0.01, methods=("peft-lora", "wegeft"),
)  # fmt: skip


def test_demo_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []
    results = demo.run(MINIATURE, tmp_path / "out", tmp_path / "cache", shown.append)
    assert demo.agrees(results)
    assert not results["base_was_cached"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/wegeft/adapter_model.safetensors").is_file()
    table = (tmp_path / "out/table.md").read_text()
    assert table == demo.report(results) + "\n"
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(MINIATURE.methods)
    assert len({len(row) for row in rows}) == 1
    runs = results["runs"]
    assert [line.split("  ")[0] for line in shown] == ["method", "LoRA (peft)", "WeGeFT"]
    assert len({len(line) for line in shown}) == 1
    assert "  WeGeFT: " in demo.closing(results)
    assert "the logits agree" in demo.closing(results)
    assert len({record["bits_per_byte_before"] for record in runs.values()}) == 1
    assert runs["peft-lora"]["relative_time"] == 1.0
    assert all(record["peak_memory_mib"] > 0 and record["relative_time"] > 0 for record in runs.values())
    assert all(record["reload"]["loaded"] < 1e-4 for record in runs.values())
    progress = capfd.readouterr().err
    for words in ("pretraining", "wegeft", "time per step", "reloading in a new process"):
        assert words in progress
    assert "Warning" not in progress

    # The base is cached, whole, and found again; other sizes are another base.
    assert [path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()] == ["base"]
    base, trained = demo.pretrained_base(MINIATURE, tmp_path / "cache")
    assert (str(base), trained) == (results["base"], False)


def test_interrupted_pretraining_leaves_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "in_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.pretrained_base(MINIATURE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_report_says_when_a_reload_differs() -> None:
    record = {
        "method": "wegeft", "device": "cpu", "trainable_parameters": 1, "bits_per_byte_before": 2.0,
        "bits_per_byte_after": 1.0, "relative_time": 1.0, "timed_seconds_per_step": 0.1, "peak_memory_mib": 1.0,
        "idle_memory_mib": 1.0, "reload": {"loaded": 9.0, "merged": None, "agree": False},
    }  # fmt: skip
    results = {"runs": {"wegeft": record}, "demo": {"timing_rounds": 1}, "seconds": 1.0, "base_was_cached": True}
    assert "NOT ALL AGREE" in demo.report(results)
    assert not demo.agrees(results)
