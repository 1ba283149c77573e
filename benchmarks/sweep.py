"""The sweep: candidate plans on the shapes of the goals, and the plan table that comes of it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from genft_kernels.formulas import OPERATIONS
from genft_kernels.plan import LaunchPlan, Problem, device_facts
from genft_kernels.timing import Stats, Step, clock_for, interleave, ratio

from . import shapes
from .operations import Check, candidates, drawn, run_check
from .results import Run
from .runner import spread
from .shapes import DTYPE_NAMES


def sweep(run: Run) -> None:
    """Candidate plans on the shapes of the goals; the best of each, if it is right, becomes the plan table."""
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    problems = _problems(run, dtype)
    compiled = _compile(run, problems, dtype)
    for problem in problems:
        entry = _sweep_one(run, problem, dtype, compiled)
        run.data["sweep"].append(entry)
        best = entry["best"]
        print(
            f"  {problem.operation} {problem.m}x{problem.n}x{problem.k} r{problem.r}: {best['algorithm']} "
            f"{best['ms']:.4f} ms, {best['ratio']:.3f} x product, default {entry['default']['ratio']:.3f}, "
            f"{entry['measured']} plans",
            flush=True,
        )
        run.flush()
        write_plans(run)


Kernels = tuple[str, int, str]


def _kernels(problem: Problem, plan: LaunchPlan) -> Kernels:
    """What a plan compiles to: sizes, groups and panels are run-time arguments."""
    skinny, contract = replace(plan.skinny, groups=1), replace(plan.contract, groups=1, panel=1)
    return problem.operation, problem.r, str(replace(plan, skinny=skinny, contract=contract))


def _compile(run: Run, problems: Sequence[Problem], dtype: torch.dtype) -> dict[Kernels, str] | None:
    """Compiles candidates in the workers before anything is timed, most wanted first, for less than half of the time
    that is left. What went wrong ("": nothing) for each that was compiled; None where there are no workers."""
    if run.workers < 2:
        return None
    items: dict[Kernels, tuple[Problem, str, str]] = {}
    for problem in problems:
        for plan in candidates(problem, OPERATIONS[problem.operation], device_facts(run.device)):
            items.setdefault(_kernels(problem, plan), (problem, DTYPE_NAMES[dtype], str(plan)))
    names = {item: kernels for kernels, item in items.items()}
    until = time.monotonic() + 0.45 * min(run.left(), 400)
    done: dict[Kernels, str] = {}
    for item, error in spread(_warm, list(items.values()), run):
        done[names[item]] = "" if error is None else str(error)
        if time.monotonic() > until:
            break
    print(f"  compiled {len(done)} of {len(items)} candidates", flush=True)
    return done


def _problems(run: Run, dtype: torch.dtype) -> list[Problem]:
    """Most wanted first. Batches are given by M; decode's 64 rows have an entry of their own."""
    size = dtype.itemsize
    if run.tiny:
        return [Problem(name, 24, 32, 32, 4, size) for name in ("lowrank_linear", "generated_linear")]
    linear = ("input_edit_linear", "lowrank_linear")
    found = []
    for r, rows in ((16, (8192, 2048, 16384, 64)), (64, (8192, 2048))):
        for m in rows:
            found += [Problem(op, m, n, k, r, size) for n, k in shapes.LLAMA_WEIGHTS for op in linear]
        found += [Problem(op, 12608, n, k, r, size) for n, k in shapes.VIT_WEIGHTS for op in linear]
        found += [Problem("weight_features", n, n, k, r, size) for n, k in shapes.LLAMA_WEIGHTS]
    generated = []
    for r, rows in ((16, (8192, 2048, 64)), (37, (8192, 2048))):
        for m in rows:
            generated += [Problem("generated_linear", m, n, k, r, size) for n, k in shapes.LLAMA_WEIGHTS]
        generated += [Problem("generated_features", 0, n, k, r, size) for n, k in shapes.LLAMA_WEIGHTS]
    # One of each in turn: whatever is cut off, both forms have their first shapes.
    pairs = itertools.zip_longest(found, generated)
    return [problem for pair in pairs for problem in pair if problem is not None]


def _check_of(problem: Problem, dtype: torch.dtype) -> Check:
    return Check(problem.operation, problem.m, problem.n, problem.k, problem.r, DTYPE_NAMES[dtype])


def _steps(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Any, Step | None]:
    """A maker of steps from plans, forward and backward (forward alone for decode's few rows), and the floor's step."""
    operation, check = OPERATIONS[problem.operation], _check_of(problem, dtype)
    tensors, cotangent = drawn(replace(check, bias=False), device)
    trained = [t for name, t in tensors.items() if name in operation.trained]
    options = operation.sweep(problem.r)
    forward_only = 0 < problem.m <= 64

    def make(plan: LaunchPlan) -> Step:
        def step(index: int) -> Any:
            if forward_only:
                with torch.no_grad():
                    return operation.run(tensors, options, None, plan=plan)
            return torch.autograd.grad(operation.run(tensors, options, None, plan=plan), trained, cotangent)

        return step

    if not operation.form:
        return make, None
    x = tensors["x"]
    weight = tensors["weight"].detach().requires_grad_(operation.form == "generated")

    def floor(index: int) -> Any:
        y = torch.nn.functional.linear(x, weight)
        wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
        return y if forward_only else torch.autograd.grad(y, wanted, cotangent)

    return make, floor


def _warm(item: tuple[Problem, str, str], device: torch.device) -> None:
    """Compiles what a plan needs, by running it once. In a worker: the compiler's cache on disk is shared."""
    problem, dtype, plan = item
    make, _ = _steps(problem, shapes.DTYPES[dtype], device)
    make(LaunchPlan.parse(plan))(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sweep_one(run: Run, problem: Problem, dtype: torch.dtype, compiled: dict[Kernels, str] | None) -> dict[str, Any]:
    operation = OPERATIONS[problem.operation]
    plans = candidates(problem, operation, device_facts(run.device))
    default, reference = str(plans[0]), str(LaunchPlan("reference"))
    if run.tiny:
        plans = [plan for plan in plans if plan.algorithm == "reference"] + plans[:1] + plans[-1:]
    failed: dict[str, str] = {}
    if compiled is not None:
        # What was not compiled in time would be compiled here, one after the other: only the default is worth that.
        plans = [p for p in plans if str(p) in (default, reference) or _kernels(problem, p) in compiled]
        failed = {str(p): compiled[_kernels(problem, p)] for p in plans if compiled.get(_kernels(problem, p))}
    make, floor = _steps(problem, dtype, run.device)
    steps: dict[str, Step] = {}
    for plan in plans:
        if str(plan) in failed:
            continue
        try:
            step = make(plan)
            step(0)
            steps[str(plan)] = step
        except Exception as error:
            failed[str(plan)] = f"{type(error).__name__}: {error}"[:200]
    clock = clock_for(run.device)
    first = {
        name: Stats.of(ms).median
        for name, ms in interleave(steps, clock, seconds=0.3, min_rounds=3, max_rounds=6, warmup=1).items()
    }
    finalists = sorted(first, key=lambda name: first[name])[:6]
    finalists += [name for name in (default, reference) if name in steps and name not in finalists]
    final = {name: steps[name] for name in finalists}
    if floor is not None:
        final["floor"] = floor
    rounds = 2 if run.tiny else 10
    measured = interleave(final, clock, seconds=0.5, min_rounds=rounds, max_rounds=30)
    base = measured.pop("floor", None) or measured[reference]
    ranked = sorted(measured, key=lambda name: Stats.of(measured[name]).median)
    red = []
    winner = reference
    for name in ranked:
        verdict = run_check(_check_of(problem, dtype), run.device, LaunchPlan.parse(name), repeat=False)
        if verdict["ok"]:
            winner = name
            break
        red.append({"plan": json.loads(name), **verdict})

    def told(name: str) -> dict[str, Any]:
        return {
            "algorithm": LaunchPlan.parse(name).algorithm,
            "plan": json.loads(name),
            "ms": Stats.of(measured[name]).json()["median"],
            "ratio": ratio(measured[name], base).json()["median"],
        }

    families: dict[str, float] = {}
    for name in first:
        ms = Stats.of(measured[name]).median if name in measured else first[name]
        algorithm = LaunchPlan.parse(name).algorithm
        families[algorithm] = min(ms, families.get(algorithm, float("inf")))
    return {
        "operation": problem.operation,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "r": problem.r,
        "dtype": DTYPE_NAMES[dtype],
        "floor_ms": Stats.of(base).json()["median"],
        "measured": len(first),
        "best": told(winner),
        "default": told(default) if default in measured else told(winner),
        "families": {name: round(ms, 6) for name, ms in families.items()},
        "red": red,
        "failed": [{"plan": json.loads(name), "why": why} for name, why in failed.items()],
    }


def write_plans(run: Run) -> None:
    """The plan table as genft_kernels/plans/<architecture>.json wants it, beside the result file. The largest measured
    batch of a shape speaks for all larger ones."""
    if run.folder is None:
        return
    entries = []
    for entry in run.data["sweep"]:
        same = [
            other["m"]
            for other in run.data["sweep"]
            if all(other[f] == entry[f] for f in ("operation", "n", "k", "r", "dtype"))
        ]
        entries.append(
            {
                "operation": entry["operation"],
                "m_max": 2**31 if entry["m"] == max(same) else entry["m"],
                "n": entry["n"],
                "k": entry["k"],
                "r": entry["r"],
                "itemsize": shapes.DTYPES[entry["dtype"]].itemsize,
                "plan": entry["best"]["plan"],
                "measured": {"m": entry["m"], "ms": entry["best"]["ms"], "families": entry["families"]},
            }
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.data["run"]
    text = {"device": log["device"]["name"], "commit": log["commit"], "torch": log["torch"], "entries": entries}
    path = run.folder / f"plans-{device_facts(run.device).architecture}.json"
    path.write_text(json.dumps(text, indent=1) + "\n")
