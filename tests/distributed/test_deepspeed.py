"""DeepSpeed's ZeRO on two processes, where the package is installed. It compiles an extension when it first runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed.test_finetune import ENVIRONMENT, ROOT


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
