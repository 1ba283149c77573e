"""`genft doctor`: what is installed, what will run, and whether it computes the right thing."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import torch

from genft_kernels import (
    DeviceFacts,
    Problem,
    choose_plan,
    device_facts,
    input_edit,
    input_edit_linear,
    lowrank_linear,
    weight_features,
)
from genft_kernels.plan import measured_entry
from genft_modules.cli.console import UserError, one_line, table

_PACKAGES = ("genft", "torch", "triton", "transformers", "peft", "accelerate", "numpy")
_SHAPE = {"m": 8192, "n": 4096, "k": 4096, "r": 16}  # a projection of an 8B model, four sequences of 2048 tokens

# An operation may be this many times as far from float64 as the same formula in plain torch products, plus FLOOR times
# the largest magnitude: rounding in another order, not another result.
_FACTOR = 2.0
_FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Tensors = dict[str, torch.Tensor]
Formula = Callable[[Tensors], torch.Tensor]


def run(seconds: float = 10.0) -> int:
    """Print the report; 0, or 1 if an operation computes something else than its formula in float64."""
    print(versions())
    print()
    print(devices())
    print()
    try:
        print(plan())
    except ValueError as error:  # a table that cannot be read
        raise UserError(one_line(error)) from None
    print()
    ok, report = self_check(seconds)
    print(report)
    return 0 if ok else 1


def versions() -> str:
    """Python's version and those of the packages that matter, one line each."""
    lines = [f"{'python':<14}{platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name:<14}{metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name:<14}not installed")
    return "\n".join(lines)


def device() -> torch.device:
    """The device that `genft finetune` takes."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def devices() -> str:
    """Every device, and the backend that "auto" means here."""
    lines = [f"{'device':<14}cpu, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        architecture = device_facts(torch.device("cuda", index)).architecture
        memory = properties.total_memory / 2**30
        lines.append(f"{'device':<14}cuda:{index}, {properties.name}, {architecture}, {memory:.0f} GiB")
    backend = "triton" if device().type == "cuda" else "reference (plain PyTorch: no GPU here)"
    lines.append(f"{'backend':<14}auto means {backend}")
    return "\n".join(lines)


def plan() -> str:
    """The launch plan for one shape; on a machine without a GPU, the one that an H100 would follow as well."""
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
        return "from the model of the card, not measured"
    return "measured by genft tune" if entry["source"] == "user" else "measured, packaged"


# --- self-check --------------------------------------------------------------------------------------------------


def _edit(t: Tensors) -> torch.Tensor:
    return t["x"] + 0.5 * (t["x"] @ t["psi"].T) @ t["phi"]


def _lowrank(t: Tensors) -> torch.Tensor:
    return t["x"] @ t["weight"].T + 0.5 * (t["x"] @ t["p"]) @ t["q"].T + t["bias"]


# name → (the operation, its formula in plain torch products, what both are differentiated by)
_CHECKS: dict[str, tuple[Formula, Formula, tuple[str, ...]]] = {
    "lowrank_linear": (
        lambda t: lowrank_linear(t["x"], t["weight"], t["p"], t["q"], t["bias"], scale=0.5),
        _lowrank,
        ("x", "p", "q", "bias"),
    ),
    "input_edit_linear": (
        lambda t: input_edit_linear(t["x"], t["weight"], t["psi"], t["phi"], t["bias"], scale=0.5),
        lambda t: _edit(t) @ t["weight"].T + t["bias"],
        ("x", "psi", "phi", "bias"),
    ),
    "input_edit": (
        lambda t: input_edit(t["x"], t["psi"], t["phi"], scale=0.5),
        _edit,
        ("x", "psi", "phi"),
    ),
    "weight_features": (
        lambda t: weight_features(t["weight"], t["psi"], ratio=0.5, activation="gelu"),
        lambda t: torch.nn.functional.gelu(0.5 * t["weight"] @ t["psi"].T),
        ("psi",),
    ),
}


def self_check(seconds: float) -> tuple[bool, str]:
    """(whether all is well, a table): outputs and every gradient of the operations against float64, on this device.

    Goes through all operations and dtypes once, then over further random shapes until the time is up.
    """
    here, began = device(), time.monotonic()
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if here.type == "cuda" else [])
    worst: dict[tuple[str, torch.dtype], tuple[float, str]] = {}
    generator = torch.Generator().manual_seed(0)
    rounds = 0
    for shape in _shapes(generator):
        for name in _CHECKS:
            for dtype in dtypes:
                share = _compare(name, shape, dtype, here, generator)
                worst[name, dtype] = max(worst.get((name, dtype), (0.0, "")), share)
        rounds += 1
        if time.monotonic() - began > seconds:
            break
    rows = [
        (f"{name} {str(dtype).removeprefix('torch.')}", f"{share:.2f}", what, "ok" if share <= 1 else "WRONG")
        for (name, dtype), (share, what) in worst.items()
    ]
    ok = all(share <= 1 for share, _ in worst.values())
    head = f"self-check on {here}: {rounds} shapes, outputs and gradients against float64"
    verdict = "all operations are right" if ok else "AN OPERATION IS WRONG: please report this output"
    return ok, "\n".join([head, table(("operation", "error / allowed", "largest in", ""), rows), f"{verdict}"])


def _shapes(generator: torch.Generator) -> Iterator[tuple[int, int, int, int]]:
    """(M, N, K, r): an even one, an odd one, a single row, then random ones."""
    yield 64, 128, 96, 16
    yield 37, 53, 67, 7
    yield 1, 129, 64, 3
    while True:
        m, n, k = (int(torch.randint(1, 300, (), generator=generator)) for _ in range(3))
        yield m, n, k, int(torch.randint(1, 65, (), generator=generator))


def _compare(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, here: torch.device, generator: torch.Generator
) -> tuple[float, str]:
    """(the largest error as a share of what is allowed, in which tensor)."""
    m, n, k, r = shape
    sizes = {"x": (m, k), "weight": (n, k), "p": (k, r), "q": (n, r), "psi": (r, k), "phi": (r, k), "bias": (n,)}
    values = {
        key: (torch.randn(size, generator=generator) / max(1.0, size[-1] ** 0.5)).to(here, dtype)
        for key, size in sizes.items()
    }
    operation, formula, leaves = _CHECKS[name]
    truth = _results(formula, {key: value.double() for key, value in values.items()}, leaves)
    plain, ours = _results(formula, values, leaves), _results(operation, values, leaves)
    worst = (0.0, "")
    for key, exact in truth.items():
        error = float((ours[key].double() - exact).abs().max())
        allowed = _FACTOR * float((plain[key].double() - exact).abs().max()) + _FLOOR[dtype] * float(exact.abs().max())
        share = error / allowed if allowed else math.inf if error else 0.0
        worst = max(worst, (math.inf if math.isnan(share) else share, key))
    return worst


def _results(formula: Formula, values: Tensors, leaves: tuple[str, ...]) -> Tensors:
    """The output, and the gradients of its sum weighted by a fixed cotangent."""
    inputs = {key: value.detach().requires_grad_(key in leaves) for key, value in values.items()}
    y = formula(inputs)
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, [inputs[key] for key in leaves], cotangent)
    return {"y": y.detach(), **{f"d{key}": g for key, g in zip(leaves, gradients, strict=True)}}
