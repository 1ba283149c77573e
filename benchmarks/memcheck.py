"""compute-sanitizer around a few operations: it finds reads and writes outside of what was allocated.

`python -m benchmarks.memcheck` is what the sanitizer is put around: every operation with each of its algorithms, at a
size that is odd and at one that descriptors can address.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure.results import ROOT, Run
from benchmarks.subjects.operations import Check, checks, run_check

SIZES = ((127, 131, 129, 13), (64, 64, 64, 16))


def tool() -> str:
    """Where compute-sanitizer is, "" where it is not installed."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *map(str, sorted(Path("/usr/local").glob("cuda-*"))[::-1])]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places)) or ""


def memcheck(run: Run) -> None:
    """The part of a run: what the sanitizer says until the part's time is over."""
    found = tool()
    if not found or not (run.device.type == "cuda" or run.tiny):
        run.data["memcheck"] = {"result": "did not run: compute-sanitizer is not installed"}
        print(f"  {run.data['memcheck']['result']}", flush=True)
        return
    process = subprocess.Popen(
        [found, "--tool", "memcheck", "--show-backtrace", "no", sys.executable, "-m", "benchmarks.memcheck"],
        cwd=ROOT,
        # Every tensor an allocation of its own: the allocator's blocks would hide what is outside of a tensor.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    ended = True
    try:
        output, _ = process.communicate(timeout=max(1.0, run.left() - 3.0))
    except subprocess.TimeoutExpired:
        ended = False
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    lines = output.splitlines()
    checked = [line.removeprefix("checked ") for line in lines if line.startswith("checked ")]
    told = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    errors = int(told[-1]) if told else sum("Invalid __" in line for line in lines)
    result = f"{errors} errors in {len(checked)} set-ups"
    if not ended:
        result += ", stopped when its time was over"
    elif process.returncode and not errors:
        result += f", ended with {process.returncode}"
    run.data["memcheck"] = {
        "result": result,
        "errors": errors,
        "checked": checked,
        "output": [line for line in lines if line.startswith("=") and "/" not in line][:20],  # no paths of the machine
    }
    print(f"  {result}", flush=True)


def listed() -> Iterator[Check]:
    plain = {(c.operation, c.algorithm) for c in checks(("bf16",)) if c.algorithm != "auto"}
    for operation, algorithm in sorted(plain):
        for size in SIZES:
            yield Check(operation, *size, "bf16", algorithm)


if __name__ == "__main__":
    for check in listed():
        run_check(check, torch.device("cuda"))
        print(f"checked {check}", flush=True)
