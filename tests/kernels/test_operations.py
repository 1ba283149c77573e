"""Every operation on every algorithm against the float64 truth: values, gradients, shapes, strides, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genft_kernels as gk
from genft_kernels import (
    ContractPlan,
    LaunchPlan,
    ProductPlan,
    SkinnyPlan,
)
from genft_kernels.activations import ACTIVATIONS
from tests.support.device import DEVICE
from tests.support.grids import pairwise
from tests.support.plans import CONTRACT, DTYPES, PLANS, SKINNY, short
from tests.support.truth import ALGORITHMS, OPERATIONS, WITH_DROPOUT, Case, assert_close_to_truth, error, make_case, run
from tests.support.watchers import Allocations, Products

PAIRS = [(name, algorithm) for name, algorithms in ALGORITHMS.items() for algorithm in algorithms]
ACTIVATION = {"activation": "gelu"}

SHAPES = [(70, 45, 130, 5), (1, 16, 17, 1), (129, 64, 64, 20), (33, 131, 31, 16)]


@pytest.mark.parametrize(("pair", "shape", "dtype"), pairwise(PAIRS, SHAPES, DTYPES), ids=str)
def test_shapes_and_dtypes(pair, shape, dtype, device, poisoned):
    name, algorithm = pair
    case = make_case(name, *shape, dtype, device, activation="gelu")
    assert_close_to_truth(case, dtype, plan=PLANS[algorithm])


@pytest.mark.parametrize(("name", "algorithm"), PAIRS)
class TestAgainstTruth:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
    def test_float32_factors(self, name, algorithm, dtype, device, poisoned):
        case = make_case(name, 50, 40, 70, 8, dtype, device, factor_dtype=torch.float32, activation="tanh")
        assert_close_to_truth(case, dtype, plan=PLANS[algorithm])

    def test_without_bias(self, name, algorithm, device, poisoned):
        case = make_case(name, 20, 40, 36, 3, torch.float32, device, bias=False, activation="leakyrelu")
        assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])

    @pytest.mark.parametrize("lead", [(3, 5), (2, 1, 4), (0, 7), (0,), ()], ids=str)
    def test_leading_shapes(self, name, algorithm, lead, device, poisoned):
        case = make_case(name, lead, 24, 19, 4, torch.float32, device)
        assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])

    def test_wide_rank(self, name, algorithm, device, poisoned):
        case = make_case(name, 40, 50, 60, 100, torch.float32, device)
        assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])

    def test_strided_operands(self, name, algorithm, device, poisoned):
        """x from a wider buffer, a transposed weight (as Conv1D stores it), factors and bias with gaps."""
        case = make_case(name, 37, 48, 33, 6, torch.float32, device)

        def gapped(tensor: torch.Tensor) -> torch.Tensor:
            wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=device)
            view = wide[..., ::2]
            view.copy_(tensor.detach())
            return view.requires_grad_(tensor.requires_grad)

        tensors = {key: None if value is None else gapped(value) for key, value in case.tensors.items()}
        if "weight" in tensors:
            tensors["weight"] = case.tensors["weight"].t().contiguous().t()
        assert_close_to_truth(replace(case, tensors=tensors), torch.float32, plan=PLANS[algorithm])


@pytest.mark.parametrize(
    ("name", "algorithm"),
    # Interpreted programs run one after the other: they give the same bits whether or not a kernel has a race.
    [pair for pair in PAIRS if pair[1] == "reference" or DEVICE == "cuda"],
)
def test_same_bits_twice(name, algorithm, device):
    case = make_case(name, 100, 40, 50, 7, torch.float32, device)
    first, second = (run(case.operation, case, plan=PLANS[algorithm]) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("r", [1, 5, 40])
@pytest.mark.parametrize(("m", "n", "k"), [(100, 264, 136), (9, 520, 264), (9, 45, 264), (7, 40, 45)], ids=str)
def test_the_single_pass_with_wide_tiles_and_descriptors(m, n, k, r, device, poisoned):
    """Tiles stored by halves past the end of y; few rows with a split contraction; y, or W0, without aligned rows."""
    plan = LaunchPlan("single", SKINNY, ProductPlan(16 if m < 16 else 32, 256, 32, 2, programs=8, descriptors=True))
    case = make_case("lowrank_linear", m, n, k, r, torch.float16, device)
    assert_close_to_truth(case, torch.float16, plan=plan)


def test_a_transposed_input_is_edited_as_the_compiler_was_told(device):
    x = torch.randn(24, 10, device=device).bfloat16().t().requires_grad_()
    psi, phi = torch.randn(3, 24, device=device).bfloat16(), torch.randn(3, 24, device=device).bfloat16()
    for algorithm in ALGORITHMS["input_edit"]:
        torch.library.opcheck(torch.ops.genft.input_edit.default, (x, psi, phi, 0.5, str(PLANS[algorithm])))


@pytest.mark.parametrize(("name", "algorithm"), [pair for pair in PAIRS if pair[0] in WITH_DROPOUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_dropout_is_exact(name, algorithm, dtype, device, poisoned):
    case = make_case(name, 70, 85, 61, 5, dtype, device, dropout=0.3, activation="gelu")
    assert_close_to_truth(case, dtype, plan=PLANS[algorithm])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [pair for pair in PAIRS if pair[0] in ("weight_features", "generated_linear", "generated_features")],
)
def test_activations(activation, name, algorithm, device):
    case = make_case(name, 20, 85, 61, 5, torch.float32, device, activation=activation)
    assert_close_to_truth(case, torch.float32, plan=PLANS[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS["generated_linear"])
def test_long_sums_in_bfloat16(algorithm, device):
    """K and M long enough for a low-precision accumulator to show."""
    blocks = LaunchPlan(algorithm, SKINNY, ProductPlan(64, 64, 64), ContractPlan(64, 64, 64, panel=1))
    case = make_case("generated_linear", 700, 40, 1000, 8, torch.bfloat16, device, activation="gelu")
    assert_close_to_truth(case, torch.bfloat16, plan=blocks)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [pair for pair in PAIRS if pair[0] in ("generated_linear", "generated_features") and pair[1] != "reference"],
)
def test_atomic_sums_are_right_too(name, algorithm, device):
    plan = replace(PLANS[algorithm], contract=replace(CONTRACT, atomic=True))
    case = make_case(name, 40, 85, 61, 5, torch.float32, device, dropout=0.2, activation="gelu")
    assert_close_to_truth(case, torch.float32, plan=plan)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [pair for pair in PAIRS if pair[0] in ("lowrank_linear", "input_edit", "grouped_lowrank_linear")],
)
def test_rows_past_int32_offsets(name, algorithm, device):
    """Three rows spread over more than 2^31 elements (only the touched pages of the buffer become real)."""
    case = make_case(name, 3, 16, 24, 2, torch.float16, device)
    step = 2**30 + 4096
    try:
        buffer = torch.empty(2 * step + 64, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("this machine cannot reserve 4.3 GB of address space")
    x = buffer.as_strided((3, 24), (step, 1))
    x.copy_(case.tensors["x"].detach())
    far = replace(case, tensors={**case.tensors, "x": x.requires_grad_()})
    found = run(far.operation, far, plan=PLANS[algorithm])
    near = run(case.operation, case, plan=PLANS[algorithm])
    assert all(torch.equal(found[key], near[key]) for key in near)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pair=st.sampled_from(PAIRS),
    m=st.integers(0, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    r=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_any_shape(device, pair, m, n, k, r, dtype, bias):
    name, algorithm = pair
    torch.manual_seed(m + 71 * n)
    case = make_case(name, m, n, k, r, dtype, device, bias=bias, activation="gelu")
    assert_close_to_truth(case, dtype, plan=PLANS[algorithm])


# ---- what autograd asks for


def _tensors(device, *, grads: set[str], m: int = 12, n: int = 9, k: int = 10, r: int = 3) -> dict[str, torch.Tensor]:
    case = make_case("lowrank_linear", m, n, k, r, torch.float32, device)
    return {name: t.detach().requires_grad_(name in grads) for name, t in case.tensors.items()}


@pytest.mark.parametrize("algorithm", ALGORITHMS["lowrank_linear"])
@pytest.mark.parametrize("wanted", [{"x"}, {"p"}, {"q"}, {"bias"}, {"p", "q"}, {"x", "bias"}], ids=sorted)
def test_only_the_gradients_asked_for(algorithm, wanted, device):
    tensors = _tensors(device, grads=wanted)
    gk.lowrank_linear(*tensors.values(), plan=PLANS[algorithm]).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == wanted
    everything = _tensors(device, grads={"x", "p", "q", "bias"})
    for name, t in tensors.items():
        everything[name].data.copy_(t.detach())
    gk.lowrank_linear(*everything.values(), plan=PLANS[algorithm]).sum().backward()
    for name in wanted:
        torch.testing.assert_close(tensors[name].grad, everything[name].grad)


def opcheck(algorithm: str, operator, arguments) -> None:
    """Everything for the reference and one algorithm on kernels. To a tracer the others are the same operator with
    another text for a plan: of them, what they return and what they leave alone."""
    everything = algorithm in ("reference", "seeded", "panel")
    torch.library.opcheck(
        operator, arguments, **({} if everything else {"test_utils": ("test_schema", "test_faketensor")})
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS["generated_linear"])
def test_opcheck_generated(algorithm, device):
    plan = str(PLANS[algorithm])
    seed = gk.draw_seed(device)
    case = make_case("generated_linear", 12, 9, 10, 3, torch.float32, device)
    x, weight, h, b, bias, row, column = case.tensors.values()
    rest = ("add", 0.5, "gelu", 0.2, seed, plan)
    alone = ("multiply", *rest[1:])
    features_plan = str(PLANS["reference" if algorithm == "reference" else "fused"])
    a, rank_bias = torch.randn(4, 9, device=device, requires_grad=True), torch.randn(4, device=device)
    opcheck(algorithm, torch.ops.genft.generated_linear.default, (x, weight, h, b, bias, row, column, *rest))
    opcheck(algorithm, torch.ops.genft.generated_linear.default, (x, weight, h, b, None, None, None, *alone))
    opcheck(
        algorithm,
        torch.ops.genft.generated_features.default,
        (h, b, a, rank_bias, column, "tanh", 0.2, seed, features_plan),
    )
    with torch.no_grad():
        x, h, b, row, column, a = (v.detach() for v in (x, h, b, row, column, a))
        dy, dz = torch.randn(12, 9, device=device), torch.randn(10, 4, device=device)
        for needs in ([True] * 6, [True, False, True, True, False, True]):
            opcheck(
                algorithm,
                torch.ops.genft.generated_linear_backward.default,
                (dy, x, weight, h, b, row, column, *rest[:-1], needs, plan),
            )
        opcheck(
            algorithm,
            torch.ops.genft.generated_features_backward.default,
            (dz, h, b, a, column, "tanh", 0.2, seed, [True, False, True, True, True], features_plan),
        )


@pytest.mark.parametrize("algorithm", ["reference", "seeded"])
def test_no_product_for_a_gradient_that_nobody_wants(algorithm, device):
    """x needs no gradient: the backward makes no [M,N]·[N,K] product."""
    for grads, expected in (({"p", "q"}, False), ({"x"}, True)):
        tensors = _tensors(device, grads=grads, m=12, n=90, k=80)
        y = gk.lowrank_linear(*tensors.values(), plan=PLANS[algorithm])
        with Products() as products:
            y.sum().backward()
        assert ((12, 80) in products.shapes) is expected


def test_second_derivative_is_refused(device):
    tensors = _tensors(device, grads={"x", "p", "q"})
    y = gk.lowrank_linear(*tensors.values(), backend="reference")
    (g,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), tensors["p"])


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name, device):
    dropout = 0.25 if name in WITH_DROPOUT else 0.0
    case = make_case(name, 6, 5, 7, 2, torch.float64, device, dropout=dropout, activation="gelu")
    inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in case.tensors.values())
    assert torch.autograd.gradcheck(lambda *t: case.operation(*t, **case.options, backend="reference"), inputs)


@pytest.mark.parametrize("algorithm", ALGORITHMS["lowrank_linear"])
def test_opcheck(algorithm, device):
    plan, edit_plan = str(PLANS[algorithm]), str(PLANS["reference" if algorithm == "reference" else "thin"])
    seed = gk.draw_seed(device)
    x, weight, p, q, bias = _tensors(device, grads={"x", "p", "q", "bias"}).values()
    psi, phi = p.detach().t().contiguous().requires_grad_(), torch.randn(3, 10, device=device, requires_grad=True)
    gain = torch.randn(9, device=device, requires_grad=True)
    t, dy = torch.randn(12, 3, device=device), torch.randn(12, 9, device=device)
    samples = [
        (torch.ops.genft.lowrank_linear.default, (x, weight, p, q, bias, 0.5, 0.2, seed, plan)),
        (torch.ops.genft.lowrank_linear.default, (x, weight, p, q, None, 0.5, 0.0, None, plan)),
        (torch.ops.genft.rescaled_linear.default, (x, weight, p, q, gain, bias, 0.5, 0.2, seed, True, plan)),
        (torch.ops.genft.rescaled_linear.default, (x, weight, p, q, gain.detach(), None, 0.5, 0.0, None, False, plan)),
        (torch.ops.genft.input_edit_linear.default, (x, weight, psi, phi, bias, 0.5, plan)),
        (
            torch.ops.genft.input_edit_linear.default,
            (*(v.detach().half() for v in (x, weight, psi, phi)), None, 0.5, plan),
        ),
        (torch.ops.genft.input_edit.default, (x, psi, phi, 0.5, edit_plan)),
        (
            torch.ops.genft.weight_features.default,
            (weight, psi, phi[:, 0].detach().requires_grad_(), 0.5, 0.2, seed, edit_plan),
        ),
    ]
    for operator, arguments in samples:
        opcheck(algorithm, operator, arguments)
    with torch.no_grad():
        x, p, q, psi, phi = (v.detach() for v in (x, p, q, psi, phi))
        backward = [
            (
                torch.ops.genft.lowrank_linear_backward.default,
                (dy, x, weight, p, q, t, 0.5, 0.2, seed, [True, True, False, True], plan),
            ),
            (
                torch.ops.genft.rescaled_linear_backward.default,
                (dy, x, weight, p, q, gain.detach(), t, dy, 0.5, 0.2, seed, [True, True, False, True, True], plan),
            ),
            (
                torch.ops.genft.input_edit_linear_backward.default,
                (dy, x, weight, psi, phi, t, torch.empty(0), 0.5, [True] * 4, plan),
            ),
            (
                torch.ops.genft.input_edit_linear_backward.default,
                (*(v.half() for v in (dy, x, weight, psi, phi, t, q)), 0.5, [True] * 4, plan),
            ),
            (torch.ops.genft.input_edit_backward.default, (x, x, psi, phi, t, 0.5, [True, False, True], edit_plan)),
            (
                torch.ops.genft.weight_features_backward.default,
                (q, weight, 0.5, 0.2, seed, [True, True], edit_plan),
            ),
        ]
        for operator, arguments in backward:
            opcheck(algorithm, operator, arguments)


# ---- memory


@pytest.mark.parametrize(("name", "algorithm"), PAIRS)
def test_nothing_of_n_by_k_is_allocated(name, algorithm, device):
    n, k = 320, 256
    wide = SkinnyPlan(rows=64, columns=64, groups=2)
    plan = LaunchPlan(algorithm, wide, ProductPlan(m=64, n=64, k=64), ContractPlan(64, 64, panel=1))
    if name.startswith("generated_linear") and algorithm == "reference":
        n, k = 1280, 512  # more than the panel of 2¹⁸ elements
    dropout = 0.3 if name in WITH_DROPOUT else 0.0
    case = make_case(name, 8, n, k, 4, torch.float32, device, dropout=dropout)
    tensors = [t for t in case.tensors.values() if t is not None]
    with Allocations(*tensors) as seen:
        y = case.operation(*case.tensors.values(), **case.options, plan=plan)
        torch.autograd.grad(y.sum(), [t for t in tensors if t.requires_grad])
    # The panels of the reference's dropout and the slabs of the kernels are bounded.
    assert 4 * 4 * k <= seen.largest < 4 * n * k


@pytest.mark.parametrize(("name", "algorithm"), [pair for pair in PAIRS if not pair[0].endswith("features")])
def test_saved_for_backward_is_t_at_most(name, algorithm, device):
    """P5: beyond x and the parameters, t [M,r]; of an edit the features of W0 [N,r] too, of rescaled outputs z [M,N],
    which the gradient of their factor needs; nothing for the generated form and for slices."""
    m, n, r = 50, 64, 4
    case = make_case(name, m, n, 48, r, torch.float16, device)
    groups = case.options.get("rows", ())  # which the whole batch shares
    own = {t.untyped_storage().data_ptr() for t in (*case.tensors.values(), *groups)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = case.operation(*case.tensors.values(), **case.options, plan=PLANS[algorithm])
    assert y.requires_grad
    rows = 0 if name.startswith(("generated", "sliced")) else m + n if name == "input_edit_linear" else m
    assert sum(saved.values()) == rows * r * 2 + (m * n * 2 if name == "rescaled_linear" else 0)


def test_features_keep_neither_their_factor_nor_a_copy_of_the_weight(device):
    weight, leaf = torch.randn(9, 7, device=device), torch.randn(3, 7, device=device, requires_grad=True)
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    a = leaf * 2
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gk.weight_features(weight, a)
    assert kept == [weight.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_squares_of_rows(dtype, device):
    n, k = 100, 1500
    weight = torch.randn(k, n, device=device).to(dtype).t()
    with Allocations(weight) as seen:
        squares = gk.row_squares(weight)
    assert squares.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(squares.double(), weight.double().square().sum(1), rtol=1e-5, atol=0)
    assert seen.largest < weight.nbytes


# ---- around the operation


def _autocast_case(device) -> Case:
    return make_case("lowrank_linear", 20, 24, 28, 4, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
def test_autocast_casts_as_linear_does(dtype, device):
    case = _autocast_case(device)
    x, weight, *_, bias = case.tensors.values()
    with torch.autocast(device.type, dtype):
        y = gk.lowrank_linear(*case.tensors.values(), **case.options)
        linear = torch.nn.functional.linear(x, weight, bias)
    assert y.dtype == linear.dtype == dtype
    gradients = torch.autograd.grad(y.float().sum(), [t for t in case.tensors.values() if t.requires_grad])
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_in_one_graph(name, device):
    """fullgraph, dynamic rows, the values of the eager call."""
    case = make_case(name, 12, 16, 20, 3, torch.float32, device)
    compiled = torch.compile(case.operation, fullgraph=True, dynamic=True, backend="aot_eager")
    eager, traced = run(case.operation, case), run(compiled, case)
    for key, value in eager.items():
        torch.testing.assert_close(traced[key], value)


def test_checkpointing_replays_the_dropout_mask(device):
    case = make_case("lowrank_linear", 20, 24, 28, 4, torch.float32, device)
    x, weight, p, q, bias = case.tensors.values()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return gk.lowrank_linear(x, weight, p, q, bias, dropout=0.5, seed=gk.draw_seed(device))

    grads = []
    for reentrant in (None, True, False):
        torch.manual_seed(3)
        if reentrant is None:
            y = layer(x)
        else:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        y.square().sum().backward()
        grads.append([t.grad.clone() for t in (x, p, q)])
        for t in (x, p, q):
            t.grad = None
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("name", ["lowrank_linear", "weight_features", "generated_features"])
def test_sums_over_panels_are_not_rounded_at_each(name):
    m, n, k = (2048, 16, 1024) if name == "lowrank_linear" else (1, 2048, 1024)
    case = make_case(name, m, n, k, 2, torch.float16, torch.device("cpu"), dropout=0.3)
    truth = run(case.truth, case, torch.float64)
    own, found = run(case.truth, case, torch.float16), run(case.operation, case, backend="reference")
    truth.pop("grad.bias", None)  # no sum over panels
    for key, value in truth.items():
        assert error(found[key], value) <= 1.5 * error(own[key], value) + 1e-4, key


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("algorithm", ["reference", "panel"])
def test_a_nan_is_not_hidden(algorithm, activation, device):
    x, weight, h, b = (torch.randn(shape, device=device) for shape in ((4, 6), (5, 6), (5, 2), (6, 2)))
    h[1, 0] = torch.nan
    y = gk.generated_linear(x, weight, h, b, activation=activation, plan=LaunchPlan(algorithm))
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2, 3, 4]].isfinite().all()
