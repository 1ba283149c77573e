"""Methods at one parameter budget: what the result files of `benchmarks.adaptation` say."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genft_cli.demo.run import NAMES

SCHEMA = 1
REFERENCE = "peft-lora"  # what the others' time is relative to
TUNING_SEED = 1000  # not one of the seeds that are compared


@dataclass(frozen=True)
class Row:
    """A method's line of the table. `bits`: held-out bits per byte of each seed; `relative`: time of a step over peft
    LoRA's, median and quartiles; `memory` and `idle` in MiB, medians over the seeds."""

    method: str
    name: str
    knob: str
    trainable: int
    lr: float
    bits: list[float]
    relative: tuple[float, float, float]
    seconds: float
    memory: float
    idle: float


def rows(data: dict[str, Any]) -> list[Row]:
    """The table, the best first."""
    about, times = data["about"], data["steps"]["seconds"]
    found = []
    for method in about["methods"]:
        lr, (knob, value) = about["learning_rates"][method], about["values"][method]
        own = [data["runs"][f"{method} lr={lr:g} seed={seed}"] for seed in about["seeds"]]
        ratios = sorted(a / b for a, b in zip(times[method], times[REFERENCE], strict=True))
        found.append(
            Row(
                method,
                NAMES[method],
                f"{knob} = {value}" if knob else "",
                own[0]["trainable_parameters"],
                lr,
                [run["bits_per_byte_after"] for run in own],
                _quartiles(ratios),
                statistics.median(times[method]),
                statistics.median(run["peak_memory_mib"] for run in own),
                statistics.median(run["idle_memory_mib"] for run in own),
            )
        )
    return sorted(found, key=lambda row: statistics.mean(row.bits))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def before(data: dict[str, Any]) -> float:
    """Held-out bits per byte of the base."""
    return float(next(iter(data["runs"].values()))["bits_per_byte_before"])


def tuned(data: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Method → (learning rate, bits per byte) of the runs that the learning rates were chosen by."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in data["runs"].values():
        settings = run["settings"]
        if settings["seed"] == TUNING_SEED:
            found.setdefault(settings["method"], []).append((settings["lr"], run["bits_per_byte_after"]))
    return {method: sorted(points) for method, points in found.items()}


def load_folder(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(device slug, data) of the full size of every device."""
    for path in sorted(folder.glob("*/adaptation/full.json")):
        data = json.loads(path.read_text())
        if data["about"] and data["schema"] == SCHEMA:
            yield path.parent.parent.name, data
