"""The sweep: candidate plans on the shapes of the goals, and the plan table that comes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import shapes
from benchmarks.measure.part import spread
from benchmarks.measure.results import Run
from benchmarks.measure.shapes import DTYPE_NAMES, DTYPES
from genft_kernels.plan import LaunchPlan, Problem, device_facts
from genft_kernels.tuning import Timed, candidates, measure, steps, table_entry, write_table


def sweep(run: Run, problems: Sequence[Problem] | None = None) -> None:
    """Candidate plans on the shapes of the goals, or on `problems`; the best of each, if it is right, becomes the plan
    table."""
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    problems = _problems(run, dtype) if problems is None else problems
    compiled = _compile(run, problems, dtype)
    for problem in run.paced(problems):
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
        for plan in candidates(problem, device_facts(run.device)):
            items.setdefault(_kernels(problem, plan), (problem, DTYPE_NAMES[_dtype_of(problem, dtype)], str(plan)))
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
    """Most wanted first: what P1, P6 and P7 measure, 8192 rows before the rest; then the generated form; then what is
    left of the low-rank one. Batches are given by M."""
    size = dtype.itemsize
    if run.tiny:
        return [Problem(name, 24, 32, 32, 4, size) for name in ("lowrank_linear", "generated_linear")]

    def low_rank(m: int, r: int, weights: Sequence[tuple[int, int]]) -> list[Problem]:
        linear = ("input_edit_linear", "lowrank_linear")
        return [Problem(op, m, n, k, r, size) for n, k in weights for op in linear]

    llama, decode = shapes.LLAMA_WEIGHTS, tuple((shape.n[0], shape.k) for shape in shapes.DECODE[:2])
    found = low_rank(8192, 16, llama) + low_rank(2048, 64, llama)
    found += [problem for m in (64, 8, 1) for problem in low_rank(m, 16, decode)]
    for r in (16, 37):
        found += [Problem("generated_linear", m, n, k, r, size) for m in (8192, 2048) for n, k in llama]
        # Made from factors, which are float32 beside 16-bit activations.
        found += [Problem("generated_features", 0, n, k, r, torch.float32.itemsize) for n, k in llama]
    found += low_rank(2048, 16, llama) + low_rank(16384, 16, llama) + low_rank(8192, 64, llama)
    found += low_rank(12608, 16, shapes.VIT_WEIGHTS) + low_rank(12608, 64, shapes.VIT_WEIGHTS)
    found += [Problem("weight_features", n, n, k, r, size) for r in (16, 64) for n, k in llama]
    return found + [Problem("generated_linear", 64, n, k, 16, size) for n, k in llama]


def _dtype_of(problem: Problem, dtype: torch.dtype) -> torch.dtype:
    return dtype if problem.itemsize == dtype.itemsize else torch.float32


def _warm(item: tuple[Problem, str, str], device: torch.device) -> None:
    """Compiles what a plan needs, by running it once. In a worker: the compiler's cache on disk is shared."""
    problem, dtype, plan = item
    make, _ = steps(problem, DTYPES[dtype], device)
    make(LaunchPlan.parse(plan))(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sweep_one(run: Run, problem: Problem, dtype: torch.dtype, compiled: dict[Kernels, str] | None) -> dict[str, Any]:
    dtype = _dtype_of(problem, dtype)
    plans = candidates(problem, device_facts(run.device))
    default, library = plans[0], LaunchPlan("library")
    if run.tiny:
        plans = [default, *(plan for plan in (library, plans[-1]) if plan != default)]
    failed: dict[LaunchPlan, str] = {}
    if compiled is not None:
        # What was not compiled in time would be compiled here, one after the other: only the default is worth that.
        plans = [p for p in plans if p in (default, library) or _kernels(problem, p) in compiled]
        failed = {p: compiled[_kernels(problem, p)] for p in plans if compiled.get(_kernels(problem, p))}
    tuned = measure(problem, dtype, run.device, plans, failed=failed, rounds=2 if run.tiny else 10)

    def told(timed: Timed) -> dict[str, Any]:
        return {
            "algorithm": timed.plan.algorithm,
            "plan": json.loads(str(timed.plan)),
            "ms": round(timed.ms, 6),
            "ratio": round(timed.ratio, 6),
        }

    def reasons(plans: dict[LaunchPlan, str]) -> list[dict[str, Any]]:
        return [{"plan": json.loads(str(plan)), "why": why} for plan, why in plans.items()]

    return {
        "operation": problem.operation,
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "r": problem.r,
        "dtype": DTYPE_NAMES[dtype],
        "floor_ms": round(tuned.floor_ms, 6),
        "measured": tuned.measured,
        "best": told(tuned.best),
        "default": told(tuned.default),
        "library": told(tuned.library),
        "families": {name: round(ms, 6) for name, ms in tuned.families.items()},
        "red": reasons(tuned.red),
        "failed": reasons(tuned.failed),
    }


def write_plans(run: Run) -> None:
    """The plan table as genft_kernels/plans/<architecture>.json wants it, beside the result file."""
    if run.folder is None:
        return
    entries = [
        table_entry(
            Problem(*(entry[size] for size in ("operation", "m", "n", "k", "r")), DTYPES[entry["dtype"]].itemsize),
            LaunchPlan.parse(json.dumps(entry["best"]["plan"])),
            entry["best"]["ms"],
            entry["families"],
        )
        for entry in run.data["sweep"]
    ]
    log = run.data["run"]
    about = {"device": log["device"]["name"], "commit": log["commit"], "torch": log["torch"]}
    write_table(run.folder / f"plans-{device_facts(run.device).architecture}.json", entries, **about)
