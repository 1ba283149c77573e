"""DeepSpeed's ZeRO on two processes, where the package is installed. It compiles an extension when it first runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.forks import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_trains_what_one_process_does(stage):
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.distributed.zero", stage],
        cwd=ROOT,
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("parameters agree") == 2 * 3
