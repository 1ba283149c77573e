"""The correctness gate: an implementation is timed only after it passes a check on the same device in the same run.

The rule: err(tested, float64 truth) ≤ 2·err(plain torch at that dtype, float64 truth) + ε, for the output and every
gradient, in the relative Euclidean norm and in the maximum error relative to the maximum value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# About the rounding error of one stored result. The tests use the same table, without exceptions.
EPSILON = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Whether all tensors are within budget; the worst tensor, its error and budget, and the error of plain torch."""

    ok: bool
    worst: str
    error: float
    budget: float
    own: float

    def __str__(self) -> str:
        return f"{self.worst}: error {self.error:.2e}, torch's own {self.own:.2e}, budget {self.budget:.2e}"

    def json(self) -> dict[str, Any]:
        return asdict(self)


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative Euclidean error, and maximum error relative to the maximum value. Inf if the truth is 0 and `got` is
    not, or if `got` is not finite or has the wrong shape."""
    if got.shape != truth.shape:
        return float("inf"), float("inf")
    if not truth.numel():
        return 0.0, 0.0
    difference = got.double() - truth
    pairs = ((difference.norm(), truth.norm()), (difference.abs().max(), truth.abs().max()))
    found = [float(d) / float(t) if float(t) else (0.0 if float(d) == 0.0 else float("inf")) for d, t in pairs]
    return tuple(e if e == e else float("inf") for e in found)  # type: ignore[return-value]


def judge(got: Tensors, truth: Tensors, torch_own: Tensors, dtype: torch.dtype, *, pooled: bool = False) -> Verdict:
    """Apply the rule to named tensors, with the same names in all three.

    `pooled` compares root mean squares over all tensors. It is for whole methods whose σ has a kink: if rounding moves
    a pre-activation across it, σ' jumps, at different elements in torch and in the tested implementation, so the error
    of a single tensor is random. Single operations are checked per tensor.
    """
    if not set(got) == set(truth) == set(torch_own):
        return Verdict(False, f"names {sorted(got)} against {sorted(truth)}", float("inf"), 0.0, 0.0)
    pairs = [
        (name, *pair)
        for name, exact in truth.items()
        for pair in zip(errors(got[name], exact), errors(torch_own[name], exact), strict=True)
    ]
    if pooled:
        error, own = (math.hypot(*side) / len(pairs) ** 0.5 for side in zip(*(p[1:] for p in pairs), strict=True))
        pairs = [("all tensors", error, own)]
    verdicts = []
    for name, error, own in pairs:
        budget = 2 * own + EPSILON[dtype]
        verdicts.append(Verdict(error <= budget, name, error, budget, own))
    return max(verdicts, key=lambda v: (not v.ok, v.error / v.budget))


def gradients(outputs: Sequence[Tensor], inputs: Tensors, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name, for the loss Σ outputs · cotangents; only outputs if there are no inputs."""
    grads = torch.autograd.grad(outputs, list(inputs.values()), list(cotangents)) if inputs else ()
    named = {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {f"y{i}" if i else "y": out.detach() for i, out in enumerate(outputs)} | named


@contextmanager
def poisoned() -> Iterator[None]:
    """Context in which torch fills uninitialised memory with NaN, to detect elements that a kernel does not write."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        settings.fill_uninitialized_memory = fill


def differing(found: Tensors, run: Callable[[], Tensors]) -> list[str]:
    """Names of the tensors that differ in any bit from those of another run."""
    again = run()
    return [name for name, tensor in found.items() if not torch.equal(tensor, again[name])]
