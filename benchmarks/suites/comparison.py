"""One comparison: contenders on one case, set up once for gate, time and memory, measured in one interleaved run."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES, Case
from benchmarks.measure.timing import cache_bytes
from benchmarks.subjects.contenders import CONTENDERS, Contender
from benchmarks.subjects.layers import Inputs, Subject
from genft_kernels.timing import Clock, Stats, Step, WallClock, clock_for, interleave, ratio

MODES = {
    "forward": "forward pass in training",
    "step": "forward and backward",
    "decode": "forward pass in eval mode without gradient, captured on a GPU",
    "call": "host time of one call, device not waited for",
    "call-eval": "the same in eval mode without gradient",
}


@dataclass
class Settings:
    """How long a comparison may take, and what is measured beside time."""

    seconds: float = 2.0
    min_rounds: int = 5
    max_rounds: int = 40
    warmup: int = 2
    gate: bool = True
    memory: bool = True
    calls: int = 50  # that are timed as one where a single call is too short


def compare(
    case: Case,
    names: Sequence[str],
    mode: str = "step",
    suite: str = "layer",
    settings: Settings | None = None,
    ceilings: dict[str, Any] | None = None,
    samples: dict[str, list[float]] | None = None,
    run: Run | None = None,
) -> list[Record]:
    """Measures the contenders against each other; the frozen layer is always among them.

    A contender that cannot be built or is not right has a record without a time, and the reason in "withheld". All are
    set up one after the other, then timed in turns, then their memory is measured.

    Args:
        case, names, mode: what is measured; `mode` is a key of `MODES`.
        suite: label in the records.
        ceilings: of `timing.ceilings`, for the percentage of the product's ceiling.
        samples: filled with the milliseconds of each round, if given.
        run: whose file gets what is measured when it is measured, and whose time is kept to.
    """
    settings = settings or Settings()
    gpu = case.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    replicas = 1
    if mode == "decode":
        # Weights are what decoding reads: enough layers that they do not stay in the cache.
        weight_bytes = case.shape.weight_elements * case.itemsize
        replicas = max(2, min(32, math.ceil(2 * cache_bytes(case.device) / weight_bytes)))
    inputs = Inputs(case, replicas=replicas)
    if any(CONTENDERS[name].compiled for name in names):
        torch._dynamo.reset()  # an earlier comparison's graphs count towards dynamo's limit
    records: dict[str, Record] = {}
    subjects: dict[str, Subject] = {}
    steps: dict[str, Step] = {}

    def keep() -> None:
        if run is not None:
            run.put(records.values())

    def fill(measured: dict[str, list[float]]) -> None:
        floor = [value / replicas for value in measured.get("frozen", ())]
        for name, ms in measured.items():
            ms = [value / replicas for value in ms]
            if samples is not None:
                samples[name] = ms
            _fill(records[name], case, mode, ms, floor, ceilings)
        keep()

    chosen: Iterable[str] = dict.fromkeys(["frozen", *names])
    for name in chosen if run is None else run.paced(chosen, settings.seconds):
        records[name] = describe(suite, mode, case, CONTENDERS[name])
        ready = _set_up(records[name], CONTENDERS[name], inputs, mode, settings)
        if isinstance(ready, str):
            records[name]["withheld"] = ready
        else:
            subjects[name], steps[name] = ready
        keep()
    clock: Clock = WallClock(case.device, calls=settings.calls) if "call" in mode else clock_for(case.device)
    interleave(
        steps,
        clock,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
        warmup=settings.warmup,
        each=fill,
    )
    if settings.memory and mode == "step":
        for name, subject in subjects.items():
            records[name]["memory"] = subject.memory()
            keep()
    return list(records.values())


def _set_up(
    record: Record, contender: Contender, inputs: Inputs, mode: str, settings: Settings
) -> tuple[Subject, Step] | str:
    """A contender behind its gate, and its step, run once; or why it has no time."""
    missing = contender.missing(inputs.case.device)
    if missing:
        return missing
    try:
        subject = Subject(contender, inputs, mode)
        if settings.gate:
            verdict = subject.check()
            record["gate"] = verdict.json()
            if not verdict.ok:
                return f"gate: {verdict}"
        step = subject.timed()
        step(0)
    except Exception as error:  # one contender's failure is a result, not the end of the run
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return subject, step


def describe(suite: str, mode: str, case: Case, contender: Contender) -> Record:
    """A record that says what is measured, and nothing of it yet."""
    record: Record = {
        "suite": suite,
        "mode": mode,
        "contender": contender.name,
        "kind": contender.kind,
        "method": contender.method,
        "form": contender.form,
        "compiled": contender.compiled,
        "m": case.shape.m,
        "n": list(case.shape.n),
        "k": case.shape.k,
        "r": case.r,
        "dtype": DTYPE_NAMES[case.dtype],
    }
    plan = None if contender.missing(case.device) else contender.plan(case)
    if plan is not None:
        record["operation"] = contender.operation
        record["algorithm"] = plan.algorithm
        record["plan"] = str(plan)
    return record


def _fill(
    record: Record, case: Case, mode: str, ms: list[float], floor: list[float], ceilings: dict[str, Any] | None
) -> None:
    stats = Stats.of(ms)
    record["ms"] = stats.json()
    if floor:
        record["ratio"] = ratio(ms, floor).json()
    record["floor_operations"] = case.shape.operations(record["form"], mode)
    record["floor_bytes"] = case.shape.bytes(record["form"], mode, case.itemsize)
    record["tflops"] = round(record["floor_operations"] / stats.median / 1e9, 4)
    product = (ceilings or {}).get("product_tflops", {}).get(str(case.dtype).removeprefix("torch."))
    if product and "call" not in mode:
        record["percent_of_product"] = round(100 * record["tflops"] / product, 2)
