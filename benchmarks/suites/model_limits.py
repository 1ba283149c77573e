"""What fits: the longest sequence and the largest batch of a training step."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import memory
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES
from benchmarks.subjects.models import Size, Trainee, build_base, variants


def largest(fits: Callable[[int], bool], start: int, most: int, grain: int) -> int:
    """The largest multiple of `grain` up to `most` that fits, 0 if none does: doubled from `start` until it does not,
    then halved in between. A multiple fits if a larger one does."""
    good, bad = 0, most + grain
    size = max(grain, min(start, most) // grain * grain)
    while good < size < bad:
        if fits(size):
            good = size
            size = min(2 * size, most // grain * grain)
        else:
            bad = size
    while bad - good > grain:
        size = (good + bad) // 2 // grain * grain
        if size in (good, bad):
            break
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def what_fits(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    what: str,
    *,
    mode: str = "step",
    most: int,
    grain: int,
    budget: int | None = None,
    run: Run | None = None,
) -> list[Record]:
    """The longest sequence of one sample ("sequence") or the largest batch of the size's sequence ("batch") with which
    a variant's training step runs.

    On a GPU a step fits if it does not run out of memory. On a CPU, which has no such edge, it fits if it allocates no
    more than `budget` bytes beside the weights. `run`: as in `comparison.compare`.
    """
    base = build_base(size, dtype, device)
    every = variants(size)
    records: list[Record] = []
    for name in names if run is None else run.paced(names):
        variant = every[name]

        def fits(value: int, variant: Any = variant) -> bool:
            batch, sequence = (1, value) if what == "sequence" else (value, size.sequence)
            return _runs(variant, base, batch, sequence, size.vocab, mode, device, budget)

        record: Record = {
            "suite": "fits",
            "mode": f"{mode}, largest {what}",
            "contender": name,
            "kind": variant.kind,
            "method": variant.method,
            "model": dataclasses.asdict(size),
            "r": variant.r,
            "dtype": DTYPE_NAMES[dtype],
        }
        try:
            record["largest"] = largest(fits, size.sequence if what == "sequence" else 1, most, grain)
        except Exception as error:
            record["withheld"] = f"{type(error).__name__}: {error}"[:300]
        records.append(record)
        if run is not None:
            run.put(records)
    return records


def _runs(
    variant: Any, base: Any, batch: int, sequence: int, vocab: int, mode: str, device: torch.device, budget: int | None
) -> bool:
    def attempt() -> bool:
        ids = torch.randint(vocab, (batch, sequence), device=device)
        trainee = Trainee(variant, base, [base.get_input_embeddings()(ids)], [ids], mode)
        trainee.step(0)  # with the optimiser's state
        used = memory.peak_bytes(lambda: trainee.step(0), device)
        return budget is None or used <= budget

    try:
        return attempt()
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
