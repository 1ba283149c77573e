"""The contract of `contract.py` in two and in four processes, which are started once each for all of its checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from genft_modules import METHODS

ROOT = Path(__file__).parents[2]


def launch(processes: int, folder: Path) -> dict[str, str]:
    """Check → what went wrong, or nothing."""
    report = folder / f"{processes}.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*torchrun, "-m", "tests.distributed.contract", str(report)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GENFT_CHECKPOINTS": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    found: dict[str, str] = json.loads(report.read_text())["checks"] if report.exists() else {}
    return found if done.returncode == 0 else {**found, "the run": done.stderr[-3000:]}


def test_the_contract_holds_in_two_and_in_four_processes(tmp_path):
    for processes in (2, 4):  # the four go on from a checkpoint of the two
        found = launch(processes, tmp_path)
        failed = [f"{name}: {error}" for name, error in found.items() if error]
        assert not failed, "\n\n".join(failed)
        for way in ("ddp", "fsdp_leaves", "tensor_parallel") if processes == 2 else ("fsdp_and_tensor_parallel",):
            assert {f"{way}-{method}" for method in METHODS} <= found.keys()
        assert "checkpoint" in found
