"""Random calls of every operation against the float64 truth: shapes, dtypes, layouts, options, and which gradients are
asked for, on the reference and for a few on Triton. A case is determined by its number:

pytest --fuzz 10000 tests/kernels/test_fuzz.py                                  # cases 0 to 9999
pytest --fuzz 10000 "tests/kernels/test_fuzz.py::test_a_random_call[8123]"      # one of them
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

import genft_kernels as gk
from genft_kernels.activations import ACTIVATIONS
from tests.support.plans import PLANS, short
from tests.support.truth import ALGORITHMS, EPSILON, WITH_DROPOUT, Case, error, make_case, run, squared_gradient_sums

FEW = 100  # cases in an ordinary run
DRAWS = (8, 64)  # of the values of a case
ON_TRITON = 0.05  # share of the cases
SQUARES = "squared_gradient_sums"
ALL = {**ALGORITHMS, SQUARES: ("reference", "fused")}
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINKED = ("relu", "leakyrelu")
SMOOTH = [name for name in ACTIVATIONS if name not in KINKED]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--fuzz") or FEW))


@dataclass
class Call:
    """A random call without its values; `seed` is that of the layouts."""

    name: str
    algorithm: str
    lead: tuple[int, ...]
    n: int
    k: int
    r: int
    dtype: torch.dtype
    factors: torch.dtype
    options: dict[str, Any]
    seed: int

    @property
    def result(self) -> torch.dtype:
        if self.name == SQUARES:
            return torch.promote_types(self.dtype, torch.float32)
        return self.factors if self.name.endswith("features") else self.dtype

    def __str__(self) -> str:
        sizes = f"x {[*self.lead, self.k]}, N = {self.n}, r = {self.r}"
        return f"{self.name}: {self.algorithm}, {sizes}, {short(self.dtype)}, {short(self.factors)}, {self.options}"


def random_call(number: int) -> Call:
    choose = Random(number)
    name = choose.choice(list(ALL))
    algorithm, sizes, dtypes = "reference", SIZES, DTYPES
    if choose.random() < ON_TRITON:
        algorithm, sizes, dtypes = choose.choice(ALL[name][1:]), SIZES[:-3], DTYPES[:3]
    n, k, m = (choose.choice(sizes) for _ in range(3))
    lead = choose.choice([(), (0,), (1,), (m,), (m,), (3, m), (2, 0, 3), (2, 1, 5)])
    r = choose.choice([1, 1, 2, 3, 4, 7, 16])
    dtype = choose.choice(dtypes)
    factors = choose.choice([dtype, torch.float32])
    if name == "generated_features":
        dtype = factors
    options: dict[str, Any] = {}
    if name not in ("grouped_lowrank_linear", "generated_features", SQUARES):
        scale = "ratio" if name == "weight_features" else "scale"
        options[scale] = choose.choice([1, 1.0, 0.0, -0.5, 1e-3, choose.uniform(-2, 2)])
    if name in WITH_DROPOUT and choose.random() < 0.5:
        options["dropout"] = choose.choice([0.01, 0.3, 0.5, 0.9])
        options["seed"] = torch.tensor([choose.choice([0, -1, 2**62, choose.getrandbits(62)])])
    # In 16 bits, rounding moves pre-activations across a kink. `drawn` makes those of H Bᵀ exact.
    everywhere = SMOOTH if dtype.itemsize == 2 else list(ACTIVATIONS)
    if name.startswith("generated"):
        options["activation"] = choose.choice(list(ACTIVATIONS))
    if name == "weight_features":
        options["activation"] = choose.choice(everywhere)
    if name == "generated_features":
        options["inner_activation"] = choose.choice(everywhere)
    if name == SQUARES:
        options["orientation"] = choose.choice(["row", "column"])
    return Call(name, algorithm, lead, n, k, r, dtype, factors, options, choose.getrandbits(32))


def drawn(call: Call, device: torch.device) -> tuple[Case, Tensor]:
    """The call with random values, and a gradient of its result."""
    choose = Random(call.seed)
    if call.name == SQUARES:
        size = max(1, prod(call.lead)) ** -0.25  # float16 would overflow in plain torch
        shapes = {"dy": (*call.lead, call.n), "x": (*call.lead, call.k)}
        tensors = {name: size * torch.randn(shape, device=device) for name, shape in shapes.items()}
        tensors = {name: tensor.to(call.dtype) for name, tensor in tensors.items()}
        case = Case(gk.squared_gradient_sums, squared_gradient_sums, tensors)
    else:
        sizes = (call.lead, call.n, call.k, call.r)
        case = make_case(call.name, *sizes, call.dtype, device, factor_dtype=call.factors)
    options = {name: value.to(device) if name == "seed" else value for name, value in call.options.items()}
    tensors = dict(case.tensors)
    for name, tensor in tensors.items():
        optional = "bias" in name or (name == "weight" and call.name == "grouped_lowrank_linear")
        if (optional and choose.random() < 0.3) or (name == "bias" and tensors.get("weight", tensor) is None):
            tensors[name] = None
            continue
        value = tensor.detach()
        if options.get("activation") in KINKED and name in ("h", "b", "row_bias", "column_bias"):
            value = (2 * value).round().clamp(-3, 3) / 2  # sums of products of these have few digits
        needed = tensor.requires_grad and choose.random() < 0.7
        tensors[name] = laid_out(value, choose).requires_grad_(needed)
    case = replace(case, tensors=tensors, options={**case.options, **options})
    with torch.no_grad():
        y = case.operation(*tensors.values(), **case.options, backend="reference")
    return case, laid_out(torch.randn(y.shape, device=device).to(call.result), choose)


def laid_out(value: Tensor, choose: Random) -> Tensor:
    """`value` with random strides, in memory that is invalid elsewhere; or its first slice, expanded."""
    floats = value.is_floating_point()
    layout = choose.choice(["plain", "plain", "gaps", "offset", "turned", "expanded" if floats else "plain"])
    dim = choose.randrange(max(1, value.dim()))
    if layout == "plain" or value.numel() == 0:
        return value
    if layout == "expanded":
        return value.narrow(dim, 0, 1).expand_as(value)
    if layout == "turned":
        return value.transpose(dim, -1).contiguous().transpose(dim, -1)
    invalid = torch.nan if floats else 2**40
    if layout == "gaps":
        wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), invalid)
        return wide[..., 1::2].copy_(value)
    buffer = value.new_full((dim + 1 + value.numel(),), invalid)
    return buffer[dim + 1 :].view(value.shape).copy_(value)


def runs_of(call: Call, device: torch.device) -> tuple[dict[str, Tensor], ...]:
    """Output and gradients: ours, the truth, and plain torch's, for one draw of the values."""
    case, cotangent = drawn(call, device)
    inputs = [tensor for tensor in (*case.tensors.values(), cotangent) if tensor is not None]
    before = [tensor.detach().clone() for tensor in inputs]
    truth = run(case.truth, case, torch.float64, cotangent=cotangent)
    own = run(case.truth, case, call.dtype, cotangent=cotangent)
    found = run(case.operation, case, cotangent=cotangent, plan=PLANS[call.algorithm])
    assert all(torch.equal(*pair) for pair in zip(before, inputs, strict=True)), "an input was overwritten"
    for name, value in found.items():
        dtype = call.result if name == "y" else case.tensors[name.removeprefix("grad.")].dtype
        assert (value.shape, value.dtype) == (truth[name].shape, dtype)
        assert own[name].isfinite().all(), "plain torch overflows"
    return found, truth, own


def test_a_random_call(number, device, poisoned):
    """The rule of the error budget on all draws together. The rounding of a few numbers may be lucky in plain torch:
    what misses the budget is decided on more draws, where an error that is ours stays."""
    call = random_call(number)
    print(call)  # for a failure's report
    torch.manual_seed(number)
    runs = []
    for draws in DRAWS:
        runs += [runs_of(call, device) for _ in range(draws - len(runs))]
        missed = []
        for name, value in runs[0][0].items():
            found, truth, own = (
                torch.cat([part[name].double().flatten() for part in kind]) for kind in zip(*runs, strict=True)
            )
            actual, budget = error(found, truth), 2 * error(own, truth) + max(EPSILON[call.dtype], EPSILON[value.dtype])
            if not actual <= budget:
                missed.append(f"{name}: error {actual:.2e}, budget {budget:.2e}, {draws} draws")
        if not missed:
            return
        print(*missed, sep="\n")
    raise AssertionError(missed)
