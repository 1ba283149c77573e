"""Figures of memory and time."""

from __future__ import annotations

import pytest
import torch

from genft_cli.console import table
from genft_cli.measure import PeakMemory, ratio, step_seconds


def test_peak_memory_counts_what_was_held_in_between(device: torch.device) -> None:
    memory = PeakMemory(device)
    memory.start()
    before = memory.peak()
    block = torch.ones(64, 1 << 20, dtype=torch.uint8, device=device)
    del block
    assert 60 < memory.peak() - before < 90
    memory.start()
    assert memory.peak() < before + 30


class _Model(torch.nn.Module):
    def __init__(self, work: int) -> None:
        super().__init__()
        self.work, self.linear, self.steps = work, torch.nn.Linear(64, 64), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        for _ in range(self.work):
            x = self.linear(x)
        self.loss = x.square().mean()
        return self  # type: ignore[return-value] # like a transformers output, it has .loss


def test_models_take_turns() -> None:
    models = {"one": _Model(1), "many": _Model(60)}
    times = step_seconds(models, {"x": torch.randn(64, 64)}, warmup=2, rounds=5)
    assert [len(times[name]) for name in models] == [5, 5]
    assert [model.steps for model in models.values()] == [7, 7]
    assert ratio(times, "many", "one") > 1
    assert ratio(times, "one", "one") == 1


@pytest.mark.parametrize("rows", [[("a", "1.00"), ("long name", "10.00")], []])
def test_table_is_aligned(rows: list[tuple[str, str]]) -> None:
    lines = table(("method", "x"), rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(rows)
    assert lines[1].endswith("-:|")
