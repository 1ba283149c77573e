"""One layer: forward, forward and backward, decode; every contender side by side."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import shapes
from benchmarks.measure.replay import clock
from benchmarks.measure.shapes import DTYPES, Case, Shape
from benchmarks.subjects.contenders import CONTENDERS, methods, names
from benchmarks.suites.comparison import Settings, compare

GPU = torch.cuda.is_available()
DTYPE = "bf16" if GPU else "fp32"
EVERYONE = names(compiled=False)
SHORT = ["frozen", "trainable", "peft-lora", *(f"genft-{m.name}" for m in methods())]

# (mode, shape, rank, dtype, contenders)
if GPU:
    CASES = [("step", s, r, DTYPE, EVERYONE) for s in shapes.GPU_SHAPES for r in (16, 64)]
    CASES += [("step", shapes.LLAMA[0], 16, dtype, SHORT) for dtype in ("fp16", "fp32")]
    CASES += [("step", s, 16, DTYPE, SHORT) for s in (shapes.QKV, shapes.GATE_UP)]
    CASES += [("forward", s, 16, DTYPE, EVERYONE) for s in shapes.LLAMA[:4]]
    CASES += [("decode", s, 16, DTYPE, SHORT) for s in shapes.DECODE]
    CASES += [("call", Shape(1, (4096,), 4096), 16, DTYPE, SHORT)]
    COMPILED = shapes.LLAMA[:4]
else:
    CASES = [("step", s, 16, DTYPE, EVERYONE) for s in shapes.CPU_SHAPES]
    CASES += [("step", shapes.CPU_GOAL, 64, DTYPE, SHORT), ("forward", shapes.CPU_GOAL, 16, DTYPE, SHORT)]
    CASES += [("decode", s, 16, DTYPE, SHORT) for s in shapes.CPU_DECODE]
    CASES += [("call", Shape(1, (64,), 64), 16, DTYPE, SHORT)]
    COMPILED = (shapes.CPU_GOAL,)
CASES = [
    (mode, s, r, d, [*who, *names("peer", compiled=True)] if s in COMPILED and who is EVERYONE and r == 16 else who)
    for mode, s, r, d, who in CASES
]
GROUPS = {f"layer {mode} {s} r{r} {d}": (mode, s, r, d) for mode, s, r, d, _ in CASES}
PARAMETERS = [
    (group, contender) for group, case in zip(GROUPS, CASES, strict=True) for contender in dict.fromkeys(case[-1])
]


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("group", "contender"), PARAMETERS)
def test_layer(group, contender, device, session_run, board, benchmark):
    mode, shape, r, dtype = GROUPS[group]
    missing = CONTENDERS[contender].missing(device)
    if missing:
        pytest.skip(missing)

    def measure(chosen, samples):
        runnable = [name for name in chosen if not CONTENDERS[name].missing(device)]
        settings = Settings(seconds=3.0 if device.type == "cuda" else 8.0)
        case = Case(shape, r, DTYPES[dtype], device)
        return compare(case, runnable, mode, settings=settings, ceilings=session_run.data["ceilings"], samples=samples)

    board.play(benchmark, group, contender, measure)
