"""One transformer block of a Llama: forward, backward and optimiser step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure.replay import clock
from benchmarks.subjects import models
from benchmarks.suites import model_step
from benchmarks.suites.comparison import Settings

GPU = torch.cuda.is_available()
SIZE = models.LLAMA3_BLOCK if GPU else models.CPU_BLOCK
GROUP = f"block {SIZE.name} {SIZE.batch}x{SIZE.sequence}"


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("group", [GROUP])
@pytest.mark.parametrize("contender", models.variants(SIZE))
def test_block(group, contender, device, session_run, board, benchmark):
    def measure(chosen, samples):
        dtype = torch.bfloat16 if GPU else torch.float32
        settings = Settings(seconds=5.0 if GPU else 15.0, max_rounds=20)
        return model_step.compare_models(SIZE, dtype, device, chosen, "step", "block", settings, samples)

    board.play(benchmark, group, contender, measure)
