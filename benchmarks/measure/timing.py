"""What only the benchmarks time with: captured steps, the size of the cache, the two ceilings of a run.

Clocks and rounds are those of `genft_kernels.timing`, which `genft tune` has too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genft_kernels.timing import Stats, Step, clock_for, interleave


def captured(step: Step, device: torch.device) -> Step:
    """`step(0)` as a CUDA graph; on a CPU, `step` itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step(0)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    return lambda index: graph.replay()


def cache_bytes(device: torch.device) -> int:
    """The cache that inputs must be rotated past: a GPU's L2, an allowance for a CPU's last level."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


def ceilings(device: torch.device, dtypes: Sequence[torch.dtype], *, tiny: bool = False) -> dict[str, Any]:
    """What this device reaches now: a large copy, GB/s read plus written; a large product, TFLOP/s for each dtype."""
    gpu = device.type == "cuda"
    side = 64 if tiny else (8192 if gpu else 1536)
    copied = 1 << (16 if tiny else 30 if gpu else 27)
    source = torch.randint(0, 127, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps: dict[str, Step] = {"copy": lambda i: target.copy_(source)}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        steps[str(dtype).removeprefix("torch.")] = lambda i, a=a, b=b, out=out: torch.mm(a, b, out=out)
    samples = interleave(steps, clock_for(device), seconds=1.0, max_rounds=20)
    copy = Stats.of(samples.pop("copy"))
    return {
        "copy_gb_per_s": round(2 * copied / copy.median / 1e6, 2),
        "copy_bytes": copied,
        "product_side": side,
        "product_tflops": {name: round(2 * side**3 / Stats.of(ms).median / 1e9, 4) for name, ms in samples.items()},
    }
