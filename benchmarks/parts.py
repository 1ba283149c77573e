"""The parts of a run: what is measured, in which shapes, beside whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from . import model_limits, model_step, shapes
from .comparison import Inputs, Settings, Subject, compare
from .contenders import CONTENDERS, METHODS, methods, names
from .operations import checks, large_offset_check, run_check
from .results import Run
from .runner import add, attempt, spread
from .shapes import Case, Shape
from .timing import ceilings


def _gpu(run: Run) -> bool:
    return run.device.type == "cuda"


def _dtype(run: Run) -> torch.dtype:
    return torch.bfloat16 if _gpu(run) else torch.float32


def _settings(run: Run, seconds: float = 1.5, **more: Any) -> Settings:
    if run.tiny:
        return Settings(seconds=0.0, min_rounds=2, warmup=1, **more)
    return Settings(seconds=seconds, **more)


def _compare(run: Run, shape: Shape, r: int, contenders: Sequence[str], mode: str = "step", **more: Any) -> None:
    settings = more.pop("settings", None) or _settings(run)
    case = Case(shape, r, more.pop("dtype", None) or _dtype(run), run.device)
    add(run, compare(case, contenders, mode, settings=settings, ceilings=run.data["ceilings"], **more))


def _lowrank(run: Run) -> list[str]:
    """Ours of low rank: the modules, and where Triton runs the families on their own."""
    found = names("genft", form="lowrank")
    return [name for name in found if not CONTENDERS[name].missing(run.device)]


# ---- gate and ceilings


def gate(run: Run) -> None:
    """Every operation, algorithm, dtype and layout against float64 on this device; nothing is timed here."""
    listed = checks(("fp32",) if run.tiny else ("bf16", "fp16", "fp32"), tiny=run.tiny)
    if run.tiny:
        listed = listed[::10]
    elif not _gpu(run):
        listed = [check for check in listed if check.algorithm == "auto" and check.dtype != "fp16"]
    state = run.data["gate"] = {"listed": len(listed), "checks": 0, "failed": [], "tightest": []}

    def note(result: Any, check: Any) -> None:
        if isinstance(result, BaseException):
            result = {"what": str(check), "ok": False, "error": str(result)}
        state["checks"] += 1
        if not result["ok"]:
            state["failed"].append(result)
            print(f"  RED {result}", flush=True)
        elif result["budget"]:
            ranked = [*state["tightest"], result]
            state["tightest"] = sorted(ranked, key=lambda r: -r["error"] / r["budget"])[:5]

    for check, result in spread(run_check, listed, run):
        note(result, check)
    if _gpu(run):
        # In this process: it wants the card's memory for itself.
        note(attempt(_large, None, run.device), "offsets past 2^31")
        torch.cuda.empty_cache()
    print(f"  {state['checks'] - len(state['failed'])} of {state['checks']} green", flush=True)


def _large(_: None, device: torch.device) -> dict[str, Any]:
    return large_offset_check(device)


def ceiling(run: Run) -> None:
    """A large copy and a large product, in this run, on random data."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if _gpu(run) else (torch.float32, torch.bfloat16)
    run.data["ceilings"] = ceilings(run.device, dtypes, tiny=run.tiny)
    print(f"  {json.dumps(run.data['ceilings'])}", flush=True)


# ---- goals


def p1(run: Run) -> None:
    """Low rank over the frozen layer and peft LoRA (P1, P5, the eager half of P2)."""
    ours = ["peft-lora", *_lowrank(run)]
    modules = ["peft-lora", *(f"genft-{m.name}" for m in methods("lowrank"))]
    if run.tiny:
        _compare(run, shapes.TINY[0], 4, ours)
        return _compare(run, Shape(24, (32, 16, 16), 32), 4, modules)
    for shape in shapes.GPU_SHAPES[:4]:
        _compare(run, shape, 16, ours)
    _compare(run, shapes.QKV, 16, modules)
    for shape in shapes.GPU_SHAPES[4:]:
        _compare(run, shape, 16, ours)
    for shape in shapes.GPU_SHAPES:
        _compare(run, shape, 64, modules, settings=_settings(run, 1.0, memory=False))
    _compare(run, shapes.GATE_UP, 16, modules)


def p2(run: Run) -> None:
    """Low rank against peft LoRA eager and compiled, and the other peers, at M = 8192 (P2)."""
    peers = names("peer", "naive", form="lowrank")
    for shape in shapes.TINY[:1] if run.tiny else (*shapes.LLAMA[:4], shapes.VIT[0]):
        _compare(run, shape, 4 if run.tiny else 16, ["trainable", *peers, *_lowrank(run)])


def p3(run: Run) -> None:
    """The generated form over a trainable layer and the released formulation, time and memory (P3, P4)."""
    for shape in shapes.TINY[:1] if run.tiny else shapes.GPU_SHAPES[:8]:
        for method in (m for m in METHODS if m.form == "generated"):
            r = 4 if run.tiny else 37 if "leaky" in method.name else 16
            chosen = names(method=method.name, compiled=not run.tiny)
            _compare(run, shape, r, ["trainable", *chosen], suite="generated")


def p6(run: Run) -> None:
    """A whole training step of a Llama-3-8B-shaped model, and of one of its blocks (P6)."""
    block, model = (model_step.TINY,) * 2 if run.tiny else (model_step.LLAMA3_BLOCK, model_step.LLAMA3_8B)
    if not _gpu(run) and not run.tiny:
        block, model = model_step.CPU_BLOCK, model_step.CPU_MODEL
    settings = _settings(run, 6.0, max_rounds=20)
    for size, suite in ((model, "model"), (block, "block")):
        add(run, model_step.compare_models(size, _dtype(run), run.device, suite=suite, settings=settings))
        if _gpu(run):
            torch.cuda.empty_cache()


def modes(run: Run) -> None:
    """The whole model's step with gradient checkpointing, compiled and captured, and its decoding, captured."""
    model = model_step.TINY if run.tiny else model_step.LLAMA3_8B if _gpu(run) else model_step.CPU_MODEL
    peers = [name for name in model_step.variants(model) if name.startswith("peft-lora-")]
    chosen = ["frozen", *peers, *(f"genft-{m.name}" for m in methods() if m.name in _IN_MODELS), "one-block-full"]
    for mode in ("step-graph", "step-checkpoint", "decode", "step-compile"):
        for batch in (1, 8, 64) if mode == "decode" else (model.batch,):
            size = replace(model, batch=batch, sequence=1) if mode == "decode" else model
            size = replace(size, name=f"{size.name}-{batch}") if mode == "decode" else size
            settings = _settings(run, 3.0, max_rounds=10)
            add(run, model_step.compare_models(size, _dtype(run), run.device, chosen, mode, settings=settings))
            if _gpu(run):
                torch.cuda.empty_cache()


_IN_MODELS = ("wegeft", "gift", "genft-gelu", "lora", "grft-row", "sas")


def fits(run: Run) -> None:
    """The longest sequence and the largest batch beside peft LoRA's, by bisection."""
    model = model_step.TINY if run.tiny else model_step.LLAMA3_8B if _gpu(run) else model_step.CPU_MODEL
    peer = next(name for name in model_step.variants(model) if name.startswith("peft-lora-"))
    names = ["frozen", peer, "genft-wegeft", "genft-genft-gelu"]
    budget = None if _gpu(run) else (1 << 18 if run.tiny else 1 << 29)
    for what, most, grain in (
        (("sequence", 1 << 17, 512), ("batch", 512, 1))
        if _gpu(run)
        else (
            ("sequence", 64 if run.tiny else 4096, 16 if run.tiny else 128),
            ("batch", 4 if run.tiny else 16, 1),
        )
    ):
        limits = {"most": most, "grain": grain, "budget": budget}
        add(run, model_limits.what_fits(model, _dtype(run), run.device, names, what, **limits))


def mixed(run: Run) -> None:
    """Decoding with 1, 8 and 64 adapters in one batch against one adapter."""
    if run.tiny:
        size, counts = replace(model_step.TINY, batch=4, sequence=1), (1, 2, 4)
    elif _gpu(run):
        size, counts = replace(model_step.LLAMA3_BLOCK, layers=2, batch=64, sequence=1), (1, 8, 64)
    else:
        size, counts = replace(model_step.CPU_BLOCK, batch=16, sequence=1), (1, 8, 16)
    settings = _settings(run, 4.0, max_rounds=30)
    r = 4 if run.tiny else 16
    add(run, model_limits.mixed(size, _dtype(run), run.device, counts, r, settings))


def p7(run: Run) -> None:
    """Decode, unmerged, captured (P7)."""
    listed = (Shape(1, (24,), 32),) if run.tiny else shapes.DECODE if _gpu(run) else shapes.CPU_DECODE
    ours = [f"genft-{m.name}" for m in methods()]
    for shape in listed:
        _compare(run, shape, 4 if run.tiny else 16, ["peft-lora", *ours], "decode")


def p8(run: Run) -> None:
    """Two CPU cores: every contender on goal P8's layer, the compiled peer with them (P8)."""
    shape = shapes.TINY[0] if run.tiny else shapes.CPU_GOAL
    everyone = [*names(compiled=False), "peft-lora-compiled"]
    everyone = [name for name in everyone if not CONTENDERS[name].missing(run.device)]
    settings = _settings(run, 60.0, min_rounds=15, max_rounds=40) if not run.tiny else None
    _compare(run, shape, 4 if run.tiny else 16, everyone, settings=settings)


def p9(run: Run) -> None:
    """What Python costs in a call (P9)."""
    shape = Shape(1, (24,), 32) if run.tiny else Shape(1, (4096,), 4096) if _gpu(run) else Shape(1, (64,), 64)
    ours = [f"genft-{m.name}" for m in methods()]
    _compare(run, shape, 4 if run.tiny else 16, ["peft-lora", *ours], "call")


def p10(run: Run) -> None:
    """Swapping 224 layers, saving the adapter (P10)."""
    size = replace(model_step.TINY) if run.tiny else model_step.LLAMA3_8B
    add(run, model_step.swap(size, repeats=1 if run.tiny else 3))


def layer(run: Run) -> None:
    """The layer's grid on this device: every contender, forward, forward and backward, decode."""
    everyone = [n for n in names(compiled=False) if not CONTENDERS[n].missing(run.device)]
    listed = shapes.TINY if run.tiny else shapes.CPU_SHAPES[1:]
    settings = _settings(run, 15.0, max_rounds=30)
    for shape in listed:
        _compare(run, shape, 4 if run.tiny else 16, everyone, settings=settings)
    _compare(run, (shapes.TINY if run.tiny else shapes.CPU_SHAPES)[0], 4 if run.tiny else 16, everyone, "forward")


def scaling(run: Run) -> None:
    """Time and memory as M, N = K, r and the number of layers grow."""
    if run.tiny:
        base, widths, rows, ranks, depths = Shape(16, (24,), 24), (16,), (8,), (2,), (1, 2)
    elif _gpu(run):
        base, depths = Shape(8192, (4096,), 4096), (1, 2, 4, 8)
        widths, rows, ranks = (1024, 2048, 8192), (512, 2048, 32768), (4, 64, 128)
    else:
        base, depths = Shape(1024, (768,), 768), (1, 2, 4)
        widths, rows, ranks = (256, 1536), (128, 512, 4096), (4, 64, 128)
    r = 4 if run.tiny else 16
    contenders = ["trainable", "peft-lora", "naive-wegeft", "naive-genft-gelu", *(f"genft-{m.name}" for m in methods())]
    points = [(base, r), *((replace(base, m=m), r) for m in rows)]
    points += [(replace(base, n=(width,), k=width), r) for width in widths] + [(base, rank) for rank in ranks]
    for shape, rank in points:
        _compare(run, shape, rank, contenders, suite="scaling", settings=_settings(run, 2.0))
    size = model_step.TINY if run.tiny else model_step.LLAMA3_BLOCK if _gpu(run) else model_step.CPU_MODEL
    size = replace(size, batch=1)
    for depth in depths:
        deep = replace(size, layers=depth)
        chosen = [n for n in model_step.variants(deep) if n.startswith("genft-") or n in ("frozen", "peft-lora-r16")]
        settings = _settings(run, 3.0, max_rounds=20)
        add(
            run,
            model_step.compare_models(deep, _dtype(run), run.device, chosen, suite="scaling", settings=settings),
        )


# ---- where the time goes


def profile(run: Run, shape: Shape, r: int, contenders: Sequence[str]) -> None:
    """One forward and backward, kernel by kernel (operator by operator on a CPU), beside the floor's arithmetic."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    dtype, gpu, steps = _dtype(run), _gpu(run), 5
    case = Case(shape, r, dtype, run.device)
    if not run.data["ceilings"]:
        ceiling(run)
    product = run.data["ceilings"]["product_tflops"][str(dtype).removeprefix("torch.")]
    copied = run.data["ceilings"]["copy_gb_per_s"]
    inputs = Inputs(case)
    text = []
    for name in contenders or ["frozen", "peft-lora", *(f"genft-{m.name}" for m in methods())]:
        contender = CONTENDERS[name]
        subject = Subject(contender, inputs, "step")
        for index in range(3):
            subject.step(index)
        activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
        with trace(activities=[activity]) as found:
            for index in range(steps):
                subject.step(index)
            if gpu:
                torch.cuda.synchronize()
        rows = [
            ((e.self_device_time_total if gpu else e.self_cpu_time_total) / steps, e.count / steps, e.key)
            for e in found.key_averages()
        ]
        rows = sorted((row for row in rows if row[0] > 0), reverse=True)
        total = sum(row[0] for row in rows)
        floor = shape.operations(contender.form, "step") / product / 1e6
        moved = shape.bytes(contender.form, "step", dtype.itemsize) / copied / 1e3
        text.append(
            f"{name} {case}: {total:.1f} µs in {sum(row[1] for row in rows):.0f} calls; floor {floor:.1f} µs of "
            f"arithmetic, {moved:.1f} µs of bytes"
        )
        text += [f"{us:10.1f} µs {100 * us / total:5.1f} % {calls:5.1f}×  {key[:90]}" for us, calls, key in rows[:20]]
    print("\n".join(text), flush=True)
    if run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / f"profile-{shape}-r{r}.txt").write_text("\n".join(text) + "\n")
