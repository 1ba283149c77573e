"""Interleaved measurements shown by pytest-benchmark.

pytest-benchmark times one test after the other, so that what it compares was measured at different moments. Here the
first test of a comparison measures all selected contenders interleaved, and every test plays its own samples back: its
timer is a clock that moves by one sample per round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.measure.results import Record

_now = [0.0]


def clock() -> float:
    """The timer of every benchmark test: pytest.mark.benchmark(timer=clock)."""
    return _now[0]


Measure = Callable[[Sequence[str], dict[str, list[float]]], list[Record]]


class Board:
    """Comparisons measured in this session, by group, and the contenders that were selected for each."""

    def __init__(self) -> None:
        self.selected: dict[str, list[str]] = {}
        self.measured: dict[str, tuple[dict[str, Record], dict[str, list[float]]]] = {}
        self.records: list[Record] = []

    def select(self, group: str, contender: str) -> None:
        self.selected.setdefault(group, []).append(contender)

    def play(self, benchmark: Any, group: str, contender: str, measure: Measure) -> None:
        """Measures the group if need be, and replays the contender's samples. Skips what cannot run here, fails what
        is not right."""
        if group not in self.measured:
            samples: dict[str, list[float]] = {}
            records = measure(self.selected.get(group, [contender]), samples)
            self.measured[group] = ({record["contender"]: record for record in records}, samples)
            self.records += records
        records, samples = self.measured[group]
        record = records[contender]
        if "withheld" in record:
            (pytest.fail if record.get("gate", {}).get("ok") is False else pytest.skip)(record["withheld"])
        benchmark.group = group
        benchmark.extra_info.update({k: v for k, v in record.items() if k not in ("ms", "plan")})
        left = iter(samples[contender])

        def advance() -> None:
            _now[0] += next(left) / 1e3

        benchmark.pedantic(advance, rounds=len(samples[contender]), iterations=1)
