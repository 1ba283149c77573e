"""Tuning: candidate plans for a problem, their measurement on this GPU, and the tables that `choose_plan` reads.

The candidates of a problem, including the library's plan, are timed together with the layer's own product. Then they
are checked by the gate, fastest first, and the first correct one is selected. Plans that do not compile are skipped.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .formulas import OPERATIONS, Examination, Operation, draw
from .gate import poisoned
from .plan import (
    ALGORITHMS_OF,
    FEW_ROWS,
    GENERATED,
    LIBRARY,
    MAX_TRITON_RANK,
    SINGLE_DEFAULTS,
    SQUARES,
    ContractPlan,
    DeviceFacts,
    LaunchPlan,
    Problem,
    ProductPlan,
    SkinnyPlan,
    choose_plan,
    default_plan,
    descriptors_fit,
    device_facts,
    passes,
    plan_table,
    rank_bucket,
    read_table,
    resolve,
    seconds,
    with_stages,
)
from .timing import Clock, Stats, Step, clock_for, interleave, ratio

# ---- plans worth measuring

# Blocks for 16 bits; halved for 32 bits. (rows, columns, warps, stages) of a skinny pass,
SKINNY = (
    (16, 64, 4, 4),
    (16, 128, 4, 4),
    (16, 256, 4, 3),
    (32, 128, 4, 3),
    (32, 256, 4, 2),
    (64, 32, 8, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 4),
    (64, 128, 8, 3),
    (64, 256, 8, 3),
    (128, 64, 4, 3),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
)
# (m, n, k, warps, stages) of a product,
PRODUCTS = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 32, 8, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 128, 8, 2),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (16, 128, 128, 4, 4),
)
# (n, k, depth, warps, stages) of the passes over a generated matrix.
CONTRACTS = (
    (64, 64, 32, 4, 2),
    (64, 64, 64, 4, 3),
    (64, 64, 32, 8, 2),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
)
PER_PROCESSOR = (1, 2, 4, 8)  # programs of a skinny pass per multiprocessor
GROUPS = (4, 8, 16)  # rows of tiles that share columns in the L2 cache
PANELS = (16 << 20, 8 << 20, 4 << 20, 2 << 20)  # bytes of the workspace


def candidates(problem: Problem, facts: DeviceFacts) -> list[LaunchPlan]:
    """Plans to measure for a problem, without duplicates: the default, the library's, then those of the algorithms in
    turns, the most promising first according to the cost model, if it covers them. A pure function.

    May include plans that the GPU cannot run (shared memory, registers); they fail in the measurement.
    """
    found = [default_plan(problem, facts), LaunchPlan("library")]
    if problem.r <= MAX_TRITON_RANK:
        if problem.operation in GENERATED:
            listed = _generated(problem, facts)
        elif problem.operation == SQUARES:
            listed = _products(problem, found[0])
        else:
            listed = _low_rank(problem, facts)
        families: dict[str, list[LaunchPlan]] = {}
        for plan in listed:
            families.setdefault(plan.algorithm, []).append(plan)
        found += [plan for turn in itertools.zip_longest(*families.values()) for plan in turn if plan is not None]
    return list(dict.fromkeys(with_stages(plan, facts) for plan in found))


def _half(problem: Problem) -> int:
    return 2 if problem.itemsize >= 4 else 1


def _low_rank(problem: Problem, facts: DeviceFacts) -> list[LaunchPlan]:
    """All combinations of skinny blocks and numbers of programs, then products with the most promising skinny blocks:
    persistent ones by L2 groups and descriptors, and fused ones."""
    own, half = ALGORITHMS_OF[problem.operation], _half(problem)
    of_their_own = problem.operation in ("sliced_linear", "grouped_lowrank_linear")  # not in the cost model
    model = replace(problem, operation="lowrank_linear") if of_their_own else problem

    def expected(plan: LaunchPlan) -> float:
        return seconds(model, plan, facts)

    skinny = [
        LaunchPlan(own[0], SkinnyPlan(max(16, rows // half), max(16, columns // half), groups, warps, stages))
        for rows, columns, warps, stages in SKINNY
        for groups in (per * facts.processors for per in PER_PROCESSOR)
    ]
    if not of_their_own:
        # Keep one plan per distinct set of launches.
        same = {(replace(plan.skinny, groups=1), passes(model, plan)): plan for plan in reversed(skinny)}
        skinny = list(same.values())
    skinny.sort(key=expected)
    found = list(skinny)
    if "single" in own:
        found += sorted(_persistent(problem, facts, skinny[0]), key=expected)
    if "fused" in own:
        found += sorted(_products(problem, skinny[0]), key=expected)
    return found


def _persistent(problem: Problem, facts: DeviceFacts, like: LaunchPlan) -> list[LaunchPlan]:
    half = _half(problem)
    blocks = [(p.m, p.n, p.k, p.warps, p.stages) for p in SINGLE_DEFAULTS]
    return [
        replace(
            like,
            algorithm="single",
            product=ProductPlan(
                max(16, m // half), max(16, n // half), max(16, k // half), group, warps, stages,
                programs=max(1, facts.processors), descriptors=descriptors,
            ),
        )
        for m, n, k, warps, stages in dict.fromkeys((*blocks, *PRODUCTS))
        if (m >= FEW_ROWS and facts.flags if problem.m > FEW_ROWS else problem.m <= m <= FEW_ROWS)
        for group in (GROUPS if problem.m > m // half else (8,))  # no effect for a single row of tiles
        for descriptors in ((True, False) if descriptors_fit(problem, facts) else (False,))
    ]  # fmt: skip


def _products(problem: Problem, like: LaunchPlan) -> list[LaunchPlan]:
    """Block sizes of the fused product."""
    half = _half(problem)
    return [
        replace(
            like,
            algorithm="fused",
            product=ProductPlan(max(16, m // half), max(16, n // half), max(16, k // half), 8, warps, stages),
        )
        for m, n, k, warps, stages in PRODUCTS
    ]


def _generated(problem: Problem, facts: DeviceFacts) -> list[LaunchPlan]:
    """Block sizes of the passes over the generated matrix by panel sizes; for few rows also of the fused product."""
    half = _half(problem)
    contracts = [
        ContractPlan(n // half, k // half, max(16, depth // half), per * facts.processors, warps, stages)
        for n, k, depth, warps, stages in CONTRACTS
        for per in (2, 1)
    ]
    default = default_plan(problem, facts)
    if problem.operation == "generated_features":
        return [replace(default, algorithm="fused", contract=contract) for contract in contracts]
    whole = problem.n * problem.k * problem.itemsize
    panels = [size for size in PANELS if size == PANELS[-1] or size // 2 < whole]
    found = [
        replace(default, algorithm="panel", contract=replace(contract, panel=size // problem.itemsize))
        for contract in contracts
        for size in panels
    ]
    return found + (_products(problem, default) if problem.m <= FEW_ROWS else [])


# ---- measuring


@dataclass(frozen=True)
class Timed:
    """A plan's median time, and its ratio to the layer's own product (or the library's plan if there is none)."""

    plan: LaunchPlan
    ms: float
    ratio: float


@dataclass(frozen=True)
class Tuned:
    """Results for one problem.

    `best` is the fastest correct plan; `families` has the best time of each algorithm in milliseconds; `failed` the
    plans that did not run, and `red` those that were faster but wrong, with reasons.
    """

    problem: Problem
    best: Timed
    default: Timed
    library: Timed
    floor_ms: float
    measured: int
    families: dict[str, float]
    failed: dict[LaunchPlan, str]
    red: dict[LaunchPlan, str]

    def entry(self) -> dict[str, Any]:
        """The entry for a table."""
        return table_entry(self.problem, self.best.plan, self.best.ms, self.families)


def operation_of(problem: Problem) -> Operation:
    """The operation of a problem. (For slices, the row variant; columns have the same plans.)"""
    return next(op for op in OPERATIONS.values() if op.called == problem.operation)


def steps(
    problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[LaunchPlan], Step], Step | None]:
    """A function from a plan to a step, forward and backward (forward only for few rows, as in decoding), and the step
    of the layer's own product, None if the operation has none."""
    operation = operation_of(problem)
    sizes = (problem.m, problem.n, problem.k, problem.r)
    tensors, cotangent = draw(operation, sizes, dtype, device, bias=False)
    trained = [t for name, t in tensors.items() if name in operation.trained]
    options = operation.sweep(problem.r)
    forward_only = 0 < problem.m <= FEW_ROWS

    def make(plan: LaunchPlan) -> Step:
        def step(index: int) -> object:
            if forward_only:
                with torch.no_grad():
                    return operation.run(tensors, options, None, plan=plan)
            return torch.autograd.grad(operation.run(tensors, options, None, plan=plan), trained, cotangent)

        return step

    if not operation.form:
        return make, None
    x = tensors["x"]
    weight = tensors["weight"].detach().requires_grad_(operation.form == "generated")

    def floor(index: int) -> object:
        if forward_only:
            with torch.no_grad():
                return F.linear(x, weight)
        wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
        return torch.autograd.grad(F.linear(x, weight), wanted, cotangent)

    return make, floor


def measure(
    problem: Problem,
    dtype: torch.dtype,
    device: torch.device,
    plans: Sequence[LaunchPlan],
    *,
    failed: dict[LaunchPlan, str] | None = None,
    until: float = math.inf,
    rounds: int = 10,
    clock: Clock | None = None,
) -> Tuned:
    """Time the plans of a problem and find the fastest correct one.

    Args:
        dtype: dtype of activations and weight, with the problem's element size.
        plans: from `candidates`: the default first, and including the library's. These two are always measured.
        failed: plans known to fail, with the reason.
        until: no plans are compiled after this time (`time.monotonic`).
        rounds: minimum number of rounds of the final measurement, with the default, the library's and the six plans
            that were fastest in a short measurement.
        clock: None for the device's default clock.
    """
    make, floor = steps(problem, dtype, device)
    default, library = plans[0], next(plan for plan in plans if plan.algorithm in LIBRARY)
    failed, found = dict(failed or {}), dict[LaunchPlan, Step]()
    for plan in plans:
        if plan in failed or (time.monotonic() > until and plan not in (default, library)):
            continue
        try:
            step = make(plan)
            step(0)
            found[plan] = step
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise many types
            if plan == library:
                raise
            failed[plan] = f"{type(error).__name__}: {error}"[:200]
    clock = clock or clock_for(device)
    listed = {str(plan): plan for plan in found}
    short = interleave(
        {name: found[plan] for name, plan in listed.items()}, clock, seconds=0.3, min_rounds=3, max_rounds=6, warmup=0
    )
    first = {listed[name]: Stats.of(ms).median for name, ms in short.items()}
    finalists = sorted(first, key=lambda plan: first[plan])[:6]
    finalists += [plan for plan in (default, library) if plan in found and plan not in finalists]
    last = {str(plan): found[plan] for plan in finalists}
    if floor is not None:
        last["floor"] = floor
    samples = interleave(last, clock, seconds=0.5, min_rounds=rounds, max_rounds=max(rounds, 30))
    base = samples.pop("floor", None) or samples[str(library)]
    times = {
        plan: Timed(plan, Stats.of(samples[str(plan)]).median, ratio(samples[str(plan)], base).median)
        for plan in finalists
    }
    families: dict[str, float] = {}
    for plan, ms in first.items():
        ms = times[plan].ms if plan in times else ms
        families[plan.algorithm] = min(ms, families.get(plan.algorithm, math.inf))
    best, red = _fastest_right(problem, dtype, device, sorted(times, key=lambda plan: times[plan].ms), library)
    return Tuned(
        problem,
        times[best],
        times.get(default, times[best]),
        times[library],
        Stats.of(base).median,
        len(first),
        families,
        failed,
        red,
    )


def _fastest_right(
    problem: Problem, dtype: torch.dtype, device: torch.device, ranked: Sequence[LaunchPlan], library: LaunchPlan
) -> tuple[LaunchPlan, dict[LaunchPlan, str]]:
    """The first plan that passes the gate, else the library's; and the reasons why earlier ones failed."""
    operation = operation_of(problem)
    sizes = (problem.m, problem.n, problem.k, problem.r)
    options = {**operation.options[0], **operation.sweep(problem.r)}
    examination = Examination(operation, *draw(operation, sizes, dtype, device), options, dtype)
    red = {}
    for plan in ranked:
        try:
            with poisoned():
                got = examination.results(plan=plan)
            verdict = examination.verdict(got)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            red[plan] = f"{type(error).__name__}: {error}"[:200]
            continue
        if verdict.ok:
            return plan, red
        red[plan] = str(verdict)
    return library, red


def tune(
    problems: Sequence[Problem],
    dtype: torch.dtype,
    device: torch.device,
    *,
    budget: float,
    clock: Clock | None = None,
) -> Iterator[Tuned]:
    """Measure the problems in sequence, each with an equal share of the remaining seconds of `budget`, until the budget
    is spent; the first problem is always measured. Problems that run out of memory are skipped. Problems with another
    element size than `dtype` are measured in float32."""
    begun, facts = time.monotonic(), device_facts(device)
    for index, problem in enumerate(problems):
        now = time.monotonic()
        left = begun + budget - now
        if left <= 0 and index:
            return
        own = dtype if problem.itemsize == dtype.itemsize else torch.float32
        # Compilation takes most of the time. Kernels compiled for one problem are reused for similar ones.
        until = now + 0.7 * left / (len(problems) - index)
        try:
            yield measure(problem, own, device, candidates(problem, facts), until=until, clock=clock)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()


# ---- tables


def table_entry(problem: Problem, plan: LaunchPlan, ms: float, families: dict[str, float]) -> dict[str, Any]:
    """A table's entry for one problem: its plan, for up to `m_max` rows, and the measurement."""
    return {
        "operation": problem.operation,
        "m_max": problem.m,
        "n": problem.n,
        "k": problem.k,
        "r": problem.r,
        "itemsize": problem.itemsize,
        "plan": json.loads(str(plan)),
        "measured": {"m": problem.m, "ms": round(ms, 6), "families": {a: round(t, 6) for a, t in families.items()}},
    }


def merged(*tables: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the entries of several tables: later entries replace earlier ones for the same problem, and the entry of
    the largest batch measured for a shape is also used for larger ones."""
    latest = {
        (_shape(entry), entry.get("measured", {}).get("m", entry["m_max"])): entry
        for table in tables
        for entry in table
    }
    largest: dict[tuple[Any, ...], int] = {}
    for shape, m in latest:
        largest[shape] = max(m, largest.get(shape, 0))
    return [{**entry, "m_max": 2**31 if m == largest[shape] else m} for (shape, m), entry in latest.items()]


def _shape(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["operation"], entry["n"], entry["k"], rank_bucket(entry["r"]), entry["itemsize"]


def write_table(path: Path, entries: Iterable[dict[str, Any]], **about: str) -> None:
    """Add entries to the table at `path`, or create it. The file is replaced atomically, and plans of this process use
    it from now on.

    Args:
        about: other fields of the file: device, versions.

    Raises:
        ValueError: the existing file is not a valid table; the message names the path.
        OSError: the file cannot be written.
    """
    table = {**about, "entries": merged(read_table(path), entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(table, indent=1) + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    for cached in (plan_table, choose_plan, resolve):
        cached.cache_clear()
