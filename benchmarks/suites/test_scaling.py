"""Time as M, N = K and r grow; `python -m benchmarks.cpu` and `.gpu` have more points, layers and the curves."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure.replay import clock
from benchmarks.measure.shapes import Case, Shape
from benchmarks.subjects.contenders import methods
from benchmarks.suites.comparison import Settings, compare

GPU = torch.cuda.is_available()
BASE, WIDE = (Shape(8192, (4096,), 4096), 8192) if GPU else (Shape(1024, (512,), 512), 1024)
POINTS = {
    f"scaling {shape} r{r}": (shape, r)
    for shape, r in (
        (BASE, 16),
        (Shape(BASE.m // 4, BASE.n, BASE.k), 16),
        (Shape(4 * BASE.m, BASE.n, BASE.k), 16),
        (Shape(BASE.m, (WIDE,), WIDE), 16),
        (BASE, 64),
    )
}
CONTENDERS = ["frozen", "trainable", "peft-lora", *(f"genft-{m.name}" for m in methods())]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("group", POINTS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_scaling(group, contender, device, session_run, board, benchmark):
    shape, r = POINTS[group]

    def measure(chosen, samples):
        case = Case(shape, r, torch.bfloat16 if GPU else torch.float32, device)
        settings = Settings(seconds=2.0, max_rounds=20)
        return compare(case, chosen, "step", "scaling", settings, session_run.data["ceilings"], samples)

    board.play(benchmark, group, contender, measure)
