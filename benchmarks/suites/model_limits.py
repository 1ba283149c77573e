"""What fits and who shares: the longest sequence and the largest batch of a training step, and decoding in which the
samples of one batch take different adapters."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn

import genft_modules
from benchmarks.measure import memory
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES
from benchmarks.subjects.layers import wake
from benchmarks.subjects.models import LLM_TARGETS, Size, Trainee, build_base, variants
from benchmarks.suites.comparison import Settings
from genft_kernels.gate import errors
from genft_kernels.timing import Stats, clock_for, interleave, ratio

# ---- what fits


def largest(fits: Callable[[int], bool], start: int, most: int, grain: int) -> int:
    """The largest multiple of `grain` up to `most` that fits, 0 if none does: doubled from `start` until it does not,
    then halved in between. A multiple fits if a larger one does."""
    good, bad = 0, most + grain
    size = max(grain, min(start, most) // grain * grain)
    while good < size < bad:
        if fits(size):
            good = size
            size = min(2 * size, most // grain * grain)
        else:
            bad = size
    while bad - good > grain:
        size = (good + bad) // 2 // grain * grain
        if size in (good, bad):
            break
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def what_fits(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str],
    what: str,
    *,
    mode: str = "step",
    most: int,
    grain: int,
    budget: int | None = None,
    run: Run | None = None,
) -> list[Record]:
    """The longest sequence of one sample ("sequence") or the largest batch of the size's sequence ("batch") with which
    a variant's training step runs.

    On a GPU a step fits if it does not run out of memory. On a CPU, which has no such edge, it fits if it allocates no
    more than `budget` bytes beside the weights. `run`: as in `comparison.compare`.
    """
    base = build_base(size, dtype, device)
    every = variants(size)
    records: list[Record] = []
    for name in names if run is None else run.paced(names):
        variant = every[name]

        def fits(value: int, variant: Any = variant) -> bool:
            batch, sequence = (1, value) if what == "sequence" else (value, size.sequence)
            return _runs(variant, base, batch, sequence, size.vocab, mode, device, budget)

        record: Record = {
            "suite": "fits",
            "mode": f"{mode}, largest {what}",
            "contender": name,
            "kind": variant.kind,
            "method": variant.method,
            "model": dataclasses.asdict(size),
            "r": variant.r,
            "dtype": DTYPE_NAMES[dtype],
        }
        try:
            record["largest"] = largest(fits, size.sequence if what == "sequence" else 1, most, grain)
        except Exception as error:
            record["withheld"] = f"{type(error).__name__}: {error}"[:300]
        records.append(record)
        if run is not None:
            run.put(records)
    return records


def _runs(
    variant: Any, base: Any, batch: int, sequence: int, vocab: int, mode: str, device: torch.device, budget: int | None
) -> bool:
    def attempt() -> bool:
        ids = torch.randint(vocab, (batch, sequence), device=device)
        trainee = Trainee(variant, base, [base.get_input_embeddings()(ids)], [ids], mode)
        trainee.step(0)  # with the optimiser's state
        used = memory.peak_bytes(lambda: trainee.step(0), device)
        return budget is None or used <= budget

    try:
        return attempt()
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# ---- samples of one batch with different adapters


def _with_adapters(base: nn.Module, config: Callable[[], Any], count: int, seed: int) -> nn.Module:
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(base, shared), config(), adapter_name="a0", autocast_adapter_dtype=False
        )
        for index in range(1, count):
            model.add_adapter(f"a{index}", config(), autocast_adapter_dtype=False)
    generator = torch.Generator(next(base.parameters()).device).manual_seed(seed)
    for index in range(count):
        model.set_adapter(f"a{index}")
        wake(model, generator)
    model.set_adapter("a0")
    return model.eval()


def mixed(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    counts: Sequence[int],
    r: int,
    settings: Settings | None = None,
) -> list[Record]:
    """Decoding (the next token of each sample, no cache of earlier ones) with 1, 8, ... adapters in one batch, samples
    in turn, against one active adapter; ours beside peft LoRA's. Not captured: the host is part of it."""
    settings = settings or Settings(seconds=4.0, max_rounds=30)
    base = build_base(size, dtype, device).eval()
    generator = torch.Generator(device).manual_seed(2)
    ids = torch.randint(size.vocab, (size.batch, 1), device=device, generator=generator)
    embedded = base.get_input_embeddings()(ids)
    fields = {"r": r, "target_modules": list(LLM_TARGETS)}
    entrants: dict[str, tuple[str, str, Callable[[], Any]]] = {
        "genft-lora": ("genft", "lora", lambda: genft_modules.LoRAConfig(lora_alpha=2 * r, **fields)),
        "genft-wegeft": ("genft", "wegeft", lambda: genft_modules.WeGeFTConfig(wegeft_alpha=2 * r, **fields)),
        "peft-lora": ("peer", "lora", lambda: peft.LoraConfig(lora_alpha=2 * r, **fields)),
    }

    def step(model: nn.Module, names: list[str] | None) -> Callable[[int], Tensor]:
        more = {} if names is None else {"adapter_names": names}

        def run(index: int) -> Tensor:
            with torch.no_grad():
                return model(inputs_embeds=embedded, **more).logits  # type: ignore[no-any-return]

        return run

    records: dict[str, Record] = {}
    steps: dict[str, Callable[[int], Tensor]] = {"frozen": step(base, None)}

    def note(name: str, kind: str, method: str, rank: int) -> Record:
        records[name] = {
            "suite": "mixed",
            "mode": "decode, adapters mixed",
            "contender": name,
            "kind": kind,
            "method": method,
            "model": dataclasses.asdict(size),
            "r": rank,
            "dtype": DTYPE_NAMES[dtype],
        }
        return records[name]

    note("frozen", "floor", "none", 0)
    for name, (kind, method, config) in entrants.items():
        try:
            model = _with_adapters(base, config, max(counts), seed=3)
            steps[f"{name}, one active"] = step(model, None)
            note(f"{name}, one active", kind, method, r)
            for count in counts:
                names = [f"a{i % count}" for i in range(size.batch)]
                own = step(model, names)
                record = note(f"{name}, {count} in a batch", kind, method, r)
                record["gate"] = _check_mixed(model, names, own, embedded)
                if record["gate"]["ok"]:
                    steps[f"{name}, {count} in a batch"] = own
                else:
                    record["withheld"] = f"gate: {record['gate']}"
        except Exception as error:
            note(name, kind, method, r)["withheld"] = f"{type(error).__name__}: {error}"[:300]
    limits = {"min_rounds": settings.min_rounds, "max_rounds": settings.max_rounds, "warmup": settings.warmup}
    measured = interleave(steps, clock_for(device), seconds=settings.seconds, **limits)
    for name, ms in measured.items():
        stats = Stats.of(ms)
        records[name]["ms"] = stats.json()
        records[name]["ratio"] = ratio(ms, measured["frozen"]).json()
        records[name]["tokens_per_s"] = round(size.batch / stats.median * 1e3, 1)
    return list(records.values())


def _check_mixed(model: Any, names: list[str], own: Callable[[int], Tensor], embedded: Tensor) -> dict[str, Any]:
    """Every adapter's samples against a batch of its own: bf16 logits may differ by a twentieth, others by 1e-4."""
    got = own(0)
    budget = 0.05 if got.dtype in (torch.bfloat16, torch.float16) else 1e-4
    worst = 0.0
    for adapter in sorted(set(names))[:4]:
        rows = [i for i, name in enumerate(names) if name == adapter]
        model.set_adapter(adapter)
        with torch.no_grad():
            alone = model(inputs_embeds=embedded[rows]).logits
        worst = max(worst, errors(got[rows], alone.double())[0])
    model.set_adapter("a0")
    return {"ok": worst <= budget, "worst": "logits", "error": worst, "budget": budget}
