"""A whole training step, or decoding step, of a Llama-shaped model with random weights: time, tokens per second, memory
(goals P6, P10).

All variants of a comparison stand on the same frozen weights, side by side, so that one run measures them interleaved.
Every variant gets embeddings that require a gradient, as with gradient checkpointing: then the frozen model, the floor,
makes the same gradients of activations as the adapted ones.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import genft_modules
from benchmarks.measure import memory
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES
from benchmarks.measure.timing import captured
from benchmarks.subjects.contenders import METHODS, Method
from benchmarks.suites.comparison import Settings, wake
from genft_kernels.gate import Verdict, judge
from genft_kernels.timing import Stats, Step, clock_for, interleave, ratio


@dataclass(frozen=True)
class Size:
    """A Llama's sizes, and the batch of tokens of a step."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    sequence: int
    batch: int = 1

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=max(self.sequence, 64),
            use_cache=False,
            tie_word_embeddings=False,
        )


LLAMA3_8B = Size("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, 2048)
LLAMA3_BLOCK = dataclasses.replace(LLAMA3_8B, name="llama-3-8b-block", layers=1, vocab=256, batch=4)
CPU_BLOCK = Size("block", 1, 768, 2048, 12, 4, 256, 512)
CPU_MODEL = Size("small", 4, 512, 1408, 8, 4, 1024, 256)
TINY = Size("tiny", 2, 32, 48, 4, 2, 64, 16)


def build_base(size: Size, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The frozen model, its random weights made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(size.config())
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


# ---- variants

Adapt = Callable[[nn.Module], nn.Module]
LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Variant:
    """A way to train the model."""

    name: str
    kind: str
    method: str
    r: int
    adapt: Adapt
    kinked: bool = False  # an activation of the method has a kink, see `gate.judge`


def _adapter(config: Callable[[], Any]) -> Adapt:
    return lambda model: peft.get_peft_model(model, config(), autocast_adapter_dtype=False)


def _config(method: Method, r: int, targets: Sequence[str]) -> Callable[[], Any]:
    return lambda: getattr(genft_modules, method.config)(**method.fields(r), target_modules=list(targets))


def _peft_lora(r: int) -> Variant:
    return Variant(
        f"peft-lora-r{r}",
        "peer",
        "lora",
        r,
        _adapter(lambda: peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(LLM_TARGETS))),
    )


def _one_block(model: nn.Module) -> nn.Module:
    block = model.model.layers[-1]
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    return model


def variants(size: Size) -> dict[str, Variant]:
    """The floor, peers, and every method whose module exists, at the rank and on the layers of its paper."""
    rank = 64 if size.hidden >= 512 else 4
    found = [
        Variant("frozen", "floor", "none", 0, lambda model: model),
        _peft_lora(rank),
        *([_peft_lora(16)] if rank > 16 else []),
    ]
    for method in METHODS:
        if hasattr(genft_modules, method.config):
            targets, r = method.model
            r = min(r, rank)
            adapt = _adapter(_config(method, r, targets))
            found.append(Variant(f"genft-{method.name}", "genft", method.name, r, adapt, method.naive.kinked))
    found.append(Variant("one-block-full", "floor", "full", 0, _one_block))
    return {variant.name: variant for variant in found}


MODES = {
    "step": "one training step",
    "step-checkpoint": "one training step with gradient checkpointing",
    "step-compile": "one training step under torch.compile",
    "step-graph": "one training step, captured on a GPU",
    "decode": "the next token of each sample, no cache of earlier ones, captured on a GPU",
}


# Where a model's truth is computed: float64 would take longer than what it judges.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
CHECKED_LAYERS = 2


class Trainee:
    """A variant on the shared weights: its model, optimiser and step."""

    def __init__(self, variant: Variant, base: nn.Module, embedded: list[Tensor], labels: list[Tensor], mode: str):
        self.variant, self.embedded, self.labels = variant, embedded, labels
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = variant.adapt(copy.deepcopy(base, shared))
            if "checkpoint" in mode:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wake(self.model, torch.Generator(embedded[0].device).manual_seed(1))
        self.mode = mode
        self.model.train(mode != "decode")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        graph = mode == "step-graph" and embedded[0].is_cuda
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-6, capturable=graph) if self.parameters else None
        self.call: Callable[..., Any] = torch.compile(self.model) if "compile" in mode else self.model

    def loss(self, index: int) -> Tensor:
        index %= len(self.embedded)
        x = self.embedded[index].detach().requires_grad_()
        return self.call(inputs_embeds=x, labels=self.labels[index]).loss

    def step(self, index: int) -> None:
        self.loss(index).backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)

    def decode(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.call(inputs_embeds=self.embedded[index % len(self.embedded)]).logits  # type: ignore[no-any-return]

    def timed(self) -> Step:
        device = self.embedded[0].device
        if self.mode == "decode":
            return captured(self.decode, device)
        return captured(self.step, device) if self.mode == "step-graph" else self.step

    def outcome(self, backend: str) -> dict[str, Tensor]:
        """Loss and parameter gradients, or the logits of decoding, with every adapter of ours on this backend."""
        ours = [m for m in self.model.modules() if isinstance(m, genft_modules.FusedGenLinear)]
        generators = [g for layer in ours for g in layer.genft_generators.values()]
        before = [g.backend for g in generators]
        for g in generators:
            g.backend = backend
        try:
            if self.mode == "decode":
                return {"logits": self.decode(0)}
            loss = self.loss(0)
            loss.backward()
            found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            self.model.zero_grad(set_to_none=True)
            return {"loss": loss.detach(), **found}
        finally:
            for g, backend in zip(generators, before, strict=True):
                g.backend = backend

    def check(self) -> Verdict:
        """The gate: this path's error may be twice that of the reference operations at the same dtype, each against
        the reference operations in a wider dtype (`WIDER`)."""
        dtype = next(self.model.parameters()).dtype
        got, own = self.outcome("auto"), self.outcome("reference")
        exact = copy.copy(self)
        exact.model = exact.call = copy.deepcopy(self.model).to(WIDER[dtype])
        exact.embedded = [tensor.to(WIDER[dtype]) for tensor in self.embedded]
        truth = {name: tensor.double() for name, tensor in exact.outcome("reference").items()}
        return judge(got, truth, own, dtype, pooled=self.variant.kinked)

    def memory(self, weights: int) -> dict[str, int]:
        state = memory.state_bytes(self.parameters)
        self.step(0)  # the optimiser's state exists from now on
        step = memory.peak_bytes(lambda: self.step(1), self.embedded[0].device)
        return {"peak": weights + state["parameters"] + state["optimiser"] + step, "step": step, **state}


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
        (f"genft-{method.name}", "genft", method.name, _config(method, r, targets))
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
