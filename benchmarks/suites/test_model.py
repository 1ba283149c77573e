"""A whole model's training step; on a GPU the shape of Llama-3-8B, with and without gradient checkpointing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure.replay import clock
from benchmarks.subjects import models
from benchmarks.suites import model_step
from benchmarks.suites.comparison import Settings

GPU = torch.cuda.is_available()
SIZE = models.LLAMA3_8B if GPU else models.CPU_MODEL
GROUPS = {f"model {SIZE.name} {SIZE.batch}x{SIZE.sequence} {mode}": mode for mode in ("step", "step-checkpoint")}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("contender", models.variants(SIZE))
def test_model(group, contender, device, session_run, board, benchmark):
    def measure(chosen, samples):
        dtype = torch.bfloat16 if GPU else torch.float32
        settings = Settings(seconds=10.0 if GPU else 15.0, max_rounds=15)
        return model_step.compare_models(SIZE, dtype, device, chosen, GROUPS[group], "model", settings, samples)

    board.play(benchmark, group, contender, measure)
