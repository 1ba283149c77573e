"""A Llama-shaped model with random weights, and the ways to train it: the frozen one, peers, every method of ours."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import genft_modules
from benchmarks.measure import memory
from benchmarks.measure.timing import captured
from benchmarks.subjects.contenders import METHODS, Method
from benchmarks.subjects.layers import wake
from genft_kernels.gate import Verdict, judge
from genft_kernels.timing import Step


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


def config_of(method: Method, r: int, targets: Sequence[str]) -> Callable[[], Any]:
    """Makes the method's configuration at rank r."""
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
            adapt = _adapter(config_of(method, r, targets))
            found.append(Variant(f"genft-{method.name}", "genft", method.name, r, adapt, method.naive.kinked))
    found.append(Variant("one-block-full", "floor", "full", 0, _one_block))
    return {variant.name: variant for variant in found}


# ---- a variant's step

# Where a model's truth is computed: float64 would take longer than what it judges.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


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
