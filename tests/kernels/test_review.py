"""Defects that a review found, each with the smallest example that showed it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import genft_kernels as gk
from genft_kernels import DeviceFacts, LaunchPlan, Problem, choose_plan
from genft_kernels.activations import ACTIVATIONS
from genft_kernels.plan import ALGORITHMS_OF, resolve
from tests.support.truth import assert_close_to_truth, error, make_case, run

NAMES = ("lowrank_linear", "input_edit_linear", "input_edit", "weight_features", "generated_linear")
ALGORITHMS = {name: ALGORITHMS_OF[name][0] for name in (*NAMES, "generated_features")}


# ---- autocast was on inside the operators: generated_features and two backwards raised, weight_features was rounded


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", [*NAMES, "generated_features"])
def test_a_backward_under_autocast_is_that_of_the_forward(name, backend, device):
    plan = LaunchPlan("reference" if backend == "reference" else ALGORITHMS[name])
    case = make_case(name, 6, 20, 24, 3, torch.float32, device, activation="gelu")
    plain = run(case.operation, case, plan=plan)
    tensors = {key: None if t is None else t.detach() for key, t in case.tensors.items()}
    leaves = {key: t.requires_grad_() for key, t in tensors.items() if t is not None and key != "weight"}
    y = case.operation(*tensors.values(), **case.options, plan=plan)
    with torch.autocast(device.type, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y)
        gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
    for key, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, plain[f"grad.{key}"]), key


@pytest.mark.parametrize("name", ["weight_features", "generated_features"])
def test_features_keep_their_precision_under_autocast(name, device):
    case = make_case(name, 1, 20, 24, 3, torch.float32, device)
    call = lambda: case.operation(*case.tensors.values(), **case.options, backend="reference")  # noqa: E731
    with torch.autocast(device.type, torch.bfloat16):
        found = call()
    assert torch.equal(found, call())


# ---- Triton launched on the current device, not on that of the tensors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_than_the_current_gpu(name):
    case = make_case(name, 6, 20, 24, 3, torch.float32, torch.device("cuda:1"))
    with torch.cuda.device(0):
        assert_close_to_truth(case, torch.float32, backend="triton")


# ---- reading allow_tf32 raises where TF32 was set through the newer fp32_precision


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
        ("pass", "ieee"),
    ],
)
def test_either_way_to_ask_for_tf32_is_followed(setting, expected):
    code = (
        f"import torch\n{setting}\n"
        "from genft_kernels._triton.kernels.common import precision\nprint(precision(torch.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.stdout.strip() == expected, done.stderr


# ---- generated_features: the second rank was not asked about; N = 0 divided by zero


def test_the_wider_rank_of_generated_features_decides(device, monkeypatch):
    h, b, a = torch.randn(9, 2, device=device), torch.randn(7, 2, device=device), torch.randn(200, 9, device=device)
    with pytest.raises(ValueError, match="ranks up to 128, got 200"):
        gk.generated_features(h, b, a, plan=LaunchPlan("fused"))
    seen = []

    def choose(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
        seen.append(choose_plan(problem, facts))
        return seen[-1]

    monkeypatch.setattr("genft_kernels.plan.choose_plan", choose)
    resolve.cache_clear()
    torch.testing.assert_close(gk.generated_features(h, b, a, backend="triton"), b @ h.t() @ a.t())
    resolve.cache_clear()
    assert [plan.algorithm for plan in seen] == ["library"]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (3,)], ids=str)
def test_an_empty_generated_matrix_is_refused(shape):
    h = torch.randn(shape)
    b, a = torch.randn(5, shape[-1]), torch.randn(2, shape[0])
    with pytest.raises(ValueError, match=r"h: shape .*, expected \[N, r\]"):
        gk.generated_features(h, b, a)


# ---- AttributeError instead of a message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1, "seed": 5}, "seed: got int, expected the tensor that draw_seed"),
        ({"bias": [1.0]}, "bias: got list, expected a tensor"),
    ],
    ids=["seed", "bias"],
)
def test_what_is_no_tensor_is_named(options, words):
    with pytest.raises(TypeError, match=words):
        gk.lowrank_linear(torch.randn(4, 3), torch.randn(5, 3), torch.randn(3, 2), torch.randn(5, 2), **options)


# ---- the reference summed panels in half precision: an error that grows with the number of panels


@pytest.mark.parametrize("name", ["lowrank_linear", "weight_features", "generated_features"])
def test_sums_over_panels_are_not_rounded_at_each(name):
    m, n, k = (2048, 16, 1024) if name == "lowrank_linear" else (1, 2048, 1024)
    case = make_case(name, m, n, k, 2, torch.float16, torch.device("cpu"), dropout=0.3)
    truth = run(case.truth, case, torch.float64)
    own, found = run(case.truth, case, torch.float16), run(case.operation, case, backend="reference")
    truth.pop("grad.bias", None)  # no sum over panels
    for key, value in truth.items():
        assert error(found[key], value) <= 1.5 * error(own[key], value) + 1e-4, key


# ---- relu in a kernel turned a NaN into 0


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("algorithm", ["reference", "panel"])
def test_a_nan_is_not_hidden(algorithm, activation, device):
    x, weight, h, b = (torch.randn(shape, device=device) for shape in ((4, 6), (5, 6), (5, 2), (6, 2)))
    h[1, 0] = torch.nan
    y = gk.generated_linear(x, weight, h, b, activation=activation, plan=LaunchPlan(algorithm))
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2, 3, 4]].isfinite().all()
