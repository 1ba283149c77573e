"""A user's mistake is refused before any work, by a message that names the argument and what fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import inf, nan

import numpy as np
import pytest
import torch

import genft_kernels as gk
from genft_kernels import LaunchPlan
from tests.support.truth import OPERATIONS, called, make_case, run
from tests.support.watchers import Inside


def good(**changes):
    tensors = {
        "x": torch.randn(4, 6),
        "weight": torch.randn(5, 6),
        "p": torch.randn(6, 2),
        "q": torch.randn(5, 2),
        "bias": torch.randn(5),
    }
    options = {key: changes.pop(key) for key in list(changes) if key not in tensors}
    return {**tensors, **changes}, options


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.randn(4, 7)}, ValueError, ("x:", "7", "K = 6")),
        ({"x": torch.tensor(1.0)}, ValueError, ("x:", "[..., K]")),
        ({"x": torch.randn(4, 0)}, ValueError, ("x:", "K >= 1")),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, ("x:", "int64")),
        ({"x": [[1.0]]}, TypeError, ("x:", "list", "tensor")),
        ({"x": torch.randn(4, 6).half()}, TypeError, ("weight:", "float32", "float16")),
        ({"weight": torch.randn(5)}, ValueError, ("weight:", "[N, K]")),
        ({"weight": torch.ones(5, 6, dtype=torch.int8)}, TypeError, ("weight:", "int8", "input_edit")),
        ({"weight": torch.randn(5, 6, requires_grad=True)}, ValueError, ("weight:", "requires_grad_(False)")),
        ({"weight": torch.randn(5, 6, device="meta")}, ValueError, ("weight:", "meta", "cpu")),
        ({"p": torch.randn(7, 2)}, ValueError, ("p:", "(7, 2)", "[6, r]")),
        ({"p": torch.randn(6, 0), "q": torch.randn(5, 0)}, ValueError, ("p:", "r >= 1")),
        ({"q": torch.randn(5, 3)}, ValueError, ("q:", "(5, 3)", "[5, 2]")),
        ({"q": torch.randn(5, 2).double()}, TypeError, ("q:", "float64", "float32")),
        ({"p": torch.randn(6, 2, device="meta")}, ValueError, ("p:", "meta")),
        ({"bias": torch.randn(6)}, ValueError, ("bias:", "(6,)", "[5]")),
        ({"bias": torch.randn(5).half()}, TypeError, ("bias:", "float16")),
        ({"dropout": 1.0}, ValueError, ("dropout:", "1.0", "< 1")),
        ({"dropout": -0.1}, ValueError, ("dropout:", "-0.1")),
        ({"dropout": 0.1}, ValueError, ("seed:", "draw_seed")),
        ({"dropout": 0.1, "seed": torch.zeros(2)}, ValueError, ("seed:", "int64 (1,)")),
        ({"backend": "cuda"}, ValueError, ("backend:", "'cuda'", "reference")),
        ({"plan": "thin"}, TypeError, ("plan:", "str", "LaunchPlan")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_lowrank_linear_refuses(changes, error, words):
    tensors, options = good(**changes)
    with pytest.raises(error) as refusal:
        gk.lowrank_linear(*tensors.values(), **options)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_factors_of_the_edit_are_named():
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"psi: shape \(2, 5\), expected \[r, 6\]"):
        gk.input_edit_linear(x, weight, torch.randn(2, 5), torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"phi: shape \(3, 6\), expected \[2, 6\]"):
        gk.input_edit(x, torch.randn(2, 6), torch.randn(3, 6))


def test_features_refuse():
    weight, a = torch.randn(5, 6), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"activation: got 'swish', expected one of .*gelu"):
        gk.weight_features(weight, a, activation="swish")
    with pytest.raises(ValueError, match=r"bias: shape \(3,\), expected \[2\]"):
        gk.weight_features(weight, a, torch.randn(3))


def test_triton_without_a_gpu_is_refused(monkeypatch):
    from genft_kernels import plan

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plan.resolve.cache_clear()
    tensors, _ = good()
    with pytest.raises(ValueError, match=r"backend: Triton kernels need tensors on a GPU"):
        gk.lowrank_linear(*tensors.values(), backend="triton")
    plan.resolve.cache_clear()


def test_float64_has_no_kernel():
    tensors = [t.double() for t in good()[0].values()]
    with pytest.raises(ValueError, match=r"backend: Triton kernels support .* got torch.float64"):
        gk.lowrank_linear(*tensors, backend="triton")
    assert gk.lowrank_linear(*tensors).dtype == torch.float64


def test_rank_past_the_kernels_runs_on_library_products():
    assert gk.choose_plan(gk.Problem("lowrank_linear", 64, 64, 64, 200, 4), gk.DeviceFacts()).algorithm == "library"
    with pytest.raises(ValueError, match="ranks up to 128, got 200"):
        gk.lowrank_linear(
            torch.randn(4, 6), torch.randn(5, 6), torch.randn(6, 200), torch.randn(5, 200), plan=LaunchPlan("seeded")
        )


def test_an_algorithm_of_the_other_form_is_refused():
    tensors, _ = good()
    with pytest.raises(ValueError, match="lowrank_linear has no algorithm 'panel'"):
        gk.lowrank_linear(*tensors.values(), plan=LaunchPlan("panel"))
    h, b, a = torch.randn(5, 2), torch.randn(6, 2), torch.randn(2, 5)
    with pytest.raises(ValueError, match="generated_features has no algorithm 'thin'"):
        gk.generated_features(h, b, a, plan=LaunchPlan("thin"))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (3,)], ids=str)
def test_an_empty_generated_matrix_is_refused(shape):
    h = torch.randn(shape)
    b, a = torch.randn(5, shape[-1]), torch.randn(2, shape[0])
    with pytest.raises(ValueError, match=r"h: shape .*, expected \[N, r\]"):
        gk.generated_features(h, b, a)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1, "seed": 5}, "seed: got int, expected a tensor from draw_seed"),
        ({"bias": [1.0]}, "bias: got list, expected a tensor"),
    ],
    ids=["seed", "bias"],
)
def test_what_is_no_tensor_is_named(options, words):
    with pytest.raises(TypeError, match=words):
        gk.lowrank_linear(torch.randn(4, 3), torch.randn(5, 3), torch.randn(3, 2), torch.randn(5, 2), **options)


# ---- every argument of every operation


NO_NUMBERS = (None, "1", True, 1j, [1.0], torch.tensor(0.5), np.array([0.5]), np.bool_(True), nan, inf, -inf, 10**400)
NO_SHARES = (*NO_NUMBERS, -0.1, 1.0, 2)
NO_NAMES = (None, 1, True, "swish", ["none"], np.array(["none", "relu"]), torch.tensor([1, 2]))
WRONG: dict[str, tuple[object, ...]] = {
    "scale": NO_NUMBERS,
    "ratio": NO_NUMBERS,
    "dropout": NO_SHARES,
    "seed": (5, -1, 2**63, 0.5, "1", True, torch.tensor([5.0]), torch.tensor([5, 6]), torch.tensor([5], device="meta")),
    "activation": NO_NAMES,
    "combine": NO_NAMES,
    "inner_activation": NO_NAMES,
    "orientation": NO_NAMES,
    "backend": NO_NAMES,
    "plan": ("thin", 1, {}, LaunchPlan),
    "rows": (None, 1, (1, 2, 3), gk.RowGroups(1, 2, 3), gk.RowGroups(*[torch.zeros(4)] * 3)),
    "device": ("cpu", torch.device("cpu"), 1),  # of group_rows, whose index is a tensor here
    "count": (None, 0, -1, 1.0, True, "1", torch.tensor(1)),
}


def calls() -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    """Every operation, by name, with valid arguments by name."""
    made = {}
    for name in OPERATIONS:
        case = make_case(name, 4, 5, 6, 2, torch.float32, torch.device("cpu"))
        door = getattr(gk, called(name))
        made[name] = (door, {**case.tensors, **case.options})
    made["squared_gradient_sums"] = (gk.squared_gradient_sums, {"dy": torch.randn(4, 5), "x": torch.randn(4, 6)})
    made["group_rows"] = (gk.group_rows, {"index": torch.tensor([0, -1, 1]), "count": 2})
    return made


def others() -> dict[str, Callable[[torch.Tensor], object]]:
    """What is no dense tensor of floats, made from one that is."""

    def jagged(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor([tensor.detach(), tensor.detach()], layout=torch.jagged)

    def quantised(tensor: torch.Tensor) -> torch.Tensor:
        return torch.quantize_per_tensor(tensor.detach().float(), 0.1, 0, torch.qint8)

    return {
        "a list": lambda tensor: tensor.tolist(),
        "an array": lambda tensor: tensor.detach().numpy(),
        "COO": lambda tensor: tensor.detach().to_sparse(),
        "CSR": lambda tensor: tensor.detach().reshape(1, -1).to_sparse_csr(),
        "nested": lambda tensor: torch.nested.nested_tensor([tensor.detach(), tensor.detach()]),
        "jagged": jagged,
        "MKL-DNN": lambda tensor: tensor.detach().float().to_mkldnn(),
        "quantised": quantised,
        "complex": lambda tensor: tensor.detach().to(torch.complex64),
        "bool": lambda tensor: tensor.detach().bool(),
    }


class Work(Inside):
    """The operations of torch that were called, but for views and attributes, which are calls for some subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def see(self, function, out) -> None:
        if not function.is_view and function.namespace != "prim":
            self.calls.append(str(function))


def refusal_of(call: Callable[..., object], arguments: dict[str, object], name: str) -> str:
    with Work() as work, pytest.raises((TypeError, ValueError)) as refusal:
        call(**arguments)
    assert work.calls == []
    message = str(refusal.value)
    assert message.startswith(f"{name}: "), message
    assert "expected" in message
    return message


@pytest.mark.parametrize("operation", calls())
def test_a_wrong_value_of_any_option_is_named(operation):
    call, good = calls()[operation]
    call(**good)
    parameters = inspect.signature(call).parameters
    options = {name for name, parameter in parameters.items() if "Tensor" not in str(parameter)}
    for name in options | ({"seed", "rows"} & set(parameters)):
        for wrong in WRONG[name]:
            if wrong is None and parameters[name].default is None:
                continue
            dropping = {"dropout": 0.5} if name == "seed" else {}
            refusal_of(call, {**good, **dropping, name: wrong}, name)


@pytest.mark.parametrize("operation", calls())
@pytest.mark.parametrize("kind", others())
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|quantize).*")
def test_a_tensor_of_another_kind_is_named(operation, kind, autocast):
    call, good = calls()[operation]
    if "dropout" in inspect.signature(call).parameters:
        good |= {"dropout": 0.5, "seed": gk.draw_seed("cpu")}
    for name, tensor in good.items():
        if isinstance(tensor, torch.Tensor) and (operation, name, kind) != ("group_rows", "index", "a list"):
            other = others()[kind](tensor)
            with torch.autocast("cpu", enabled=autocast):
                refusal_of(call, {**good, name: other}, name)


@pytest.mark.parametrize(
    "value", [1, np.float32(1), np.float64(1), np.int64(1)], ids=lambda value: type(value).__name__
)
def test_numbers_of_numpy_are_numbers(value):
    case = make_case("lowrank_linear", 4, 5, 6, 2, torch.float32, torch.device("cpu"))
    tensors = case.tensors.values()
    assert torch.equal(gk.lowrank_linear(*tensors, scale=value), gk.lowrank_linear(*tensors, scale=1.0))
    assert torch.equal(gk.lowrank_linear(*tensors, dropout=value - 1), gk.lowrank_linear(*tensors))


def test_float32_factors_of_a_float64_layer_lose_nothing():
    case = make_case("generated_linear", 4, 5, 6, 2, torch.float64, torch.device("cpu"), factor_dtype=torch.float32)
    found, truth = run(case.operation, case), run(case.truth, case, torch.float64)
    assert found["grad.h"].dtype == torch.float32
    for name in ("y", "grad.x"):
        torch.testing.assert_close(found[name], truth[name], rtol=1e-13, atol=1e-13)
