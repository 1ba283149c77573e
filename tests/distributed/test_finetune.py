"""`torchrun -m genft_modules.cli finetune` on two processes; one of them is killed, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .finetune_runs import STEPS, arguments

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[int]], str, str]:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.finetune_runs", str(folder)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(lines[-1]), "\n".join(lines[:-1]), done.stderr


def test_processes_with_different_options_are_refused(runs):
    folder, ends, _, errors = runs
    assert ends["refused"] == [2, 2]
    assert errors.count("options: processes [1] have others than process 0") == 2
    assert "--warmup: 1.0 there, 0.0 in process 0" in errors
    assert not (folder / "refused").exists()


def test_two_processes_train_one_adapter_and_one_of_them_speaks(runs):
    folder, ends, out, _ = runs
    assert ends["whole"] == [0, 0]
    assert out.count("trainable ") == 2  # of the two and of the one
    record, single = (json.loads((folder / name / "run.json").read_text()) for name in ("whole", "single"))
    assert (record["processes"], single["processes"]) == (2, 1)
    assert record["steps"] == STEPS
    assert record["bits_per_byte_after"] < record["bits_per_byte_before"]
    assert record["bits_per_byte_after"] == pytest.approx(single["bits_per_byte_after"], rel=1e-5)
    for (_, loss), (_, want) in zip(record["training_curve"], single["training_curve"], strict=True):
        assert loss == pytest.approx(want, rel=1e-4)  # the two took halves of the same batches
    left = {path.name for path in (folder / "whole").iterdir()}
    assert left == {"adapter", "job.json", "run.json", "loss.png", "probe.safetensors"}


def process_of(rank: int, parent: int) -> int | None:
    """Among the children of `parent`."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    return None


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process to kill in /proc")
def test_a_killed_process_is_started_again_and_the_run_ends_as_if_nothing_had_happened(runs):
    folder, *_ = runs
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "-m", "genft_modules.cli", *arguments(folder, "killed")],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as launched:  # fmt: skip
        output = folder / "killed"
        while not (output / "checkpoint-8" / "trainer_state.json").exists():
            assert launched.poll() is None, launched.stderr.read()[-3000:]
            time.sleep(0.002)
        victim = process_of(1, launched.pid)
        os.kill(victim, signal.SIGKILL)
        out, errors = launched.communicate(timeout=300)
    assert launched.returncode == 0, errors[-3000:]
    assert f"(pid: {victim})" in errors  # torchrun saw it
    assert "Signal 9 (SIGKILL)" in errors or "exitcode: -9" in errors
    assert out.count("trainable ") == 1
    found, wanted = (folder / name / "adapter" / "adapter_model.safetensors" for name in ("killed", "whole"))
    assert found.read_bytes() == wanted.read_bytes()
    assert all(tensor.ne(0).any() for tensor in load_file(wanted).values())
    curves = [json.loads((folder / name / "run.json").read_text())["training_curve"] for name in ("killed", "whole")]
    assert curves[0] == curves[1]
