"""N1: in bfloat16, an update far below the rounding of what it is added to still reaches y and dX, on average in full.

The gain is <answer, true answer> / <true answer, true answer>, the answer being what changes where the update is there.
Adding the update to a rounded product (as peft does) gains 0.53 at ‖ΔW‖/‖W0‖ = 10⁻³ and 0.06 at 10⁻⁴.
"""

from __future__ import annotations

import pytest
import torch

import genft_kernels as gk
from genft_kernels.dither import add_dithered
from genft_kernels.plan import LaunchPlan, ProductPlan, SkinnyPlan
from tests.support.plans import PLANS
from tests.support.truth import ALGORITHMS, Case, make_case

NAMES = (
    "lowrank_linear",
    "rescaled_linear",
    "input_edit_linear",
    "input_edit",
    "grouped_lowrank_linear",
    "sliced_linear_row",
    "sliced_linear_column",
    "generated_linear",
)
# The factor that ΔW is proportional to.
FACTOR = {
    "lowrank_linear": "q",
    "rescaled_linear": "q",
    "grouped_lowrank_linear": "q",
    "input_edit_linear": "phi",
    "input_edit": "phi",
    "sliced_linear": "values",
    "generated_linear": "h",
}
TOLERANCE = 0.03
WIDE = SkinnyPlan(128, 128, groups=8)  # the interpreter takes its time for each program


def gains(case: Case, size: float, **how) -> dict[str, float]:
    """The gain of y and of dX, where the update is scaled to `size` of what it is added to."""
    name = FACTOR[case.operation.__name__.removeprefix("_")]
    generator = torch.Generator().manual_seed(1)

    def both(factor: torch.Tensor, function, dtype: torch.dtype, **extra) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = {key: t if t is None or key == name else t.detach() for key, t in case.tensors.items()}
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items() if t is not None}
        tensors[name] = factor.to(dtype)
        x = tensors["x"].requires_grad_()
        y = function(*(tensors.get(key) for key in case.tensors), **case.options, **extra)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator.manual_seed(1)).to(y)
        return y.detach().double(), torch.autograd.grad(y, x, dy)[0].double()

    factor = case.tensors[name].detach()
    zero = torch.zeros_like(factor)
    exact = [a - b for a, b in zip(*(both(f, case.truth, torch.float64) for f in (factor, zero)), strict=True)]
    base = both(zero, case.truth, torch.float64)[0]
    touched = exact[0].ne(0)
    scaled = (factor * (size * base[touched].norm() / exact[0].norm())).to(factor)
    true = [a - b for a, b in zip(*(both(f, case.truth, torch.float64) for f in (scaled, zero)), strict=True)]
    found = [
        a - b for a, b in zip(*(both(f, case.operation, torch.bfloat16, **how) for f in (scaled, zero)), strict=True)
    ]
    return {what: float((f * t).sum() / (t * t).sum()) for what, f, t in zip(("y", "dx"), found, true, strict=True)}


def _case(name: str, side: int, device: torch.device, bias: float | None) -> Case:
    torch.manual_seed(0)
    lead = (8, side // 8) if name == "grouped_lowrank_linear" else side
    r = side // 4 if name.startswith("sliced") else 8
    bias = None if name.startswith("generated_linear") else bias  # its biases would be a large update of their own
    case = make_case(name, lead, side, side, r, torch.bfloat16, device, bias=bias is not None, scale=1.0)
    if "bias" in case.tensors and bias is not None:
        case.tensors["bias"].detach().fill_(bias)
    return case


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_loses_nothing(name, size):
    # The smaller the update, the fewer elements move a place: a mean needs more of them.
    case = _case(name, 1024 if size < 1e-3 else 512, torch.device("cpu"), bias=1.0)
    for what, gain in gains(case, size, plan=PLANS["reference"]).items():
        assert abs(gain - 1) <= TOLERANCE, (what, gain)


def test_factors_in_lists_lose_nothing():
    device = torch.device("cpu")
    case = _case("grouped_lowrank_linear", 512, device, bias=1.0)
    x, weight, p, q, bias = (tensor.detach() for tensor in case.tensors.values())
    rows = case.options["rows"]
    base, scale = x @ weight.t(), 1e-3 / 8**0.5

    def y(dtype: torch.dtype, s: float) -> torch.Tensor:
        tensors = [tensor.to(dtype) for tensor in (x, weight, p, q, bias)]
        index = rows.group.tolist()
        with torch.no_grad():
            lists = [list(stack) for stack in tensors[2:4]]
            return gk.grouped_lowrank_linear(*tensors[:2], *lists, index, tensors[4], scale=[s] * len(p)).double()

    true, found = (y(dtype, scale) - y(dtype, 0.0) for dtype in (torch.float64, torch.bfloat16))
    assert 0.5e-3 < true.norm() / base.double().norm() < 2e-3
    assert abs(float((found * true).sum() / (true * true).sum()) - 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *((name, algorithm) for name in NAMES for algorithm in ALGORITHMS[name][1:]),
        *(("generated_linear_modulate", algorithm) for algorithm in ("reference", "panel")),
    ],
)
def test_no_kernel_loses_anything(name, algorithm, device):
    case = _case(name, 256, device, bias=1.0)
    plan = LaunchPlan(algorithm, WIDE, ProductPlan(128, 128, 128, programs=4))
    for what, gain in gains(case, 1e-3, plan=plan).items():
        assert abs(gain - 1) <= TOLERANCE, (what, gain)


@pytest.mark.parametrize("algorithm", ALGORITHMS["rescaled_linear"])
def test_a_factor_near_one_is_not_lost(algorithm, device):
    """A change of 10⁻³ is less than half a unit in the last place of any 16-bit output."""
    torch.manual_seed(0)
    x, weight = (torch.randn(512, 512, device=device).bfloat16() for _ in range(2))
    p, q = torch.randn(512, 1, device=device), torch.zeros(512, 1, device=device)
    change = 1e-3 * torch.randn(512, device=device)
    plan = LaunchPlan(algorithm, WIDE)
    changed, base = (gk.rescaled_linear(x, weight, p, q, 1 + c, plan=plan).double() for c in (change, 0 * change))
    true = x.double() @ weight.double().t() * change
    assert abs(float(((changed - base) * true).sum() / true.square().sum()) - 1) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dithered_rounding(dtype):
    """Exact sums stay, others go up or down by one place with the right mean; what is not finite passes."""
    source = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    columns, out = range(512), torch.empty(64, 512, dtype=dtype)
    assert torch.equal(add_dithered(source, torch.zeros(()), columns, out), source)
    update = source.float() * 1e-4
    added = add_dithered(source, update, columns, out)
    step = torch.finfo(dtype).eps * source.float().abs()
    assert ((added.float() - source.float()).abs() <= step * 1.001).all()
    gain = float(((added.double() - source.double()) * update).sum() / update.double().square().sum())
    assert abs(gain - 1) < 0.2
    ends = torch.full((1, 512), torch.finfo(dtype).max).to(dtype)
    assert (
        add_dithered(ends, ends.float() * torch.finfo(dtype).eps / 5, columns, torch.empty_like(ends)).isfinite().all()
    )
    odd = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0]], dtype=dtype)
    same = add_dithered(odd, torch.zeros(()), range(5), torch.empty_like(odd))
    assert torch.equal(same.nan_to_num(7.0), odd.nan_to_num(7.0))
    halves = add_dithered(source[:, 256:], update[:, 256:], range(256, 512), torch.empty(64, 256, dtype=dtype))
    assert torch.equal(halves, added[:, 256:]), "a part is rounded as the whole is"


@pytest.mark.parametrize("algorithm", ALGORITHMS["input_edit"])
def test_float16_below_its_normal_numbers(algorithm, device):
    """Gradients of 2·10⁻⁵, where places have one size: an update of 10⁻³ is a thousandth of one."""
    torch.manual_seed(0)
    x, g = torch.randn(512, 512, device=device), 2e-5 * torch.randn(512, 512, device=device)
    psi, phi = 2e-5 * torch.randn(4, 512, device=device), torch.randn(4, 512, device=device)

    def dx(psi: torch.Tensor) -> torch.Tensor:
        leaf = x.half().requires_grad_()
        y = gk.input_edit(leaf, psi, phi, plan=LaunchPlan(algorithm, WIDE))
        return torch.autograd.grad(y, leaf, g.half())[0].double()

    true = (g.half().double() @ phi.double().t()) @ psi.double()
    gain = float(((dx(psi) - dx(0 * psi)) * true).sum() / true.square().sum())
    assert abs(gain - 1) < 0.1, gain
