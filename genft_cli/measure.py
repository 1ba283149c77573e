"""Peak memory and step time, measured so that methods are comparable."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from genft_modules.progress import bar

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 1 << 20


class PeakMemory:
    """Peak memory between `start()` and `peak()`, in MiB.

    On a GPU: peak memory allocated by torch. On the CPU: peak resident memory of the process (VmHWM of
    /proc/self/status, reset by `start()` if the kernel allows it; without /proc, `ru_maxrss`, which a child process
    inherits from its parent). Compare runs in separate processes, because freed memory is not always returned to the
    system.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            # Some containers forbid it; the peak then counts from the start of the process.
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")

    def peak(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device)) / MIB
        return _resident("VmHWM")

    def now(self) -> float:
        """Current memory in MiB."""
        if self.device.type == "cuda":
            return float(torch.cuda.memory_allocated(self.device)) / MIB
        return _resident("VmRSS")


def _resident(field: str) -> float:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(
    models: Mapping[str, torch.nn.Module],
    batch: Mapping[str, torch.Tensor],
    *,
    warmup: int = 3,
    rounds: int = 15,
    title: str = "timing",
) -> dict[str, list[float]]:
    """Seconds per training step (forward, backward, AdamW) of each model on the same batch, over `rounds` rounds.

    The models take turns, one step each, in rotating order, so that slow phases of the machine affect all of them
    equally. Compare models with `ratio`.
    """
    optimizers = {
        name: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6, fused=True)
        for name, model in models.items()
    }
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with bar((warmup + rounds) * len(names), title) as progress:
        for turn in range(warmup + rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                model, optimizer = models[name].train(), optimizers[name]
                device = next(model.parameters()).device
                synchronize(device)
                began = time.perf_counter()
                loss: Any = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                synchronize(device)
                if turn >= warmup:
                    times[name].append(time.perf_counter() - began)
                progress.update()
    return times


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over the rounds of `name`'s time divided by `to`'s time in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))
