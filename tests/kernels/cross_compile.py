"""Compiles what the launchers launch for GPUs that are not here, and reads the resources the compiler reports.

`python -m tests.kernels.cross_compile` prints the table for every default plan.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block may ask for on the card.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: bytes of shared memory, registers per thread, bytes spilled per thread."""

    kernel: str
    target: str
    shared: int
    registers: int
    spilled: int
    wgmma: bool


class _Driver:
    """Stands in for a GPU driver: names the target, launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(name: str) -> Iterator[list[Any]]:
    """Inside, a kernel launch compiles for the target instead of running; yields the list of compiled kernels."""
    compiled: list[Any] = []
    run, active = JITFunction.run, driver._active
    cached = {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        cached.setdefault(self, self.device_caches.copy())
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(TARGETS[name]))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = active
        for function, caches in cached.items():
            function.device_caches.clear()
            function.device_caches.update(caches)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(file.name)
    registers = re.search(r"REG:(\d+)", report)
    stack = re.search(r"STACK:(\d+)", report)
    assert registers is not None, report
    assert stack is not None, report
    return int(registers[1]), int(stack[1])


def resources(kernel: Any, target: str) -> Resources:
    """Reads the compiled kernel."""
    if TARGETS[target].backend == "cuda":
        registers, spilled = _cuda_usage(kernel.asm["cubin"])
        wgmma = "wgmma" in kernel.asm["ptx"]
    else:
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
        wgmma = False
    return Resources(kernel.metadata.name, target, kernel.metadata.shared, registers, spilled, wgmma)


def compile_all(target: str, call: Callable[[], object]) -> list[Resources]:
    """The resources of every kernel that `call` launches, compiled for `target`."""
    with compiling_for(target) as compiled:
        call()
    return [resources(kernel, target) for kernel in compiled]


def low_rank_calls(
    r: int, dtype: torch.dtype, plan: Any, *, dropout: bool = False
) -> Iterator[tuple[str, Callable[[], object]]]:
    """One call for each launcher of the low-rank family, on shapes aligned as a model's are."""
    from genft_kernels import _triton as launchers

    m, n, k = 256, 512, 256
    x, dy, weight = torch.empty(m, k, dtype=dtype), torch.empty(m, n, dtype=dtype), torch.empty(n, k, dtype=dtype)
    p, q, t = torch.empty(k, r), torch.empty(n, r), torch.empty(m, r, dtype=dtype)
    psi, phi, bias = torch.empty(r, k), torch.empty(r, k), torch.empty(n, dtype=dtype)
    p_drop, seed = (0.1, torch.zeros(1, dtype=torch.int64)) if dropout else (0.0, None)
    all4, all3 = (True,) * 4, (True,) * 3
    yield "lowrank_forward", lambda: launchers.lowrank_linear_forward(x, weight, p, q, bias, 1.5, p_drop, seed, plan)
    yield (
        "lowrank_backward",
        lambda: launchers.lowrank_linear_backward(dy, x, weight, p, q, t, 1.5, p_drop, seed, all4, plan),
    )
    yield "edit_forward", lambda: launchers.input_edit_forward(x, psi, phi, 1.5, plan)
    yield "edit_backward", lambda: launchers.input_edit_backward(x, x, psi, phi, t, 1.5, all3, plan)
    yield "features_forward", lambda: launchers.weight_features_forward(weight, psi, phi[:, 0], 1.5, p_drop, seed, plan)
    yield "features_backward", lambda: launchers.weight_features_backward(q, weight, 1.5, p_drop, seed, plan)


if __name__ == "__main__":
    from dataclasses import replace

    from genft_kernels import DeviceFacts, Problem, choose_plan

    print(f"{'call':18} {'r':>4} {'dtype':9} {'algorithm':9} {'target':7} {'shared':>7} {'regs':>5} {'spill':>6} wgmma")
    for r in (16, 64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            problem = Problem("lowrank_linear", 8192, 4096, 4096, r, dtype.itemsize)
            plan = choose_plan(problem, DeviceFacts("any", 132))
            for algorithm in ("thin", "fused"):
                for target in TARGETS:
                    for name, call in low_rank_calls(r, dtype, replace(plan, algorithm=algorithm)):
                        for found in compile_all(target, call):
                            print(
                                f"{name:18} {r:4} {str(dtype)[6:]:9} {algorithm:9} {target:7} {found.shared:7} "
                                f"{found.registers:5} {found.spilled:6} {'yes' if found.wgmma else ''}"
                            )
