"""What is set around a call: autocast, the current device, TF32."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from genft_kernels import LaunchPlan
from genft_kernels.plan import ALGORITHMS_OF
from tests.support.truth import assert_close_to_truth, make_case, run

NAMES = ("lowrank_linear", "input_edit_linear", "input_edit", "weight_features", "generated_linear")
ALGORITHMS = {name: ALGORITHMS_OF[name][0] for name in (*NAMES, "generated_features")}


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_another_than_the_current_gpu(name):
    case = make_case(name, 6, 20, 24, 3, torch.float32, torch.device("cuda:1"))
    with torch.cuda.device(0):
        assert_close_to_truth(case, torch.float32, backend="triton")


TF32 = {
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "pass": "ieee",
}


def test_either_way_to_ask_for_tf32_is_followed():
    """Each in a fork of one process: torch wants to be asked in one way only."""
    code = f"""
import os, torch
from genft_kernels._triton.kernels.common import precision
for setting in {list(TF32)}:
    child = os.fork()
    if not child:
        exec(setting)
        print(precision(torch.float32), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.stdout.split() == list(TF32.values()), done.stderr
