"""Compiles what the launchers launch for GPUs that are not here, and reads the resources the compiler reports.

`python -m tests.kernels.cross_compile [TARGET ...]` prints a line for every kernel of every default plan.
`python -m tests.kernels.cross_compile --table docs/compiled.md` writes what one target's kernels are made of.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from genft_kernels import LaunchPlan, RowGroups
from genft_kernels import plan as plans

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


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    report = _cuobjdump(cubin, "--dump-resource-usage")
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


Calls = Iterator[tuple[str, Callable[[], object]]]
M, N, K = 256, 512, 256  # aligned, as a model's shapes are
GROUPS = 4  # updates in one batch


def low_rank_calls(r: int, dtype: torch.dtype, plan: LaunchPlan, *, dropout: float = 0.0) -> Calls:
    """One call for each launcher of the low-rank family."""
    from genft_kernels import _triton as run

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    p, q, t = torch.empty(K, r), torch.empty(N, r), torch.empty(M, r, dtype=dtype)
    psi, phi, bias = torch.empty(r, K), torch.empty(r, K), torch.empty(N, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    drop = (dropout, seed)
    yield "lowrank_forward", lambda: run.lowrank_linear_forward(x, weight, p, q, bias, 1.5, *drop, plan)
    yield "lowrank_backward", lambda: run.lowrank_linear_backward(dy, x, weight, p, q, t, 1.5, *drop, (True,) * 4, plan)
    if plan.algorithm == "thin":
        yield "edit_forward", lambda: run.input_edit_forward(x, psi, phi, 1.5, plan)
        yield "edit_backward", lambda: run.input_edit_backward(x, x, psi, phi, t, 1.5, (True,) * 3, plan)
        yield "features_forward", lambda: run.weight_features_forward(weight, psi, phi[:, 0], 1.5, *drop, plan)
        yield "features_backward", lambda: run.weight_features_backward(q, weight, 1.5, *drop, plan)


def grouped_calls(r: int, dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """The backward of the grouped operation, which launches what the forward does and more."""
    from genft_kernels import _triton as run

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    p, q, t = torch.empty(GROUPS, K, r), torch.empty(GROUPS, N, r), torch.empty(M, r, dtype=dtype)
    index, bounds = torch.zeros(M // 16, dtype=torch.int32), torch.zeros(GROUPS + 1, dtype=torch.int32)
    rows = RowGroups(index, index, bounds)
    needs = (True, True, False, False)  # dQ is made as dP is
    yield "grouped", lambda: run.grouped_lowrank_linear_backward(dy, x, weight, p, q, t, rows, needs, plan)


def generated_calls(
    r: int, dtype: torch.dtype, plan: LaunchPlan, *, activation: str = "gelu", dropout: float = 0.0
) -> Calls:
    """One call for each launcher on a generated matrix, with a bias along either side."""
    from genft_kernels import _triton as run
    from genft_kernels.reference import Generated

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    bias, a, dz = torch.empty(N, dtype=dtype), torch.empty(r, N), torch.empty(K, r)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    made = Generated(torch.empty(N, r), torch.empty(K, r), torch.empty(N), torch.empty(K), activation, dropout, seed)
    yield "forward", lambda: run.generated_linear_forward(x, weight, made, bias, 1.5, plan)
    yield "backward", lambda: run.generated_linear_backward(dy, x, weight, made, 1.5, (True,) * 6, plan)
    if plan.algorithm == "fused":
        low = Generated(made.h.to(dtype), made.b.to(dtype), None, None, activation, dropout, seed)
        yield "features_forward", lambda: run.generated_features_forward(low, a.to(dtype), None, plan)
        yield (
            "features_backward",
            lambda: run.generated_features_backward(dz.to(dtype), low, a.to(dtype), (True,) * 4, plan),
        )


def sliced_calls(k: int, dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """One call for each launcher on k rows or columns of a weight."""
    from genft_kernels import _triton as run

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    indices = torch.arange(k)
    for name, values, columns in (("rows", torch.empty(k, K), False), ("columns", torch.empty(N, k), True)):
        rest = (values, indices)
        yield f"{name}_forward", lambda c=columns, v=rest: run.sliced_linear_forward(x, weight, *v, None, c, 1.5, plan)
        yield (
            f"{name}_backward",
            lambda c=columns, v=rest: run.sliced_linear_backward(dy, x, weight, *v, c, 1.5, (True,) * 3, plan),
        )


def sliced_product_calls(k: int, dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """What slices ask of the fused product: a picked left factor, a right one of unit vectors, sums of squares."""
    from genft_kernels import _triton as run
    from genft_kernels._triton.product import launch_product

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    t, values, pick = torch.empty(M, k, dtype=dtype), torch.empty(N, k), torch.arange(k)
    yield "unit", lambda: launch_product(x, weight.t(), t, None, plan.product, pick=pick)
    yield "picked", lambda: launch_product(x, weight.t(), x, values.t(), plan.product, pick=pick, scale=1.5)
    yield "squared_gradient_sums", lambda: run.squared_gradient_sums(dy, x, plan)


def _padded_ranks(entries: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], int, float]]:
    """Each entry with every padded rank that it serves, without dropout; and the widest with dropout."""
    served = 0
    for entry in entries:
        for r in (16, 32, 64, 128):
            if served < r <= entry[0]:
                yield entry, r, 0.0
        yield entry, entry[0], 0.1
        served = entry[0]


def default_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every entry of the default plans, at every rank that it is compiled for."""
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    for itemsize, low_rank in plans.LOW_RANK_DEFAULTS.items():
        dtype = dtypes[itemsize]
        for (widest, many, few), r, dropout in _padded_ranks(low_rank):
            for blocks in dict.fromkeys((many, few)):
                plan = LaunchPlan("thin", blocks, plans.PRODUCT_DEFAULTS[itemsize])
                for name, call in low_rank_calls(r, dtype, plan, dropout=dropout):
                    yield f"{name} r={r} {dtype} {blocks} dropout={dropout}", call
                if r == widest and not dropout:
                    for name, call in grouped_calls(r, dtype, plan):
                        yield f"{name} r={r} {dtype} {blocks}", call
            for name, call in low_rank_calls(r, dtype, replace(plan, algorithm="fused"), dropout=dropout):
                yield f"{name} r={r} {dtype} fused dropout={dropout}", call
        # The passes of the low-rank family once more, with columns picked: 16 bits at each width, 32 at the least.
        for widest, many, _ in low_rank if itemsize == 2 else low_rank[:1]:
            plan = LaunchPlan("thin", many, plans.PRODUCT_DEFAULTS[itemsize])
            for name, call in sliced_calls(widest, dtype, plan):
                yield f"sliced_{name} k={widest} {dtype} thin", call
    widest = plans.LOW_RANK_DEFAULTS[2][-1][0]
    plan = LaunchPlan("fused", product=plans.PRODUCT_DEFAULTS[2])
    for name, call in sliced_product_calls(widest, torch.bfloat16, plan):
        yield f"sliced_{name} k={widest} torch.bfloat16 fused", call
    for itemsize, generated in plans.GENERATED_DEFAULTS.items():
        dtype = dtypes[itemsize]
        for (_, product, contract), r, dropout in _padded_ranks(generated):
            for algorithm in ("fused", "panel"):
                plan = LaunchPlan(algorithm, product=product, contract=contract)
                for name, call in generated_calls(r, dtype, plan, dropout=dropout):
                    yield f"generated_{name} r={r} {dtype} {algorithm} dropout={dropout}", call


# ---- what the inner loop is made of

# Kinds of machine instructions, by how their names begin; the first that fits counts.
INSTRUCTIONS = {
    "tensor": ("HGMMA", "HMMA", "QGMMA"),
    "copies to shared": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "global": ("LDG", "STG", "LD.", "ST.", "RED", "ATOM"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "special functions": ("MUFU",),
    "fp32": ("FFMA", "FADD", "FMUL", "FSEL", "FMNMX", "FSETP", "FSET", "HFMA2", "HMUL2", "HADD2"),
    "conversions": ("F2F", "I2F", "F2I", "PRMT"),
    "waits": ("WARPGROUP", "BAR", "DEPBAR", "SYNCS", "LDGDEPBAR", "WARPSYNC", "ERRBAR", "MEMBAR"),
    "integers and flow": ("",),
}


def inner_loop(sass: str) -> dict[str, int]:
    """Instructions by kind, from a disassembly, in one turn of the innermost loop with the most tensor instructions
    (without any, the longest); of the whole kernel where nothing loops."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    def mix(first: int, last: int) -> dict[str, int]:
        found = dict.fromkeys(INSTRUCTIONS, 0)
        for at, text in code:
            name = re.sub(r"^@!?U?P\S+\s+", "", text.strip())
            if first <= at <= last and not name.startswith("NOP"):
                kind = next(k for k, starts in INSTRUCTIONS.items() if name.startswith(starts))
                found[kind] += 1
        return found

    mixes = [mix(*loop) for loop in inner] or [mix(0, code[-1][0])]
    return max(mixes, key=lambda found: (found["tensor"], sum(found.values())))


def table(target: str = "sm_90") -> str:
    """The kernels of the default plans in bf16 without dropout, at the ranks of the goals, as a page."""
    kinds = list(INSTRUCTIONS)
    lines = [
        "# What the compiler makes of the kernels",
        "",
        f"Default plans, bf16, no dropout, aligned shapes, compiled by Triton {triton.__version__} for {target}, which",
        "needs no card. Instructions are those of one turn of the innermost loop with the most tensor instructions,",
        "per warp (a tensor instruction of Hopper is issued for four warps). None of them spills; a test holds every",
        "plan on four targets to that. Made by `python -m tests.kernels.cross_compile --table docs/compiled.md`. None",
        "of it is a measurement of time.",
        "",
        "| call | kernel | registers | shared | " + " | ".join(kinds) + " | all per tensor instruction |",
        "| --- | --- " + "| ---: " * (len(kinds) + 3) + "|",
    ]
    seen = set()
    for label, call in default_calls():
        rank = re.search(r"[rk]=(\d+)", label)
        if "bfloat16" not in label or "dropout=0.1" in label or rank is None or int(rank[1]) not in (16, 64):
            continue
        with compiling_for(target) as compiled:
            call()
        for kernel in compiled:
            found, mix = resources(kernel, target), inner_loop(_cuobjdump(kernel.asm["cubin"], "--dump-sass"))
            name = label.replace(" torch.bfloat16", "").replace(" dropout=0.0", "")
            blocks = re.search(r"SkinnyPlan\(rows=(\d+), columns=(\d+)", name)
            name = re.sub(r"SkinnyPlan\(.*\)", f"thin {blocks[1]}×{blocks[2]}" if blocks else "", name)
            each = f"{sum(mix.values()) / mix['tensor']:.0f}" if mix["tensor"] else ""
            cells = [found.registers, found.shared, *mix.values(), each]
            line = f"| {name} | {found.kernel} | " + " | ".join(str(cell) for cell in cells) + " |"
            if line not in seen:
                lines.append(line)
            seen.add(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints one line for each kernel compiled; the number of kernels that spill or do not fit is the exit code."""
    if sys.argv[1:2] == ["--table"]:
        Path(sys.argv[2]).write_text(table())
        return 0
    targets = sys.argv[1:] or list(TARGETS)
    failures = 0
    for label, call in default_calls():
        for target in targets:
            for found in compile_all(target, call):
                bad = found.spilled > 0 or found.shared > SHARED_LIMIT[target]
                failures += bad
                print(
                    f"{'BAD' if bad else 'ok '} {target:7} shared {found.shared:6} registers {found.registers:3} "
                    f"spilled {found.spilled:4} {'wgmma' if found.wgmma else '     '} {found.kernel} {label}",
                    flush=True,
                )
    return min(failures, 255)


if __name__ == "__main__":
    sys.exit(main())
