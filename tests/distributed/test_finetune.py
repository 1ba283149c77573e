"""`torchrun -m genft_cli finetune` on two processes; one of them is killed, and nothing is lost.

One test, so that its processes run once, whatever the workers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.finetune_runs import STEPS


def test_finetune_in_two_processes(tmp_path, forks):
    done = forks.run("tests.distributed.finetune_runs", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    before, ends, after = next(
        done.stdout.partition(line) for line in done.stdout.splitlines() if line.startswith('{"refused": ')
    )
    ends = json.loads(ends)
    different_options_are_refused(tmp_path, ends["refused"], done.stderr)
    two_train_one_adapter_and_one_of_them_speaks(tmp_path, ends["whole"], before)
    a_killed_process_changes_nothing(tmp_path, after, done.stderr)


def different_options_are_refused(folder: Path, ends: list[int], errors: str) -> None:
    assert ends == [2, 2]
    assert errors.count("options: ranks [1] differ from rank 0") == 2
    assert "--warmup_steps: got 1.0, rank 0 has 0.0" in errors
    assert not (folder / "refused").exists()


def two_train_one_adapter_and_one_of_them_speaks(folder: Path, ends: list[int], out: str) -> None:
    assert ends == [0, 0]
    assert out.count("trainable ") == 2  # of the two and of the one
    record, single = (json.loads((folder / name / "run.json").read_text()) for name in ("whole", "single"))
    assert (record["processes"], single["processes"]) == (2, 1)
    assert record["steps"] == STEPS
    assert record["held_out_after"] < record["held_out_before"]
    # The Trainer averages over batches, and two processes have other batches.
    assert record["held_out_after"] == pytest.approx(single["held_out_after"], rel=1e-3)
    for (_, loss), (_, want) in zip(record["training_curve"], single["training_curve"], strict=True):
        assert loss == pytest.approx(want, rel=1e-4)  # the two took halves of the same batches
    left = {
        path.name for path in (folder / "whole").iterdir() if not path.name.startswith(("checkpoint-", "tokenizer"))
    }
    assert left == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "log.jsonl", "loss.png", "options.yaml",
        "probe.safetensors", "run.json",
    }  # fmt: skip


def a_killed_process_changes_nothing(folder: Path, out: str, errors: str) -> None:
    """torchrun starts both again, and the run ends as the one that was not disturbed."""
    # torchrun saw it: that one was killed, or first that the other lost its partner.
    assert "failed (exitcode: -9) local_rank: 1" in errors or "failed (exitcode: 1) local_rank: 0" in errors
    assert out.count("trainable ") == 1
    found, wanted = (folder / name / "adapter_model.safetensors" for name in ("killed", "whole"))
    assert found.read_bytes() == wanted.read_bytes()
    assert all(tensor.ne(0).any() for tensor in load_file(wanted).values())
    curves = [json.loads((folder / name / "run.json").read_text())["training_curve"] for name in ("killed", "whole")]
    assert curves[0] == curves[1]
