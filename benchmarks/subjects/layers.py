"""A contender set up on a case: its layers on frozen weights, its steps, its gate."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import memory
from benchmarks.measure.shapes import Case
from benchmarks.measure.timing import cache_bytes, captured
from benchmarks.subjects.contenders import Contender, trainable
from genft_kernels.gate import Verdict, gradients, judge, poisoned
from genft_kernels.timing import Step


class Layers(nn.Module):
    """Layers that share one input."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def wake(module: nn.Module, generator: torch.Generator) -> None:
    """Draws the parameters that start at zero: an update of zero would hide mistakes and be timed on zeros."""
    for parameter in module.parameters():
        if parameter.requires_grad and not parameter.any():
            values = torch.empty_like(parameter, dtype=torch.float32).normal_(generator=generator)
            parameter.data.copy_(values * parameter.shape[-1] ** -0.5)


def frozen(weight: Tensor) -> nn.Linear:
    """An `nn.Linear` on this weight, which is not copied."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


class Inputs:
    """What every contender of a comparison is given: the frozen layers, and inputs that do not fit the cache."""

    def __init__(self, case: Case, *, replicas: int = 1, sets: int | None = None) -> None:
        shape = case.shape
        self.case = case
        self.generator = torch.Generator(case.device).manual_seed(0)
        if sets is None:
            row_bytes = case.itemsize * shape.m * (shape.k + sum(shape.n))
            sets = max(2, min(8, math.ceil(2 * cache_bytes(case.device) / row_bytes)))
        weights = [[self._random(n, shape.k) * shape.k**-0.5 for n in shape.n] for _ in range(replicas)]
        self.linears = [[frozen(weight) for weight in group] for group in weights]
        self.x = [self._random(shape.m, shape.k).requires_grad_() for _ in range(sets)]
        self.dy = [[self._random(shape.m, n) for n in shape.n] for _ in range(sets)]

    def _random(self, *size: int) -> Tensor:
        values = torch.randn(size, device=self.case.device, generator=self.generator)
        return values.to(self.case.dtype)


class Subject:
    """A contender set up on a case: its layers, and its steps."""

    def __init__(self, contender: Contender, inputs: Inputs, mode: str) -> None:
        self.contender, self.inputs, self.case, self.mode = contender, inputs, inputs.case, mode
        self.replicas = []
        for linears in inputs.linears:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peers' advice on target names and the like
                # A peer may freeze or register what it is given: it gets a layer of its own on the same weight.
                layers = Layers(contender.build(frozen(linear.weight), self.case) for linear in linears)
            wake(layers, inputs.generator)
            self.replicas.append(layers.train(mode not in ("decode", "call-eval")))
        self.layers = self.replicas[0]
        self.parameters = [p for layer in self.layers.layers for p in trainable(layer).values()]
        self.call: Callable[[Tensor], tuple[Tensor, ...]] = self.layers
        if contender.compiled:
            self.call = torch.compile(self.layers, dynamic=False)

    def forward(self, index: int) -> tuple[Tensor, ...]:
        return self.call(self.inputs.x[index % len(self.inputs.x)])

    def step(self, index: int) -> tuple[Tensor, ...]:
        index %= len(self.inputs.x)
        x = self.inputs.x[index]
        return torch.autograd.grad(self.call(x), [x, *self.parameters], self.inputs.dy[index])

    def decode(self, index: int) -> None:
        x = self.inputs.x[index % len(self.inputs.x)]
        with torch.no_grad():
            for layers in self.replicas:
                layers(x)

    def evaluate(self, index: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.forward(index)

    def timed(self) -> Step:
        if self.mode == "decode":
            return captured(self.decode, self.case.device)
        steps = {"forward": self.forward, "step": self.step, "call": self.forward, "call-eval": self.evaluate}
        return steps[self.mode]

    def check(self) -> Verdict:
        """The gate at the full shape, on the first input: y, dX and every parameter's gradient."""
        x, dy = self.inputs.x[0], self.inputs.dy[0]

        def run(call: Callable[[Tensor], Sequence[Tensor]], layers: Sequence[nn.Module], dtype: torch.dtype) -> Any:
            own = x.detach().to(dtype).requires_grad_()
            named = {f"{i}.{name}": p for i, layer in enumerate(layers) for name, p in sorted(trainable(layer).items())}
            return gradients(call(own), {"x": own, **named}, [d.to(dtype) for d in dy])

        twins = []
        for layer, linear in zip(self.layers.layers, self.inputs.linears[0], strict=True):
            twin = self.contender.twin
            twins.append(copy.deepcopy(layer) if twin is None else twin(layer, linear, self.case))
        own = run(Layers(twins), twins, self.case.dtype)
        truth = run(Layers(twins).double(), twins, torch.float64)
        # torch.compile would compile once more for the deterministic mode that fills memory.
        with nullcontext() if self.contender.compiled else poisoned():
            got = run(self.call, list(self.layers.layers), self.case.dtype)
        if self.contender.kind == "genft":  # a kernel-level layer keeps its parameters in `own`
            got = {name.replace(".own.", "."): tensor for name, tensor in got.items()}
        return judge(got, truth, own, self.case.dtype, pooled=self.contender.kinked)

    def memory(self) -> dict[str, int]:
        known = [*self.inputs.x, *(p for layer in self.layers.layers for p in layer.parameters())]
        known += [b for layer in self.layers.layers for b in layer.buffers()]
        known += [linear.weight for linears in self.inputs.linears for linear in linears]
        return {
            "saved": memory.saved_bytes(lambda: self.forward(0), known),
            "peak": memory.peak_bytes(lambda: self.step(0), self.case.device),
            **memory.state_bytes(self.parameters),
        }
