"""What the result files know of each device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import results
from benchmarks.measure.results import Record, key
from benchmarks.measure.shapes import CPU_GOAL


def grouped(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


class Device:
    """What is known of one device: its runs, oldest first, and each comparison as its newest run measured it."""

    def __init__(self, slug: str, runs: list[dict[str, Any]]) -> None:
        self.slug, self.runs = slug, runs
        self.records = results.newest(runs)
        last = runs[-1]["run"]
        self.type, self.name = last["device"]["type"], last["device"]["name"]

    def last(self, field: str) -> Any:
        return next((run[field] for run in reversed(self.runs) if run.get(field)), None)

    def typical(self) -> list[Record]:
        """The comparison that stands for the device in short tables: most contenders, then goal P8's or the largest
        square layer."""
        groups = grouped(r for r in self.records if r["suite"] == "layer" and r["mode"] == "step" and "ms" in r)
        if not groups:
            return []

        def rank(records: list[Record]) -> tuple[Any, ...]:
            first = records[0]
            goal = (first["m"], first["n"], first["k"]) in (
                (CPU_GOAL.m, list(CPU_GOAL.n), CPU_GOAL.k),
                (8192, [4096], 4096),
            )
            return goal, len(records), first["m"] * first["k"] * sum(first["n"])

        return max(groups.values(), key=rank)


def read_devices(folder: Path) -> dict[str, Device]:
    """What the result files under a folder know of each device, by its slug, GPUs first."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for slug, data in results.load_folder(folder):
        if not data["run"]["tiny"]:
            runs.setdefault(slug, []).append(data)
    return {slug: Device(slug, own) for slug, own in sorted(runs.items(), key=lambda item: _gpu_first(item[1]))}


def _gpu_first(runs: list[dict[str, Any]]) -> tuple[bool, str]:
    device = runs[-1]["run"]["device"]
    return device["type"] != "gpu", device["name"]
