"""A whole training step, or decoding step, of a Llama-shaped model with random weights: time, tokens per second, memory
(goals P6, P10).

All variants of a comparison stand on the same frozen weights, side by side, so that one run measures them interleaved.
Every variant gets embeddings that require a gradient, as with gradient checkpointing: then the frozen model, the floor,
makes the same gradients of activations as the adapted ones.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import genft_modules
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES
from benchmarks.subjects.contenders import METHODS
from benchmarks.subjects.models import Size, Trainee, build_base, config_of, variants
from benchmarks.suites.comparison import Settings
from genft_kernels.timing import Stats, Step, clock_for, interleave, ratio

MODES = {
    "step": "one training step",
    "step-checkpoint": "one training step with gradient checkpointing",
    "step-compile": "one training step under torch.compile",
    "step-graph": "one training step, captured on a GPU",
    "decode": "the next token of each sample, no cache of earlier ones, captured on a GPU",
}
CHECKED_LAYERS = 2  # of a model, which its gate looks at


def compare_models(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    names: Sequence[str] = (),
    mode: str = "step",
    suite: str = "model",
    settings: Settings | None = None,
    samples: dict[str, list[float]] | None = None,
    run: Run | None = None,
) -> list[Record]:
    """Measures variants (all, unless named) of a model against the frozen one. `mode`: a key of MODES; `samples` and
    `run` as in `comparison.compare`. What the gate says of a variant, it says of the model's first layers."""
    settings = settings or Settings(seconds=6.0, max_rounds=20)
    base, ids, embedded = _material(size, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    # What the gate looks at: the first layers of the model, on which the kernels have the same shapes.
    checked = dataclasses.replace(size, layers=min(size.layers, CHECKED_LAYERS), vocab=min(size.vocab, 1024))
    small = _material(checked, dtype, device)
    every = variants(size)
    records: dict[str, Record] = {}
    trainees: dict[str, Trainee] = {}
    steps: dict[str, Step] = {}

    def keep() -> None:
        if run is not None:
            run.put(records.values())

    def fill(measured: dict[str, list[float]]) -> None:
        for name, ms in measured.items():
            stats = Stats.of(ms)
            records[name]["ms"] = stats.json()
            records[name]["ratio"] = ratio(ms, measured["frozen"]).json()
            records[name]["tokens_per_s"] = round(size.batch * size.sequence / stats.median * 1e3, 1)
            if samples is not None:
                samples[name] = ms
        keep()

    chosen: Iterable[str] = dict.fromkeys(["frozen", *(names or every)])
    for name in chosen if run is None else run.paced(chosen, settings.seconds):
        variant = every[name]
        record = records[name] = {
            "suite": suite,
            "mode": mode,
            "contender": name,
            "kind": variant.kind,
            "method": variant.method,
            "model": dataclasses.asdict(size),
            "r": variant.r,
            "dtype": DTYPE_NAMES[dtype],
        }
        try:
            verdict = None
            if settings.gate and variant.kind == "genft":
                verdict = Trainee(variant, small[0], small[2], small[1], mode).check()
                record["gate"] = {**verdict.json(), "layers": checked.layers}
            if verdict is not None and not verdict.ok:
                record["withheld"] = f"gate: {verdict}"
            else:
                trainee = Trainee(variant, base, embedded, ids, mode)
                step = trainee.timed()
                step(0)
                trainees[name], steps[name] = trainee, step
        except Exception as error:
            record["withheld"] = f"{type(error).__name__}: {error}"[:300]
        keep()
    limits = {"min_rounds": settings.min_rounds, "max_rounds": settings.max_rounds, "warmup": settings.warmup}
    interleave(steps, clock_for(device), seconds=settings.seconds, each=fill, **limits)
    if settings.memory and mode in ("step", "step-checkpoint"):
        for name, trainee in trainees.items():
            records[name]["memory"] = trainee.memory(weights)
            keep()
    return list(records.values())


def _material(
    size: Size, dtype: torch.dtype, device: torch.device
) -> tuple[LlamaForCausalLM, list[Tensor], list[Tensor]]:
    """A frozen model, tokens for two steps, and their embeddings."""
    base = build_base(size, dtype, device)
    generator = torch.Generator(device).manual_seed(2)
    ids = [torch.randint(size.vocab, (size.batch, size.sequence), device=device, generator=generator) for _ in range(2)]
    return base, ids, [base.get_input_embeddings()(i) for i in ids]


# ---- goal P10: swapping layers in, saving the adapter


def _hollow(size: Size) -> LlamaForCausalLM:
    """The model's modules with weights of full shape and no memory: every element is the same one."""
    with torch.device("meta"):
        model = LlamaForCausalLM(size.config())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    return model


def swap(size: Size, repeats: int = 3) -> list[Record]:
    """Seconds to adapt all seven projections of every layer and to save the adapter, ours and peft LoRA's."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    r = 16
    entrants = [("peft-lora", "peer", "lora", lambda: peft.LoraConfig(r=r, target_modules=targets))]
    entrants += [
        (f"genft-{method.name}", "genft", method.name, config_of(method, r, targets))
        for method in METHODS
        if hasattr(genft_modules, method.config)
    ]
    records = []
    for name, kind, method_name, make in entrants:
        record: Record = {"suite": "swap", "mode": "swap", "contender": name, "kind": kind, "method": method_name}
        record |= {"model": dataclasses.asdict(size), "layers": 7 * size.layers, "r": r, "dtype": "fp32"}
        swaps, saves = [], []
        try:
            for _ in range(repeats):
                model = _hollow(size)
                with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
                    warnings.simplefilter("ignore")
                    start = time.perf_counter()
                    adapted = peft.get_peft_model(model, make())
                    swapped = time.perf_counter()
                    adapted.save_pretrained(folder, save_embedding_layers=False)
                    saves.append((time.perf_counter() - swapped) * 1e3)
                    swaps.append((swapped - start) * 1e3)
            record |= {"ms": Stats.of(swaps).json(), "save_ms": Stats.of(saves).json()}
        except Exception as error:
            record["withheld"] = f"{type(error).__name__}: {error}"[:300]
        records.append(record)
    return records
