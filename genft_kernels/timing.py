"""Comparable timing: interleaved steps in one run, reported as medians with quartiles.

A step is a function of the round's index, so that it can use another input each time. `interleave` runs all steps once
per round in random order; a clock measures each. Ratios are taken within a round, before the median, so that drift of
the machine cancels.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

Step = Callable[[int], object]


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of `rounds` samples."""

    median: float
    q1: float
    q3: float
    rounds: int

    @staticmethod
    def of(samples: Sequence[float]) -> Stats:
        if len(samples) < 2:
            return Stats(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Stats(median, q1, q3, len(samples))

    def json(self) -> dict[str, float]:
        return {name: round(value, 6) if name != "rounds" else value for name, value in asdict(self).items()}


class Clock(Protocol):
    def run(self, steps: Sequence[Step], index: int) -> list[float]:
        """Run the steps in this order with this index. Returns the milliseconds of each."""


class WallClock:
    """Host time of a step. With `device`, the device is synchronised before each step but not after it: the launch
    overhead in Python. `calls` steps are timed together."""

    def __init__(
        self, device: torch.device | None = None, calls: int = 1, now: Callable[[], float] = time.perf_counter
    ):
        self.device, self.calls, self.now = device, calls, now

    def run(self, steps: Sequence[Step], index: int) -> list[float]:
        times = []
        for step in steps:
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            start = self.now()
            for call in range(self.calls):
                step(index + call)
            times.append((self.now() - start) * 1e3 / self.calls)
        return times


class EventClock:
    """Device time of a step on a GPU, between two events.

    Each step is queued behind a spin kernel slightly longer than its launch overhead, so that the device does not wait
    for the host during small steps.
    """

    CYCLES_PER_SECOND = 2.0e9

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.issue: dict[int, float] = {}

    def run(self, steps: Sequence[Step], index: int) -> list[float]:
        marks = []
        torch.cuda.synchronize(self.device)
        for step in steps:
            spin = self.issue.get(id(step))
            if spin is not None:
                torch.cuda._sleep(int(min(1.3 * spin + 2e-5, 0.02) * self.CYCLES_PER_SECOND))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start = time.perf_counter()
            begin.record()
            step(index)
            end.record()
            issued = time.perf_counter() - start
            # The first run includes compilation; then use the longest recent time.
            self.issue[id(step)] = issued if spin is None or issued < spin / 10 else max(issued, 0.9 * spin)
            marks.append((begin, end))
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in marks]


def clock_for(device: torch.device) -> Clock:
    return EventClock(device) if device.type == "cuda" else WallClock()


def interleave(
    steps: Mapping[str, Step],
    clock: Clock,
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
    warmup: int = 2,
    seed: int = 0,
    now: Callable[[], float] = time.perf_counter,
    each: Callable[[dict[str, list[float]]], None] | None = None,
    pause: float = 2.0,
) -> dict[str, list[float]]:
    """Milliseconds of every step in every round. Runs for about `seconds`, between `min_rounds` and `max_rounds`.

    `each` is called with the complete rounds, about every `pause` seconds and at the end, even after an exception.
    """
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    for index in range(warmup):
        clock.run([steps[name] for name in order], index)

    def complete() -> dict[str, list[float]]:
        rounds = min(map(len, samples.values()), default=0)
        return {name: ms[:rounds] for name, ms in samples.items() if rounds}

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = told = now()
        for index in range(max_rounds):
            if index >= min_rounds and now() - start >= seconds:
                break
            shuffle(order)
            for name, ms in zip(order, clock.run([steps[name] for name in order], warmup + index), strict=True):
                samples[name].append(ms)
            if each is not None and now() - told >= pause:
                each(complete())
                told = now()
    finally:
        if collecting:
            gc.enable()
        if each is not None:
            each(complete())
    return samples


def ratio(samples: Sequence[float], floor: Sequence[float]) -> Stats:
    """The ratio of samples to the floor's samples of the same rounds."""
    return Stats.of([a / b for a, b in zip(samples, floor, strict=True)])
