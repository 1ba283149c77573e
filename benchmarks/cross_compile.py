"""Compiles what the launchers launch for GPUs that are not here, and reads the resources the compiler reports.

`python -m benchmarks.cross_compile [--widest] [TARGET ...]` prints a line for every kernel of every default plan; with
--widest on sm_90 each plan at the largest rank that it serves, elsewhere the backward of each algorithm once, in
bfloat16.
`python -m benchmarks.cross_compile --table docs/compiled.md` writes what one target's kernels are made of.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from genft_kernels import DeviceFacts, LaunchPlan, Problem, RowGroups
from genft_kernels import plan as plans

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block may ask for on the card.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
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


@cache
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


def low_rank_calls(r: int, dtype: torch.dtype, plan: LaunchPlan, *, rows: int = M, dropout: float = 0.0) -> Calls:
    """One call for each launcher of the low-rank family."""
    from genft_kernels._triton import lowrank as run

    x, dy, weight = torch.empty(rows, K, dtype=dtype), torch.empty(rows, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    p, q, t = torch.empty(K, r), torch.empty(N, r), torch.empty(rows, r, dtype=dtype)
    bias = torch.empty(N, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    drop = (dropout, seed)
    # Beside its product, the single pass has the reductions of the seeded algorithm.
    needs = [True, False, False] if plan.algorithm == "single" else [True] * 3
    yield "forward", lambda: run.lowrank_linear_forward(x, weight, p, q, bias, 1.5, *drop, plan)
    yield "backward", lambda: run.lowrank_linear_backward(dy, x, weight, p, q, t, 1.5, *drop, needs, plan)


def rescale_calls(dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """One call for each launcher around the low-rank product of rescaled outputs."""
    from genft_kernels._triton.kernels.rescale import launch_column_sums, launch_rescale

    z, gain, bias = torch.empty(M, N, dtype=dtype), torch.empty(N), torch.empty(N, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64)
    yield "rescale", lambda: launch_rescale(z, plan.skinny, gain=gain, bias=bias)
    yield "drop", lambda: launch_rescale(z, plan.skinny, dropout=0.1, seed=seed)
    yield "column_sums", lambda: launch_column_sums(z, z, plan.skinny, torch.float32)


def edit_calls(r: int, dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """One call for each launcher of an edit alone, and of the features of a weight with dropout."""
    from genft_kernels._triton import edit, features

    x, weight, t = torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype), torch.empty(M, r, dtype=dtype)
    psi, phi, dz, seed = torch.empty(r, K), torch.empty(r, K), torch.empty(N, r), torch.zeros(1, dtype=torch.int64)
    yield "edit_forward", lambda: edit.input_edit_forward(x, psi, phi, 1.5, plan)
    yield "edit_backward", lambda: edit.input_edit_backward(x, x, psi, phi, t, 1.5, [True] * 3, plan)
    yield "features_forward", lambda: features.weight_features_forward(weight, psi, None, 1.5, 0.1, seed, plan)
    yield "features_backward", lambda: features.weight_features_backward(dz, weight, 1.5, 0.1, seed, [True], plan)


def grouped_calls(r: int, dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """The backward of the grouped operation, which launches what the forward does and more."""
    from genft_kernels._triton import grouped as run

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    p, q, t = torch.empty(GROUPS, K, r), torch.empty(GROUPS, N, r), torch.empty(M, r, dtype=dtype)
    index, bounds = torch.zeros(M // 16, dtype=torch.int32), torch.zeros(GROUPS + 1, dtype=torch.int32)
    rows = RowGroups(index, index, bounds)
    needs = [True, True, False]  # dQ is made as dP is
    yield "grouped", lambda: run.grouped_lowrank_linear_backward(dy, x, weight, p, q, t, *rows, needs, plan)


def generated_calls(
    r: int,
    dtype: torch.dtype,
    plan: LaunchPlan,
    *,
    combine: str = "add",
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Calls:
    """One call for each launcher on a generated matrix, with a bias along either side."""
    from genft_kernels._triton import generated as run

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    bias, a, dz = torch.empty(N, dtype=dtype), torch.empty(r, N), torch.empty(K, r)
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    h, b, row, column = torch.empty(N, r), torch.empty(K, r), torch.empty(N), torch.empty(K)
    rest = (row, column, combine, 1.5, activation, dropout, seed)
    yield "forward", lambda: run.generated_linear_forward(x, weight, h, b, bias, *rest, plan)
    yield "backward", lambda: run.generated_linear_backward(dy, x, weight, h, b, *rest, [True] * 5, plan)
    if plan.algorithm == "fused" and combine == "add":
        h16, b16, a16, dz16 = (tensor.to(dtype) for tensor in (h, b, a, dz))
        rest16 = (None, activation, dropout, seed)
        yield "features_forward", lambda: run.generated_features_forward(h16, b16, a16, None, *rest16, plan)
        yield (
            "features_backward",
            lambda: run.generated_features_backward(dz16, h16, b16, a16, *rest16, [True] * 4, plan),
        )


def sliced_product_calls(k: int, dtype: torch.dtype, plan: LaunchPlan) -> Calls:
    """What slices ask of the fused product: unit vectors for a right factor, sums of squares."""
    from genft_kernels._triton import sliced
    from genft_kernels._triton.kernels.product import launch_product

    x, dy, weight = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype), torch.empty(N, K, dtype=dtype)
    t, pick = torch.empty(M, k, dtype=dtype), torch.arange(k)
    yield "unit", lambda: launch_product(x, weight.t(), t, None, plan.product, pick=pick)
    yield "squared_gradient_sums", lambda: sliced.squared_gradient_sums_forward(dy, x, plan)


DTYPES = {2: torch.bfloat16, 4: torch.float32}
RANKS = (16, 32, 64, 128)  # as kernels pad them


def ranks_of(table: Iterable[tuple[Any, ...]], every: bool) -> tuple[int, ...]:
    """The largest rank that each entry of a table of default plans serves, which takes the most registers; or all."""
    return RANKS if every else tuple(widest for widest, *_ in table)


def default_calls(target: str, *, every: bool = True) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every plan that `default_plan` chooses from on the target, at every padded rank; dropout at the widest. Without
    `every`, each plan at the widest rank that it serves, and what other operations launch with it once for a rank, with
    the largest blocks, which take the most registers."""
    facts = DeviceFacts(target, PROCESSORS[target])
    low_rank = [(size, r) for size in DTYPES for r in ranks_of(plans.SKINNY_DEFAULTS[size], every)]
    for itemsize, r in low_rank:
        dtype = DTYPES[itemsize]
        listed: dict[LaunchPlan, int] = {}
        for rows in (16, 64, M):
            problem = Problem("lowrank_linear", rows, N, K, r, itemsize)
            for plan in plans.default_candidates(problem, facts)[:-1]:
                listed.setdefault(plan, rows)
        most = max((plan.skinny.rows for plan in listed), default=0)
        for plan, rows in listed.items():
            if plan.algorithm == "single" and not every and r < plans.SINGLE_RANK:
                continue
            label = f"r={r} {dtype} {plan.algorithm} {_blocks_of(plan)}"
            for name, call in low_rank_calls(r, dtype, plan, rows=rows):
                yield f"lowrank_{name} {label}", call
            if plan.skinny.rows < most and not every:
                continue
            if plan.algorithm == "seeded":
                yield from ((f"{name} {label}", call) for name, call in edit_calls(r, dtype, plan))
                yield from ((f"{name} {label}", call) for name, call in rescale_calls(dtype, plan))
            if plan.algorithm == "seeded" and r in (32, 64):
                for name, call in low_rank_calls(r, dtype, plan, dropout=0.1):
                    yield f"lowrank_{name} {label} dropout=0.1", call
                yield from ((f"{name} {label}", call) for name, call in grouped_calls(r, dtype, plan))
    for r in (16, 64):
        seeded = plans.default_candidates(Problem("lowrank_linear", M, N, K, r, 2), facts)[0]
        plan = replace(seeded, algorithm="fused", product=plans.PRODUCT_DEFAULTS[2])
        for name, call in low_rank_calls(r, torch.bfloat16, plan, dropout=0.1 if r == 64 else 0.0):
            yield f"lowrank_{name} r={r} torch.bfloat16 fused", call
        for name, call in sliced_product_calls(r, torch.bfloat16, plan):
            yield f"sliced_{name} k={r} torch.bfloat16 fused", call
    generated = [(size, r) for size in DTYPES for r in ranks_of(plans.GENERATED_DEFAULTS[size], every)]
    for itemsize, r in generated:
        dtype = DTYPES[itemsize]
        plan = plans.default_plan(Problem("generated_linear", M, N, K, r, itemsize), facts)
        if plan.algorithm in plans.LIBRARY:
            continue
        for algorithm, dropout in (("fused", 0.0), ("panel", 0.0), *((("panel", 0.1),) if r == 64 else ())):
            for name, call in generated_calls(r, dtype, replace(plan, algorithm=algorithm), dropout=dropout):
                # Below, this rank has the same kernels with more in them, but for the features.
                if every or r != 64 or dropout or name.startswith("features"):
                    yield f"generated_{name} r={r} {dtype} {algorithm} dropout={dropout}", call
        # The update alone, with dropout of x, has the same kernels with less in them.
        for algorithm in ("fused", "panel") if every or r == 64 else ():
            modulated = generated_calls(r, dtype, replace(plan, algorithm=algorithm), combine="modulate")
            for name, call in modulated:
                yield f"generated_{name} r={r} {dtype} {algorithm} modulate", call


def widest_calls(target: str) -> Iterable[tuple[str, Callable[[], object]]]:
    """Those calls of `default_calls` that a test has time for."""
    calls = default_calls(target, every=False)
    if target == "sm_90":
        return calls
    # The last one of a kind is at its largest rank, and a backward, which launches what the forward does and more. The
    # single pass has another kernel for few rows.
    varying = r"_(for|back)ward| [rk]=\d+|(?<!single) \d+×\d+|×\d+"
    kinds = {re.sub(varying, "", label): (label, call) for label, call in calls}
    return [one for kind, one in kinds.items() if "float32" not in kind]


def _blocks_of(plan: LaunchPlan) -> str:
    if plan.algorithm == "single":
        return f"{plan.product.m}×{plan.product.n}×{plan.product.k}" + ("" if plan.product.descriptors else " loads")
    return f"{plan.skinny.rows}×{plan.skinny.columns}"


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
        "plan on four targets to that. Made by `python -m benchmarks.cross_compile --table docs/compiled.md`. None",
        "of it is a measurement of time.",
        "",
        "| call | kernel | registers | shared | " + " | ".join(kinds) + " | all per tensor instruction |",
        "| --- | --- " + "| ---: " * (len(kinds) + 3) + "|",
    ]
    seen = set()
    for label, call in default_calls(target):
        rank = re.search(r"[rk]=(\d+)", label)
        if "bfloat16" not in label or "dropout=0.1" in label or rank is None or int(rank[1]) not in (16, 64):
            continue
        with compiling_for(target) as compiled:
            call()
        for kernel in compiled:
            found, mix = resources(kernel, target), inner_loop(_cuobjdump(kernel.asm["cubin"], "--dump-sass"))
            name = label.replace(" torch.bfloat16", "").replace(" dropout=0.0", "")
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
    targets = [word for word in sys.argv[1:] if word != "--widest"] or list(TARGETS)
    failures = 0
    for target in targets:
        for label, call in widest_calls(target) if "--widest" in sys.argv else default_calls(target):
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
