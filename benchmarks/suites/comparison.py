"""One comparison: contenders on one case, set up once for gate, time and memory, measured in one interleaved run."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import memory
from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import DTYPE_NAMES, Case
from benchmarks.measure.timing import cache_bytes, captured
from benchmarks.subjects.contenders import CONTENDERS, Contender, trainable
from genft_kernels.gate import Verdict, gradients, judge, poisoned
from genft_kernels.timing import Clock, Stats, Step, WallClock, clock_for, interleave, ratio

MODES = {
    "forward": "forward pass in training",
    "step": "forward and backward",
    "decode": "forward pass in eval mode without gradient, captured on a GPU",
    "call": "host time of one call, device not waited for",
    "call-eval": "the same in eval mode without gradient",
}


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


@dataclass
class Settings:
    """How long a comparison may take, and what is measured beside time."""

    seconds: float = 2.0
    min_rounds: int = 5
    max_rounds: int = 40
    warmup: int = 2
    gate: bool = True
    memory: bool = True
    calls: int = 50  # that are timed as one where a single call is too short


def compare(
    case: Case,
    names: Sequence[str],
    mode: str = "step",
    suite: str = "layer",
    settings: Settings | None = None,
    ceilings: dict[str, Any] | None = None,
    samples: dict[str, list[float]] | None = None,
    run: Run | None = None,
) -> list[Record]:
    """Measures the contenders against each other; the frozen layer is always among them.

    A contender that cannot be built or is not right has a record without a time, and the reason in "withheld". All are
    set up one after the other, then timed in turns, then their memory is measured.

    Args:
        case, names, mode: what is measured; `mode` is a key of `MODES`.
        suite: label in the records.
        ceilings: of `timing.ceilings`, for the percentage of the product's ceiling.
        samples: filled with the milliseconds of each round, if given.
        run: whose file gets what is measured when it is measured, and whose time is kept to.
    """
    settings = settings or Settings()
    gpu = case.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    replicas = 1
    if mode == "decode":
        # Weights are what decoding reads: enough layers that they do not stay in the cache.
        weight_bytes = case.shape.weight_elements * case.itemsize
        replicas = max(2, min(32, math.ceil(2 * cache_bytes(case.device) / weight_bytes)))
    inputs = Inputs(case, replicas=replicas)
    if any(CONTENDERS[name].compiled for name in names):
        torch._dynamo.reset()  # an earlier comparison's graphs count towards dynamo's limit
    records: dict[str, Record] = {}
    subjects: dict[str, Subject] = {}
    steps: dict[str, Step] = {}

    def keep() -> None:
        if run is not None:
            run.put(records.values())

    def fill(measured: dict[str, list[float]]) -> None:
        floor = [value / replicas for value in measured.get("frozen", ())]
        for name, ms in measured.items():
            ms = [value / replicas for value in ms]
            if samples is not None:
                samples[name] = ms
            _fill(records[name], case, mode, ms, floor, ceilings)
        keep()

    chosen: Iterable[str] = dict.fromkeys(["frozen", *names])
    for name in chosen if run is None else run.paced(chosen, settings.seconds):
        records[name] = describe(suite, mode, case, CONTENDERS[name])
        ready = _set_up(records[name], CONTENDERS[name], inputs, mode, settings)
        if isinstance(ready, str):
            records[name]["withheld"] = ready
        else:
            subjects[name], steps[name] = ready
        keep()
    clock: Clock = WallClock(case.device, calls=settings.calls) if "call" in mode else clock_for(case.device)
    interleave(
        steps,
        clock,
        seconds=settings.seconds,
        min_rounds=settings.min_rounds,
        max_rounds=settings.max_rounds,
        warmup=settings.warmup,
        each=fill,
    )
    if settings.memory and mode == "step":
        for name, subject in subjects.items():
            records[name]["memory"] = subject.memory()
            keep()
    return list(records.values())


def _set_up(
    record: Record, contender: Contender, inputs: Inputs, mode: str, settings: Settings
) -> tuple[Subject, Step] | str:
    """A contender behind its gate, and its step, run once; or why it has no time."""
    missing = contender.missing(inputs.case.device)
    if missing:
        return missing
    try:
        subject = Subject(contender, inputs, mode)
        if settings.gate:
            verdict = subject.check()
            record["gate"] = verdict.json()
            if not verdict.ok:
                return f"gate: {verdict}"
        step = subject.timed()
        step(0)
    except Exception as error:  # one contender's failure is a result, not the end of the run
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return subject, step


def describe(suite: str, mode: str, case: Case, contender: Contender) -> Record:
    """A record that says what is measured, and nothing of it yet."""
    record: Record = {
        "suite": suite,
        "mode": mode,
        "contender": contender.name,
        "kind": contender.kind,
        "method": contender.method,
        "form": contender.form,
        "compiled": contender.compiled,
        "m": case.shape.m,
        "n": list(case.shape.n),
        "k": case.shape.k,
        "r": case.r,
        "dtype": DTYPE_NAMES[case.dtype],
    }
    plan = None if contender.missing(case.device) else contender.plan(case)
    if plan is not None:
        record["operation"] = contender.operation
        record["algorithm"] = plan.algorithm
        record["plan"] = str(plan)
    return record


def _fill(
    record: Record, case: Case, mode: str, ms: list[float], floor: list[float], ceilings: dict[str, Any] | None
) -> None:
    stats = Stats.of(ms)
    record["ms"] = stats.json()
    if floor:
        record["ratio"] = ratio(ms, floor).json()
    record["floor_operations"] = case.shape.operations(record["form"], mode)
    record["floor_bytes"] = case.shape.bytes(record["form"], mode, case.itemsize)
    record["tflops"] = round(record["floor_operations"] / stats.median / 1e9, 4)
    product = (ceilings or {}).get("product_tflops", {}).get(str(case.dtype).removeprefix("torch."))
    if product and "call" not in mode:
        record["percent_of_product"] = round(100 * record["tflops"] / product, 2)
