"""A user's mistake is refused before any work, by a message that names the argument and what fits."""

from __future__ import annotations

import pytest
import torch

import genft_kernels as gk
from genft_kernels import LaunchPlan


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
