"""Outputs, ΔW and every gradient against tensors computed with the methods' released code, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from genft_modules import METHODS, FusedGenLinear, WeGeFTConfig

from ..conftest import DEVICE

ORACLES = Path(__file__).parents[1] / "oracles"
CASES = [case for case in json.loads((ORACLES / "index.json").read_text()) if case["method"] in METHODS]


def _config(case):
    if case["method"] == "wegeft":
        return WeGeFTConfig(r=case["r"], wegeft_alpha=case["alpha"])
    return METHODS[case["method"]](r=case["r"], block=case["block"], block_kwargs=case["block_kwargs"])


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_agrees_with_the_released_code(case, kind):
    oracle = load_file(ORACLES / f"{case['name']}.safetensors", device=DEVICE)
    n, k = oracle["weight"].shape
    linear = nn.Linear(k, n, dtype=torch.float64) if kind == "Linear" else Conv1D(n, k).double()
    linear.to(DEVICE)
    with torch.no_grad():
        linear.weight.copy_(oracle["weight"] if kind == "Linear" else oracle["weight"].t())
        linear.bias.copy_(oracle["bias"])
    layer = FusedGenLinear.from_linear(linear, _config(case))
    parameters = layer.adapter_parameters()
    assert set(parameters) == {key.removeprefix("param.") for key in oracle if key.startswith("param.")}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(oracle[f"param.{name}"])

    x = oracle["x"].clone().requires_grad_()
    y = layer(x)
    (y * oracle["cotangent"]).sum().backward()

    def same(got, want):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)

    same(y, oracle["y"])
    same(layer.get_delta_weight(), oracle["delta_weight"])
    same(x.grad, oracle["grad.x"])
    for name, parameter in parameters.items():
        same(parameter.grad, oracle[f"grad.param.{name}"])
    layer.merge()
    same(layer(oracle["x"]), oracle["y"])
