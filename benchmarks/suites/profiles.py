"""Where the time of a step goes, kernel by kernel (operator by operator on a CPU), and which kernels are slow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace

from benchmarks.measure import shapes
from benchmarks.measure.part import Part
from benchmarks.measure.results import Run
from benchmarks.measure.shapes import Case, Shape
from benchmarks.subjects.contenders import CONTENDERS, methods
from benchmarks.subjects.layers import Inputs, Subject
from benchmarks.suites import parts

SLOW = 1.5  # times its bytes over the copy ceiling
STEPS = 5


def part(arguments: argparse.Namespace) -> Part:
    """What `--profile` runs."""
    shape = shapes.TINY[0] if arguments.dry_run else Shape.parse(arguments.profile)
    chosen = [name for name in arguments.contenders.split(",") if name]
    rank = 4 if arguments.dry_run else arguments.rank
    chosen = chosen or ["frozen", "peft-lora", *(f"genft-{m.name}" for m in methods())]
    return Part("profile", str(shape), lambda run: profile(run, shape, rank, chosen), 540)


def headline(run: Run) -> None:
    """Low rank and GenFT at the shape that goals P1 and P3 are first about."""
    shape, r = (shapes.TINY[0], 4) if run.tiny else (shapes.LLAMA[0], 16)
    profile(run, shape, r, ["genft-wegeft", "genft-lora", "genft-genft-gelu"])


def moved(kernel: str, shape: Shape, r: int, calls: float, itemsize: int) -> int:
    """Bytes that the calls of a kernel of ours in one step cannot do without; 0 where they are not what bounds it.

    A skinny pass goes over x (or dX) in one call and over dY (or y) in another; further calls are over W0. Panels of
    W0 + ΔW are read and written once for y and once for dX.
    """
    k, n, weight = shape.k, sum(shape.n), shape.weight_elements
    if any(name in kernel for name in ("_project_kernel", "_reduce_kernel", "_update_kernel")):
        sides = min(calls / len(shape.n), 2.0) / 2 * (shape.m * (k * len(shape.n) + n))
        return round(itemsize * (sides + max(0.0, calls / len(shape.n) - 2.0) * weight))
    return 4 * itemsize * weight if "_panel_kernel" in kernel else 0


def slow_kernels(
    rows: Sequence[dict[str, Any]], contender: str, shape: Shape, r: int, itemsize: int, copied: float
) -> list[dict[str, Any]]:
    """Those of `rows` that take more than `SLOW` times their bytes over the copy ceiling (GB/s): the plan of that shape
    should be the library's."""
    found = []
    for row in rows:
        bytes_ = moved(row["kernel"], shape, r, row["calls"], itemsize)
        times = row["us"] * copied * 1e3 / bytes_ if bytes_ else 0.0
        if times > SLOW:
            where = {"contender": contender, "shape": str(shape), "r": r}
            found.append({**where, **row, "bytes": bytes_, "times": round(times, 2)})
    return found


def profile(run: Run, shape: Shape, r: int, contenders: Sequence[str]) -> None:
    """Forward and backward of each contender, beside the floor's arithmetic and bytes."""
    dtype, gpu = parts.dtype_of(run), run.device.type == "cuda"
    case = Case(shape, r, dtype, run.device)
    if not run.data["ceilings"]:
        parts.ceiling(run)
    product = run.data["ceilings"]["product_tflops"][str(dtype).removeprefix("torch.")]
    copied = run.data["ceilings"]["copy_gb_per_s"]
    inputs = Inputs(case)
    text = []
    for name in run.paced(contenders):
        contender = CONTENDERS[name]
        subject = Subject(contender, inputs, "step")
        for index in range(3):
            subject.step(index)
        with trace(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
            for index in range(STEPS):
                subject.step(index)
            if gpu:
                torch.cuda.synchronize()
        events = [
            (e.self_device_time_total if gpu else e.self_cpu_time_total, e.count, e.key) for e in found.key_averages()
        ]
        rows = [
            {"kernel": key[:90], "us": round(us / STEPS, 2), "calls": round(count / STEPS, 2)}
            for us, count, key in sorted(events, reverse=True)
            if us > 0
        ]
        total = sum(row["us"] for row in rows)
        run.data["profiles"].append(
            {"contender": name, "shape": str(shape), "r": r, "us": round(total, 2), "kernels": rows[:20]}
        )
        run.data["slow_kernels"] += slow_kernels(rows, name, shape, r, dtype.itemsize, copied)
        run.flush()
        floor = shape.operations(contender.form, "step") / product / 1e6
        least = shape.bytes(contender.form, "step", dtype.itemsize) / copied / 1e3
        told = [
            f"{name} {case}: {total:.1f} µs in {sum(row['calls'] for row in rows):.0f} calls; floor {floor:.1f} µs of "
            f"arithmetic, {least:.1f} µs of bytes"
        ]
        told += [
            f"{row['us']:10.1f} µs {100 * row['us'] / total:5.1f} % {row['calls']:5.1f}×  {row['kernel']}"
            for row in rows[:20]
        ]
        print("\n".join(told), flush=True)
        text += told
    if run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / f"profile-{shape}-r{r}.txt").write_text("\n".join(text) + "\n")
