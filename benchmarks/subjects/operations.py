"""The hardware gate's list of checks over the operations of genft_kernels.formulas."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import genft_kernels
from benchmarks.measure.shapes import DTYPES
from genft_kernels import gate
from genft_kernels.formulas import OPERATIONS, Examination, Tensors, draw
from genft_kernels.plan import (
    ALGORITHMS_OF,
    GENERATED,
    LIBRARY,
    PRODUCT_DEFAULTS,
    SINGLE_RANK,
    SQUARES,
    DeviceFacts,
    LaunchPlan,
    Problem,
    default_candidates,
    default_plan,
    device_facts,
)
from genft_kernels.tuning import candidates


@dataclass(frozen=True)
class Check:
    """One set-up of the gate; a value that travels to a worker process."""

    operation: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    algorithm: str = "auto"
    layout: str = "plain"  # "transposed", "strided", "expanded"
    wide: bool = False  # float32 factors
    bias: bool = True
    options: int = 0

    def __str__(self) -> str:
        words = [self.operation, f"{self.m}x{self.n}x{self.k}", f"r{self.r}", self.dtype, self.algorithm]
        if self.layout != "plain":
            words.append(self.layout)
        words += ["fp32 factors"] * self.wide + ["no bias"] * (not self.bias)
        return " ".join(words + [f"{k}={v}" for k, v in OPERATIONS[self.operation].options[self.options].items()])


def drawn(check: Check, device: torch.device) -> tuple[Tensors, Tensor]:
    """The operation's tensors for a check, and the output's cotangent."""
    sizes = (check.m, check.n, check.k, check.r)
    how = {"layout": check.layout, "wide": check.wide, "bias": check.bias}
    return draw(OPERATIONS[check.operation], sizes, DTYPES[check.dtype], device, **how)


# ---- the hardware gate

SHAPES = (
    (64, 64, 64, 16),
    (1, 16, 16, 1),
    (3, 7, 5, 2),
    (17, 33, 65, 5),
    (127, 131, 129, 13),
    (0, 32, 48, 4),
    (300, 257, 511, 64),
    (200, 1000, 1016, 37),
    (1024, 768, 768, 128),
    (9001, 264, 520, 64),  # a program owns several row blocks: here two equal runs are the test for races
    (20011, 520, 272, 16),
    (33, 64, 96, 144),  # past the widest rank that the kernels take
)
VARIANT_SHAPE = (97, 80, 144, 12)
TINY_SHAPES = ((17, 33, 35, 5), (1, 16, 16, 1), (0, 32, 48, 4))


def forced(problem: Problem, facts: DeviceFacts, algorithm: str) -> LaunchPlan | None:
    """The plan with this algorithm and the default tables' blocks; None where they have none, as past some rank."""
    if algorithm in LIBRARY:
        return LaunchPlan(algorithm)
    if problem.operation in (*GENERATED, SQUARES):
        chosen = default_plan(problem, facts)
        return None if chosen.algorithm in LIBRARY else replace(chosen, algorithm=algorithm)
    skinny = default_candidates(problem, facts)[0]
    if skinny.algorithm in LIBRARY:
        return None
    if algorithm == "fused":
        return replace(skinny, algorithm="fused", product=PRODUCT_DEFAULTS[problem.itemsize])
    if algorithm == "single":
        if problem.itemsize != 2 or problem.r > SINGLE_RANK:
            return None
        return next(plan for plan in candidates(problem, facts) if plan.algorithm == "single")
    return skinny


def checks(dtypes: tuple[str, ...], *, tiny: bool = False) -> list[Check]:
    """The gate's list: every operation, algorithm and dtype on every shape; every variant on one odd shape."""
    found = []
    for operation in OPERATIONS.values():
        for algorithm, dtype in itertools.product(("library", *ALGORITHMS_OF[operation.called], "auto"), dtypes):
            for shape in TINY_SHAPES if tiny else SHAPES:
                found.append(Check(operation.name, *shape, dtype, algorithm))
            base = Check(operation.name, *(TINY_SHAPES[0] if tiny else VARIANT_SHAPE), dtype, algorithm)
            if algorithm == "auto" and tiny:
                continue
            found += [replace(base, layout=layout) for layout in ("transposed", "strided", "expanded")]
            found += [replace(base, bias=False)]
            found += [replace(base, options=index) for index in range(1, len(operation.options))]
            if dtype != "fp32" and operation.factors:
                found.append(replace(base, wide=True))
    return [check for check in found if check.algorithm == "auto" or plan_of(check, DeviceFacts()) is not None]


def plan_of(check: Check, facts: DeviceFacts) -> LaunchPlan | None:
    """None for "auto", and where there are no blocks to force."""
    sizes = (check.m, check.n, check.k, check.r, DTYPES[check.dtype].itemsize)
    problem = OPERATIONS[check.operation].sizes(*sizes)
    return None if check.algorithm == "auto" else forced(problem, facts, check.algorithm)


def run_check(check: Check, device: torch.device) -> dict[str, Any]:
    """Gate of one set-up: outputs and gradients by the rule, and bit-equal when run again. {"ok", "what", ...}"""
    operation = OPERATIONS[check.operation]
    examination = Examination(operation, *drawn(check, device), operation.options[check.options], DTYPES[check.dtype])
    plan = plan_of(check, device_facts(device))
    how: dict[str, Any] = {"backend": "auto"} if plan is None else {"plan": plan}
    try:
        with gate.poisoned():
            got = examination.results(**how)
            unequal = gate.differing(got, lambda: examination.results(**how))
        verdict = examination.verdict(got)
    except Exception as error:
        return {"what": str(check), "ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
    result = {"what": str(check), **verdict.json()}
    if unequal:
        result |= {"ok": False, "error": f"not bit-equal in two runs: {', '.join(unequal)}"}
    return result


def large_offset_check(device: torch.device) -> dict[str, Any]:
    """x with more than 2³¹ elements: the last rows of y and dX must be right."""
    m, n, k, r = (1 << 31) // 4096 + 1000, 64, 4096, 16
    tail = slice(m - 512, m)
    draw_one = torch.Generator(device).manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=draw_one, dtype=torch.bfloat16)

    x, weight, dy = random(m, k).requires_grad_(), random(n, k) / 64, random(m, n)
    psi, phi = ((random(r, k) / 64).requires_grad_() for _ in range(2))

    def run(x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, dy: Tensor, function: Any) -> Tensors:
        return gate.gradients([function(x, weight, psi, phi)], {"x": x}, [dy])

    def plain(x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        return F.linear(x + (x @ psi.t()) @ phi, weight)

    got = {name: t[tail] for name, t in run(x, weight, psi, phi, dy, genft_kernels.input_edit_linear).items()}
    cut = [x.detach()[tail].requires_grad_(), weight, psi, phi, dy[tail]]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in cut]
    verdict = gate.judge(got, run(*wide, plain), run(*cut, plain), torch.bfloat16)
    return {"what": f"input_edit_linear {m}x{n}x{k} r{r} bf16, offsets past 2^31", **verdict.json()}
