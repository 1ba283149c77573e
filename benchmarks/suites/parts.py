"""The parts of a run: what is measured, in which shapes, beside whom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import results, shapes
from benchmarks.measure.part import add, attempt, show, spread
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import Case, Shape
from benchmarks.measure.timing import ceilings
from benchmarks.report.goals import P1_METHODS
from benchmarks.subjects import models
from benchmarks.subjects.contenders import CONTENDERS, methods, names
from benchmarks.subjects.operations import checks, large_offset_check, run_check
from benchmarks.suites import answers, model_limits, model_step, sweep
from benchmarks.suites import mixed as mixing
from benchmarks.suites.comparison import Settings, compare
from genft_kernels.plan import Problem, device_facts


def _gpu(run: Run) -> bool:
    return run.device.type == "cuda"


def dtype_of(run: Run) -> torch.dtype:
    return torch.bfloat16 if _gpu(run) else torch.float32


def _settings(run: Run, seconds: float = 1.5, **more: Any) -> Settings:
    if run.tiny:
        return Settings(seconds=0.0, min_rounds=2, warmup=1, calls=2, **more)
    return Settings(seconds=seconds, **more)


def _compare(run: Run, shape: Shape, r: int, contenders: Sequence[str], mode: str = "step", **more: Any) -> None:
    settings = more.pop("settings", None) or _settings(run)
    case = Case(shape, r, dtype_of(run), run.device)
    show(compare(case, contenders, mode, settings=settings, ceilings=run.data["ceilings"], run=run, **more))


def _compare_models(run: Run, size: models.Size, *arguments: Any, **more: Any) -> None:
    show(model_step.compare_models(size, dtype_of(run), run.device, *arguments, run=run, **more))
    if _gpu(run):
        torch.cuda.empty_cache()


def _modules(form: str = "") -> list[str]:
    return [f"genft-{method.name}" for method in methods(form)]


def _everyone(run: Run, *kinds: str, form: str = "") -> list[str]:
    """What runs here. On a CPU the automatic choice is the library: only a dry run forces algorithms."""
    found = [name for name in names(*kinds, form=form, compiled=False) if not CONTENDERS[name].missing(run.device)]
    return [name for name in found if _gpu(run) or run.tiny or not CONTENDERS[name].algorithm]


# ---- gate and ceilings


def gate(run: Run) -> None:
    """Every operation, algorithm, dtype and layout against float64 on this device; nothing is timed here."""
    listed = checks(("fp32",) if run.tiny else ("bf16", "fp16", "fp32"), tiny=run.tiny)
    if run.tiny:
        listed = listed[::19]  # prime: not the same variant of each operation
    elif not _gpu(run):
        listed = [check for check in listed if check.algorithm == "auto" and check.dtype != "fp16" and check.m < 9000]
    # Should time run out: bf16 and the kernels first, their largest batches before the others.
    order = {"bf16": 0, "fp32": 1, "fp16": 2}
    listed.sort(key=lambda c: (c.algorithm == "library", order[c.dtype], c.algorithm == "auto", -c.m))
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

    waiting = dict.fromkeys(listed)
    try:
        for check, result in spread(run_check, listed, run):
            waiting.pop(check, None)
            note(result, check)
    finally:
        state["unfinished"] = [str(check) for check in waiting][:20]  # where the time ran out, or a kernel never ended
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
    """Low rank over the frozen layer and peft LoRA (P1, P5, the eager half of P2): the headline shape with every
    algorithm, the others with the methods that the goal names."""
    peers = ["peft-lora", "peft-lora-dropout", "peft-dora"]
    everyone, named = [*peers, *_everyone(run, "genft", form="lowrank")], ["peft-lora", *P1_METHODS]
    if run.tiny:
        _compare(run, shapes.TINY[0], 4, everyone)
        return _compare(run, Shape(24, (32, 16, 16), 32), 4, named)
    _compare(run, shapes.LLAMA[0], 16, everyone)
    first, others = shapes.LLAMA[:4], shapes.GPU_SHAPES[4:]
    listed = [(shape, 16) for shape in first[1:]] + [(shape, 64) for shape in first]
    listed += [(shape, r) for r in (16, 64) for shape in others] + [(shapes.QKV, 16), (shapes.GATE_UP, 16)]
    for shape, r in run.paced(listed):
        _compare(run, shape, r, named, settings=_settings(run, 1.0, memory=r == 16))


def p2(run: Run) -> None:
    """Low rank against peft LoRA, eager and compiled, and the other peers, at M = 8192 (P2)."""
    named = ["peft-lora", *P1_METHODS]
    if run.tiny:
        return _compare(run, shapes.TINY[0], 4, [*_everyone(run, "peer", form="lowrank"), *named], suite="peers")
    for shape in run.paced(shapes.LLAMA[:4]):
        _compare(run, shape, 16, ["peft-lora-compiled", *named], suite="peers")
    peers = _everyone(run, "peer", "naive", form="lowrank")
    _compare(run, shapes.VIT[0], 16, ["peft-lora-compiled", *peers, *named], suite="peers")


def p3(run: Run) -> None:
    """The generated form over a trainable layer and the released formulation, time and memory (P3, P4)."""
    listed = [(shape, name) for shape in shapes.LLAMA[:8] for name in ("genft-gelu", "genft-leakyrelu", "hira")]
    for shape, name in run.paced([(shapes.TINY[0], name) for _, name in listed[:3]] if run.tiny else listed):
        r = 4 if run.tiny else 37 if "leaky" in name else 16
        _compare(run, shape, r, ["trainable", *names(method=name, compiled=False)], suite="generated")


def p6core(run: Run) -> None:
    """A training step of a Llama-3-8B-shaped model: what goal P6 compares."""
    size = models.TINY if run.tiny else models.LLAMA3_8B
    peers = [name for name in models.variants(size) if name.startswith("peft-lora-")]
    _compare_models(run, size, ["genft-wegeft", *peers], settings=_settings(run, 15.0, max_rounds=20))


def p6(run: Run) -> None:
    """A whole training step of a Llama-shaped model with every method, and of one of its blocks."""
    block, model = (models.TINY,) * 2 if run.tiny else (models.LLAMA3_BLOCK, models.LLAMA3_8B)
    if not _gpu(run) and not run.tiny:
        block, model = models.CPU_BLOCK, models.CPU_MODEL
    for size, suite in [(block, "block"), (model, "model")][: 1 if run.tiny else 2]:
        _compare_models(run, size, suite=suite, settings=_settings(run, 6.0, max_rounds=20))


def modes(run: Run) -> None:
    """The whole model's step with gradient checkpointing, compiled and captured, and its decoding, captured."""
    model = models.TINY if run.tiny else models.LLAMA3_8B if _gpu(run) else models.CPU_MODEL
    peers = [name for name in models.variants(model) if name.startswith("peft-lora-")]
    chosen = ["frozen", *peers, *(name for name in _modules() if name in _IN_MODELS), "one-block-full"]
    listed = [("step-graph", model), ("step-checkpoint", model)]
    for batch in (2,) if run.tiny else (1, 8, 64):
        listed.append(("decode", replace(model, name=f"{model.name}-{batch}", batch=batch, sequence=1)))
    if not run.tiny:  # the CPU's compiler takes minutes
        listed.append(("step-compile", model))
    for mode, size in run.paced(listed):
        _compare_models(run, size, chosen[: 3 if run.tiny else None], mode, settings=_settings(run, 3.0, max_rounds=10))


_IN_MODELS = ("genft-wegeft", "genft-gift", "genft-genft-gelu", "genft-lora", "genft-grft-row", "genft-sas")


def fits(run: Run) -> None:
    """The longest sequence and the largest batch beside peft LoRA's, by bisection."""
    model = models.TINY if run.tiny else models.LLAMA3_8B if _gpu(run) else models.CPU_MODEL
    peer = next(name for name in models.variants(model) if name.startswith("peft-lora-"))
    names = ["frozen", peer, "genft-wegeft", "genft-genft-gelu"][: 2 if run.tiny else 4]
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
        show(model_limits.what_fits(model, dtype_of(run), run.device, names, what, run=run, **limits))


def mixed(run: Run) -> None:
    """Adapters mixed in one batch: on a CPU one layer and `generate` beside peft's loop, then the next token of a model
    with 1, 8 and 64 adapters in the batch against one adapter."""
    r = 4 if run.tiny else 16
    if not _gpu(run):
        _mixed_on_cpu(run, r)
    if run.tiny:
        size, counts = replace(models.TINY, batch=4, sequence=1), (1, 2, 4)
    elif _gpu(run):
        size, counts = replace(models.LLAMA3_BLOCK, layers=2, batch=64, sequence=1), (1, 8, 64)
    else:
        size, counts = replace(models.CPU_BLOCK, batch=16, sequence=1), (1, 8, 16)
    add(run, mixing.next_token(size, dtype_of(run), run.device, counts, r, _settings(run, 4.0, max_rounds=30)))


def _mixed_on_cpu(run: Run, r: int) -> None:
    samples = (1, 4) if run.tiny else (1, 4, 16, 64)
    listed = [
        Case(replace(shape, m=m), r, dtype, run.device)
        for shape in (shapes.TINY[:1] if run.tiny else shapes.CPU_MIXED)
        for dtype in (torch.float32, torch.bfloat16)
        for m in samples
    ]
    settings = _settings(run, 1.0, max_rounds=100)
    for case in run.paced(listed):
        counts = [count for count in samples if count <= case.shape.m]
        show(mixing.layers(case, counts, settings, replicas=int(run.tiny), run=run))
    size = models.TINY if run.tiny else models.CPU_MODEL
    batches = [(m, count) for m in samples for count in samples if count <= m]
    settings = _settings(run, 4.0, max_rounds=20)
    show(mixing.generating(size, torch.float32, run.device, batches, r, settings, run=run))


def p7(run: Run) -> None:
    """Decode, unmerged, captured (P7)."""
    listed = (Shape(1, (24,), 32),) if run.tiny else shapes.DECODE if _gpu(run) else shapes.CPU_DECODE
    chosen = [*P1_METHODS, "genft-grft-row", "genft-genft-gelu"] if _gpu(run) else _modules()
    for shape in run.paced(listed):
        _compare(run, shape, 4 if run.tiny else 16, ["peft-lora", *chosen], "decode")


def p8(run: Run) -> None:
    """Two CPU cores: every contender on goal P8's layer, the compiled peer with them (P8)."""
    shape = shapes.TINY[0] if run.tiny else shapes.CPU_GOAL
    settings = _settings(run, 60.0, min_rounds=15, max_rounds=40) if not run.tiny else None
    _compare(run, shape, 4 if run.tiny else 16, [*_everyone(run), "peft-lora-compiled"], settings=settings)


def p9(run: Run) -> None:
    """What Python costs in a call, with a gradient and without, of layers and of bare operations (P9)."""
    shape, r = (Shape(1, (4096,), 4096), 16) if _gpu(run) else (shapes.CPU_CALL, 4)
    bare = [f"genft-{method.name}-library" for method in methods() if method.apply is not None]
    for mode in ("call", "call-eval"):
        _compare(run, shape, r, ["peft-lora", *_modules(), *bare], mode)


def n1(run: Run) -> None:
    """How much of a small update bf16 outputs answer to, beside peft LoRA (N1)."""
    shape = Shape(2048, (4096,), 4096) if _gpu(run) else shapes.TINY[0] if run.tiny else Shape(1024, (1024,), 1024)
    case = Case(shape, 4 if run.tiny else 16, torch.bfloat16, run.device)
    ours = [
        name for name in _everyone(run, "genft", form="lowrank") if name not in ("fused-dora", "fused-lora-dropout")
    ]
    show(answers.answers(case, ["peft-lora", *ours], run))


def p10(run: Run) -> None:
    """Swapping 224 layers, saving the adapter (P10)."""
    size = replace(models.TINY) if run.tiny else models.LLAMA3_8B
    add(run, model_step.swap(size, repeats=1 if run.tiny else 3))


def layer(run: Run) -> None:
    """The layer's grid on this device: every contender, forward, forward and backward, decode."""
    everyone = _everyone(run)
    listed = shapes.TINY if run.tiny else shapes.CPU_SHAPES[1:]
    settings = _settings(run, 15.0, max_rounds=30)
    for shape in listed:
        _compare(run, shape, 4 if run.tiny else 16, everyone, settings=settings)
    _compare(run, (shapes.TINY if run.tiny else shapes.CPU_SHAPES)[0], 4 if run.tiny else 16, everyone, "forward")


def scaling(run: Run) -> None:
    """Time and memory as M, N = K, r and the number of layers grow."""
    if run.tiny:
        base, widths, rows, ranks, depths = Shape(16, (24,), 24), (), (8,), (), (1,)
    elif _gpu(run):
        base, depths = Shape(8192, (4096,), 4096), (1, 2, 4, 8)
        widths, rows, ranks = (1024, 2048, 8192), (512, 2048, 32768), (4, 64, 128)
    else:
        base, depths = Shape(1024, (768,), 768), (1, 2, 4)
        widths, rows, ranks = (256, 1536), (128, 512, 4096), (4, 64, 128)
    r = 4 if run.tiny else 16
    contenders = ["trainable", "peft-lora", "naive-wegeft", "naive-genft-gelu", *_modules()][: 5 if run.tiny else None]
    points = [(base, r), *((replace(base, m=m), r) for m in rows)]
    points += [(replace(base, n=(width,), k=width), r) for width in widths] + [(base, rank) for rank in ranks]
    for shape, rank in run.paced(points):
        _compare(run, shape, rank, contenders, suite="scaling", settings=_settings(run, 2.0))
    size = models.TINY if run.tiny else models.LLAMA3_BLOCK if _gpu(run) else models.CPU_MODEL
    for deep in run.paced([replace(size, batch=1, layers=depth) for depth in depths]):
        chosen = [n for n in models.variants(deep) if n.startswith("genft-") or n in ("frozen", "peft-lora-r16")]
        chosen = chosen[: 3 if run.tiny else None]
        _compare_models(run, deep, chosen, suite="scaling", settings=_settings(run, 3.0, max_rounds=20))


# ---- what missed its goal

# By form and mode: the time over the frozen layer from which a plan is looked for once more (P1, P3, P7).
LOST = {("lowrank", "step"): 1.06, ("generated", "step"): 1.15 * 1.5, ("lowrank", "decode"): 1.10}


def missed(records: Iterable[Record]) -> list[Problem]:
    """The problems of our layers that took longer than `LOST`, the furthest from it first."""
    found: dict[Problem, float] = {}
    for record in records:
        limit = LOST.get((record.get("form"), record["mode"]))
        if limit and "ratio" in record and record.get("operation") and record["contender"] in _modules():
            size = shapes.DTYPES[record["dtype"]].itemsize
            for n in record["n"]:
                problem = Problem(record["operation"], record["m"], n, record["k"], record["r"], size)
                found[problem] = max(found.get(problem, 0.0), record["ratio"]["median"] / limit)
    return sorted((problem for problem in found if found[problem] > 1.0), key=lambda problem: -found[problem])


def again(run: Run) -> None:
    """Plans once more for what missed its goal in the runs on this device so far. They are added to the package's."""
    slug = results.slug(run.data["run"]["device"])
    runs = [data for name, data in results.load_folder(results.FOLDER) if name == slug]
    problems = missed(results.newest([*runs, run.data]))
    print(f"  {len(problems)} problems", flush=True)
    name = f"{device_facts(run.device).architecture}.json"
    packaged = results.ROOT / "genft_kernels" / "plans" / name
    if packaged.is_file() and run.folder is not None:
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(packaged, run.folder / f"plans-{name}")
    sweep.sweep(run, problems[:1] if run.tiny else problems)
