"""The hardware gate's list of checks over the operations of genft_kernels.formulas, and the plans worth measuring."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import genft_kernels
from genft_kernels import gate
from genft_kernels.formulas import OPERATIONS, Examination, Operation, Tensors, draw
from genft_kernels.plan import (
    ContractPlan,
    DeviceFacts,
    LaunchPlan,
    Problem,
    ProductPlan,
    SkinnyPlan,
    default_plan,
    device_facts,
)

from .shapes import DTYPES


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
    (33, 64, 96, 144),  # past the widest rank that the kernels take
)
VARIANT_SHAPE = (97, 80, 144, 12)
TINY_SHAPES = ((17, 33, 35, 5), (1, 16, 16, 1), (0, 32, 48, 4))


def checks(dtypes: tuple[str, ...], *, tiny: bool = False) -> list[Check]:
    """The gate's list: every operation, algorithm and dtype on every shape; every variant on one odd shape."""
    found = []
    for operation in OPERATIONS.values():
        for algorithm, dtype in itertools.product((*operation.algorithms, "auto"), dtypes):
            for shape in TINY_SHAPES if tiny else SHAPES:
                problem = operation.sizes(*shape, DTYPES[dtype].itemsize)
                # Past some rank the default is the library's product, and there are no blocks to force.
                if algorithm == "auto" or default_plan(problem, DeviceFacts()).algorithm != "reference":
                    found.append(Check(operation.name, *shape, dtype, algorithm))
            base = Check(operation.name, *(TINY_SHAPES[0] if tiny else VARIANT_SHAPE), dtype, algorithm)
            if algorithm == "auto" and tiny:
                continue
            found += [replace(base, layout=layout) for layout in ("transposed", "strided", "expanded")]
            found += [replace(base, bias=False)]
            found += [replace(base, options=index) for index in range(1, len(operation.options))]
            if dtype != "fp32" and operation.factors:
                found.append(replace(base, wide=True))
    return found


def forced_plan(check: Check, device: torch.device) -> LaunchPlan | None:
    if check.algorithm == "auto":
        return None
    itemsize = DTYPES[check.dtype].itemsize
    problem = OPERATIONS[check.operation].sizes(check.m, check.n, check.k, check.r, itemsize)
    return replace(default_plan(problem, device_facts(device)), algorithm=check.algorithm)


def run_check(
    check: Check, device: torch.device, plan: LaunchPlan | None = None, repeat: bool = True
) -> dict[str, Any]:
    """Gate of one set-up: outputs and gradients by the rule, and bit-equal when run again. {"ok", "what", ...}"""
    operation = OPERATIONS[check.operation]
    examination = Examination(operation, *drawn(check, device), operation.options[check.options], DTYPES[check.dtype])
    plan = plan or forced_plan(check, device)
    how: dict[str, Any] = {"backend": "auto"} if plan is None else {"plan": plan}
    try:
        with gate.poisoned():
            got = examination.results(**how)
            unequal = gate.differing(lambda: examination.results(**how)) if repeat else []
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


# ---- plans worth measuring

# Blocks m, n, k, group, warps, stages of a fused product.
PRODUCTS = (
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 128, 32, 8, 8, 3),
    (128, 256, 64, 8, 8, 3),
    (256, 128, 64, 8, 8, 3),
    (128, 128, 128, 8, 8, 2),
    (64, 128, 64, 8, 4, 4),
    (64, 64, 64, 8, 4, 4),
    (16, 128, 128, 8, 4, 4),
)


def candidates(problem: Problem, operation: Operation, facts: DeviceFacts) -> list[LaunchPlan]:
    """Plans to measure for a problem, the default first; duplicates left out. Those that the card cannot run (shared
    memory, registers) fail or lose; they are not guessed here."""
    default = default_plan(problem, facts)
    half = 2 if problem.itemsize >= 4 else 1
    found = [default, LaunchPlan("reference")]
    if operation.form == "generated" or operation.name == "generated_features":
        found += _generated_candidates(default, operation, facts, half)
    elif operation.algorithms == ("fused",):
        found += _product_candidates(default, half)
    else:
        found += _low_rank_candidates(default, operation, problem.m, facts, half)
    return list(dict.fromkeys(plan for plan in found if plan.algorithm in (*operation.algorithms, "reference")))


def _low_rank_candidates(
    default: LaunchPlan, operation: Operation, m: int, facts: DeviceFacts, half: int
) -> list[LaunchPlan]:
    found = []
    for rows, columns, warps, stages in (
        (32, 128, 4, 3),
        (64, 32, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (64, 256, 8, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (16, 256, 4, 3),
        (32, 256, 4, 2),
    ):
        for per_processor in (1, 2):
            groups = max(1, min(per_processor * facts.processors, -(-m // rows)))
            skinny = SkinnyPlan(max(16, rows // half), max(32, columns // half), groups, warps, stages)
            found.append(replace(default, algorithm="thin", skinny=skinny))
    return found + (_product_candidates(default, half) if "fused" in operation.algorithms else [])


def _product_candidates(default: LaunchPlan, half: int) -> list[LaunchPlan]:
    """Blocks of the fused product."""
    return [
        replace(
            default,
            algorithm="fused",
            product=ProductPlan(max(16, m // half), max(16, n // half), max(16, k // half), group, warps, stages),
        )
        for m, n, k, group, warps, stages in PRODUCTS
    ]


def _generated_candidates(default: LaunchPlan, operation: Operation, facts: DeviceFacts, half: int) -> list[LaunchPlan]:
    """Panel sizes against the L2, blocks of the passes over the generated matrix, blocks of the fused product."""
    found = []
    contracts = [
        ContractPlan(n // half, k // half, depth, groups * facts.processors, warps, stages, atomic)
        for n, k, depth, groups, warps, stages, atomic in (
            (64, 64, 32, 1, 8, 2, False),
            (64, 64, 64, 1, 4, 3, False),
            (64, 128, 64, 1, 8, 3, False),
            (128, 64, 64, 1, 8, 3, False),
            (128, 128, 64, 1, 8, 3, False),
            (128, 128, 32, 1, 8, 4, False),
            (64, 64, 64, 2, 4, 3, False),
            (128, 128, 64, 2, 8, 3, False),
        )
    ]
    for algorithm in operation.algorithms:
        found += [replace(default, algorithm=algorithm, contract=contract) for contract in contracts]
    if "panel" in operation.algorithms:
        for panel in (1 << 19, 1 << 21, 1 << 22, 1 << 23):
            contract = replace(default.contract, panel=panel)
            found.append(replace(default, algorithm="panel", contract=contract))
        found += _product_candidates(default, half)
    return found
