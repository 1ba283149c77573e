"""Slices of a weight: what is made for which gradient, and the sums by which slices are chosen. Values and gradients of
`sliced_linear` on every algorithm are held to the truth in test_operations.py."""

from __future__ import annotations

import pytest
import torch

import genft_kernels as gk
from genft_kernels import LaunchPlan
from tests.support.plans import DTYPES, PLANS, short
from tests.support.truth import EPSILON, error, make_case
from tests.support.truth import squared_gradient_sums as true_sums
from tests.support.watchers import Allocations, Products

orientations = pytest.mark.parametrize("orientation", ["row", "column"])
algorithms = pytest.mark.parametrize("algorithm", ["reference", "seeded", "fused"])


@orientations
@algorithms
@pytest.mark.parametrize("wanted", [{"x"}, {"values"}, {"bias"}, {"x", "bias"}], ids=sorted)
def test_only_the_gradients_asked_for(orientation, algorithm, wanted, device):
    case = make_case(f"sliced_linear_{orientation}", 12, 90, 80, 3, torch.float32, device)

    def gradients(names: set[str]) -> tuple[dict[str, torch.Tensor | None], list[tuple[int, ...]]]:
        leaves = {
            name: t.detach().requires_grad_(name in names) if t.is_floating_point() else t
            for name, t in case.tensors.items()
        }
        y = gk.sliced_linear(*leaves.values(), **case.options, plan=PLANS[algorithm])
        with Products() as products:
            y.square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}, products.shapes

    some, products = gradients(wanted)
    everything, _ = gradients({"x", "values", "bias"})
    assert {name for name, gradient in some.items() if gradient is not None} == wanted
    for name in wanted:
        torch.testing.assert_close(some[name], everything[name])
    if algorithm != "fused":  # there the product is ours, not one of torch's
        assert ((12, 80) in products) is ("x" in wanted)
    assert (90, 80) not in products  # the gradient of a whole weight


@pytest.mark.parametrize(
    ("orientation", "algorithm"),
    [("row", "reference"), ("row", "fused"), ("column", "reference"), ("column", "seeded")],
)
def test_opcheck(orientation, algorithm, device):
    plan = str(PLANS[algorithm])
    case = make_case(f"sliced_linear_{orientation}", 12, 9, 10, 3, torch.float32, device)
    x, weight, values, indices, bias = case.tensors.values()
    columns = orientation == "column"
    torch.library.opcheck(torch.ops.genft.sliced_linear.default, (x, weight, values, indices, bias, columns, 0.5, plan))
    x, values = x.detach(), values.detach()
    dy = torch.randn(12, 9, device=device)
    for needs in ([True, True, True], [False, True, False]):
        arguments = (dy, x, weight, values, indices, columns, 0.5, needs, plan)
        torch.library.opcheck(torch.ops.genft.sliced_linear_backward.default, arguments)
    if algorithm != "seeded":
        torch.library.opcheck(torch.ops.genft.squared_gradient_sums.default, (dy, x, plan))


def test_an_update_that_was_there_stays(device):
    """Rows that are not chosen come out of the library's product untouched, to the bit."""
    case = make_case("sliced_linear_row", 20, 30, 24, 4, torch.float32, device)
    x, weight, values, indices, bias = (t.detach() for t in case.tensors.values())
    y = gk.sliced_linear(x, weight, values, indices, bias, plan=PLANS["seeded"])
    plain = torch.nn.functional.linear(x, weight, bias)
    others = torch.ones(30, dtype=torch.bool, device=device).index_fill(0, indices, False)
    assert torch.equal(y[:, others], plain[:, others])
    assert not torch.isclose(y[:, indices], plain[:, indices]).all(0).any()


# ---- squared_gradient_sums


@orientations
@pytest.mark.parametrize("algorithm", ["reference", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", [((3, 23), 45, 70), ((1,), 16, 33), ((), 33, 16), ((0,), 5, 7)], ids=str)
def test_squared_gradients(orientation, algorithm, dtype, shape, device, poisoned):
    lead, n, k = shape
    dy, x = (torch.randn(*lead, size, dtype=torch.float64, device=device).to(dtype) for size in (n, k))
    found = gk.squared_gradient_sums(dy, x, orientation=orientation, plan=PLANS[algorithm])
    truth = true_sums(dy.double(), x.double(), orientation=orientation)
    own = true_sums(dy, x, orientation=orientation)
    assert found.shape == truth.shape
    assert found.dtype == torch.float32
    assert error(found, truth) <= 2 * error(own, truth) + EPSILON[dtype]


@orientations
def test_squared_gradients_of_many_panels(orientation, device):
    dy, x = torch.randn(5, 1500, device=device), torch.randn(5, 1000, device=device)  # three panels of 2¹⁹ elements
    truth = true_sums(dy.double(), x.double(), orientation=orientation)
    with Allocations(dy, x) as seen:
        found = gk.squared_gradient_sums(dy, x, orientation=orientation, backend="reference")
    torch.testing.assert_close(found, truth.float())
    assert seen.largest <= 4 * 2**19


def test_large_half_precision_gradients_do_not_overflow(device):
    dy, x = (torch.full((300, size), 60.0, dtype=torch.float16, device=device) for size in (4, 6))
    for algorithm in ("reference", "fused"):
        found = gk.squared_gradient_sums(dy, x, plan=PLANS[algorithm])
        torch.testing.assert_close(found, torch.full((4,), 6 * (300 * 3600.0) ** 2, device=device))


def test_squared_gradients_keep_strides_and_float64(device):
    wide = torch.randn(6, 40, 7, dtype=torch.float64, device=device, requires_grad=True)
    dy, x = wide.transpose(1, 2)[..., ::2], wide[:, :7, :].flip(1)
    found = gk.squared_gradient_sums(dy, x)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, true_sums(dy, x))


# ---- refusals


def good(**changes):
    tensors = {
        "x": torch.randn(4, 6),
        "weight": torch.randn(5, 6),
        "values": torch.randn(2, 6),
        "indices": torch.tensor([3, 1]),
        "bias": torch.randn(5),
    }
    options = {key: changes.pop(key) for key in list(changes) if key not in tensors}
    return {**tensors, **changes}, options


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"orientation": "rows"}, ValueError, ("orientation:", "'rows'", "'column'")),
        ({"values": torch.randn(2, 5)}, ValueError, ("values:", "(2, 5)", "[r, 6]")),
        ({"orientation": "column"}, ValueError, ("values:", "(2, 6)", "[5, r]")),
        ({"values": torch.randn(2, 6).double()}, TypeError, ("values:", "float64")),
        ({"indices": [3, 1]}, TypeError, ("indices:", "list", "int64")),
        ({"indices": torch.tensor([3, 1], dtype=torch.int32)}, TypeError, ("indices:", "int32", "int64")),
        ({"indices": torch.tensor([3])}, ValueError, ("indices:", "(1,)", "[2]")),
        ({"indices": torch.tensor([[3, 1]])}, ValueError, ("indices:", "(1, 2)", "[2]")),
        ({"indices": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, ("indices:", "meta", "cpu")),
        ({"values": torch.randn(7, 6), "indices": torch.arange(7)}, ValueError, ("indices:", "got 7", "most 5")),
        ({"plan": LaunchPlan("panel")}, ValueError, ("sliced_linear has no algorithm 'panel'",)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sliced_linear_refuses(changes, error, words):
    tensors, options = good(**changes)
    with pytest.raises(error) as refusal:
        gk.sliced_linear(*tensors.values(), **options)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize(
    ("dy", "x", "options", "error", "words"),
    [
        (torch.ones(3, 4), torch.ones(2, 5), {}, ValueError, ("dy:", "(3, 4)", "(2, 5)")),
        (torch.ones(3, 4), torch.ones(3, 5).half(), {}, TypeError, ("dy:", "float32", "float16")),
        ([1.0], torch.ones(3, 5), {}, TypeError, ("dy:", "list")),
        (torch.ones(3, 4), torch.ones(3, 5, device="meta"), {}, ValueError, ("dy:", "cpu", "meta")),
        (torch.ones(3, 4), torch.ones(3, 5), {"orientation": 0}, ValueError, ("orientation:", "0")),
        (torch.ones(3, 4), torch.ones(3, 5), {"plan": LaunchPlan("thin")}, ValueError, ("no algorithm 'thin'",)),
    ],
)
def test_squared_gradients_refuse(dy, x, options, error, words):
    with pytest.raises(error) as refusal:
        gk.squared_gradient_sums(dy, x, **options)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
