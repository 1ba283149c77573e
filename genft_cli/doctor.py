"""`genft doctor`: installed versions, devices and plans, and a numerical self-check."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from importlib import metadata

import torch

from genft_cli.console import UserError, one_line, table
from genft_kernels import DeviceFacts, Problem, choose_plan, device_facts
from genft_kernels.formulas import OPERATIONS, Examination, draw
from genft_kernels.gate import Verdict
from genft_kernels.plan import measured_entry

_PACKAGES = ("genft", "torch", "triton", "transformers", "peft", "accelerate", "numpy")
_SHAPE = {"m": 8192, "n": 4096, "k": 4096, "r": 16}  # a projection of an 8B model, four sequences of 2048 tokens


def run(seconds: float = 10.0) -> int:
    """Print the report. Returns the exit code: 1 if an operation differs from its float64 formula, else 0."""
    print(versions())
    print()
    print(devices())
    print()
    try:
        print(plan())
    except ValueError as error:  # an unreadable table of plans
        raise UserError(one_line(error)) from None
    print()
    ok, report = self_check(seconds)
    print(report)
    return 0 if ok else 1


def versions() -> str:
    """Versions of Python and of the packages in use, one per line."""
    lines = [f"{'python':<14}{platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name:<14}{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name:<14}not installed")
    return "\n".join(lines)


def device() -> torch.device:
    """The device that `genft finetune` uses by default."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def devices() -> str:
    """All devices, and the backend selected by "auto"."""
    lines = [f"{'device':<14}cpu, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = device_facts(torch.device("cuda", index)).architecture
        memory = properties.total_memory / 2**30
        lines.append(f"{'device':<14}cuda:{index}, {properties.name}, {architecture}, {memory:.0f} GiB")
    backend = "triton" if device().type == "cuda" else "reference (plain PyTorch, no GPU found)"
    lines.append(f"{'backend':<14}auto selects {backend}")
    return "\n".join(lines)


def plan() -> str:
    """The launch plan for one shape; without a GPU, also the plan for an H100."""
    problem = Problem("lowrank_linear", **_SHAPE, itemsize=2)
    shape = ", ".join(f"{name} = {value}" for name, value in _SHAPE.items())
    here = device()
    lines = [f"{'plan':<14}lowrank_linear, {shape}, 16 bits"]
    if here.type != "cuda":
        lines.append(f"{'':<14}cpu: reference")
    facts = device_facts(here) if here.type == "cuda" else DeviceFacts("sm_90", 132)
    lines.append(f"{'':<14}{facts.architecture}, {_source(problem, facts)}: {choose_plan(problem, facts)}")
    return "\n".join(lines)


def _source(problem: Problem, facts: DeviceFacts) -> str:
    """Where the plan of a problem comes from."""
    entry = measured_entry(problem, facts)
    if entry is None:
        return "from the cost model, not measured"
    return "measured by genft tune" if entry["source"] == "user" else "measured, packaged"


# --- self-check --------------------------------------------------------------------------------------------------


def self_check(seconds: float) -> tuple[bool, str]:
    """(passed, table): checks outputs and all gradients of the operations on this device against float64, by the rule
    of `genft_kernels.gate`.

    Covers all operations and dtypes at least once, then random shapes until the time is up.
    """
    here, began = device(), time.monotonic()
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if here.type == "cuda" else [])
    differentiable = [operation for operation in OPERATIONS.values() if operation.trained]
    worst: dict[tuple[str, str], tuple[float, Verdict]] = {}
    rounds = 0
    for shape in _shapes(torch.Generator().manual_seed(0)):
        for operation in differentiable:
            for dtype in dtypes:
                options = operation.options[rounds % len(operation.options)]
                examination = Examination(operation, *draw(operation, shape, dtype, here), options, dtype)
                verdict = examination.verdict(examination.results())
                found = (verdict.error / verdict.budget if verdict.budget else math.inf, verdict)
                key = (operation.name, str(dtype).removeprefix("torch."))
                worst[key] = max(worst.get(key, found), found, key=lambda one: (not one[1].ok, one[0]))
        rounds += 1
        if time.monotonic() - began > seconds:
            break
    rows = [
        (" ".join(key), f"{share:.2f}", verdict.worst, "ok" if verdict.ok else "WRONG")
        for key, (share, verdict) in worst.items()
    ]
    ok = all(verdict.ok for _, verdict in worst.values())
    head = f"self-check on {here}: {rounds} shapes, outputs and gradients against float64"
    result = "all operations are correct" if ok else "AN OPERATION IS WRONG: please report this output"
    return ok, "\n".join([head, table(("operation", "error / allowed", "largest in", ""), rows), result])


def _shapes(generator: torch.Generator) -> Iterator[tuple[int, int, int, int]]:
    """(M, N, K, r): an even one, an odd one, a single row, then random ones."""
    yield 64, 128, 96, 16
    yield 37, 53, 67, 7
    yield 1, 129, 64, 3
    while True:
        m, n, k = (int(torch.randint(1, 300, (), generator=generator)) for _ in range(3))
        yield m, n, k, int(torch.randint(1, 65, (), generator=generator))
