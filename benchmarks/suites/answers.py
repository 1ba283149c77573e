"""Goal N1: how much of a small update the output of a bf16 layer answers to.

Early in training ΔW is far smaller than W0, and so is x ΔWᵀ than y. A layer that rounds x W0ᵀ to bf16 before it adds
the update loses the part that lies below the rounding. The gain is <y(ΔW) − y(0), true> / <true, true> with the true
answer x ΔWᵀ in float64; 1 is right. Of dX likewise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure.results import Record, Run
from benchmarks.measure.shapes import Case
from benchmarks.subjects.contenders import CONTENDERS, Contender, trainable
from benchmarks.subjects.layers import Inputs, frozen, wake
from benchmarks.suites.comparison import describe

RATIOS = (1e-3, 1e-4)  # of ‖ΔW‖ to ‖W0‖


def answers(case: Case, names: Sequence[str], run: Run) -> list[Record]:
    """The gains of each contender at each of `RATIOS`, in records without a time, written to the run's file."""
    inputs = Inputs(case, sets=1)
    records: list[Record] = []
    for name in run.paced(names):
        contender = CONTENDERS[name]
        record = describe("numerics", "answer", case, contender)
        records.append(record)
        missing = contender.missing(case.device)
        try:
            if missing:
                record["withheld"] = missing
            else:
                record["gains"] = _gains(contender, inputs)
        except Exception as error:
            record["withheld"] = f"{type(error).__name__}: {error}"[:300]
        run.put(records)
    return records


def _gains(contender: Contender, inputs: Inputs) -> dict[str, dict[str, float]]:
    """{"0.001": {"y": gain, "dx": gain}, ...}"""
    case, linear = inputs.case, inputs.linears[0][0]
    x, dy = inputs.x[0].detach(), inputs.dy[0][0]
    layer = contender.build(frozen(linear.weight), case)
    wake(layer, inputs.generator)
    base = linear.weight.detach()

    def exact(rows: int | None = None) -> tuple[Tensor, Tensor]:
        """The update's part of y and of dX, in float64."""
        twin = copy.deepcopy(layer) if contender.twin is None else contender.twin(layer, linear, case)
        y, dx = _pass(twin.double(), x[:rows].double(), dy[:rows].double())
        return y - x[:rows].double() @ base.double().t(), dx - dy[:rows].double() @ base.double()

    found = {}
    y0, dx0 = _pass(linear, x, dy)
    whole = (x[:64].double() @ base.double().t()).norm()
    for target in RATIOS:
        _shrink(layer, lambda: float(exact(64)[0].norm() / whole), target)
        y, dx = _pass(layer, x, dy)
        true_y, true_dx = exact()
        found[f"{target:g}"] = {"y": _gain(y, y0, true_y), "dx": _gain(dx, dx0, true_dx)}
    return found


def _pass(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def _gain(got: Tensor, without: Tensor, true: Tensor) -> float:
    return round(float(((got.double() - without.double()) * true).sum() / true.square().sum()), 4)


def _shrink(layer: nn.Module, measure: Callable[[], float], target: float) -> None:
    """Multiplies the layer's parameters until `measure()`, a polynomial of them, is at the target."""
    before, factor = measure(), 0.5
    for _ in range(12):
        with torch.no_grad():
            for parameter in trainable(layer).values():
                parameter.mul_(factor)
        now = measure()
        if abs(now / target - 1.0) < 0.05:
            return
        degree = max(0.5, math.log(now / before) / math.log(factor))
        before, factor = now, (target / now) ** (1.0 / degree)
    raise RuntimeError(f"the update could not be brought to {target:g} of W0, it is at {now:g}")
