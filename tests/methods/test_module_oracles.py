"""Outputs, ΔW and every gradient against tensors computed with the methods' released code, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from genft_modules import METHODS, FusedGenLinear, GenFTConfig, PeanutConfig, WeGeFTConfig
from tests.support.device import DEVICE
from tests.support.truth import EPSILON

ORACLES = Path(__file__).parents[1] / "oracles"
CASES = [case for case in json.loads((ORACLES / "index.json").read_text()) if case["method"] in METHODS]


def _config(case):
    if case["method"] == "wegeft":
        return WeGeFTConfig(r=case["r"], wegeft_alpha=case["alpha"])
    if case["method"] == "genft":
        same = ("ratio_W0", "ratio_on", "scaling", "inner_activation", "outer_activation", "generator_bias", "stages")
        return GenFTConfig(
            generator_share_dim=case["r_shared"],
            individual_features=case["r_specific"],
            drop=case["dropout"],
            orientation=case["orientation"],
            **{field: case[field] for field in same},
        )
    if case["method"] == "peanut":
        return PeanutConfig(**{field: case[field] for field in ("r", "depth", "act_fn", "scaling")})
    return METHODS[case["method"]](r=case["r"], block=case["block"], block_kwargs=case["block_kwargs"])


def _layer(case, kind, dtype=torch.float64, backend="auto"):
    """The oracle's layer and tensors. The oracle has no gradient for a parameter that the layer does not have."""
    oracle = load_file(ORACLES / f"{case['name']}.safetensors", device=DEVICE)
    n, k = oracle["weight"].shape
    linear = nn.Linear(k, n) if kind == "Linear" else Conv1D(n, k)
    linear.to(DEVICE, dtype)
    with torch.no_grad():
        linear.weight.copy_(oracle["weight"] if kind == "Linear" else oracle["weight"].t())
        linear.bias.copy_(oracle["bias"])
    layer = FusedGenLinear.from_linear(linear, _config(case), backend=backend)
    parameters = layer.adapter_parameters()
    named = {key.removeprefix("param.") for key in oracle if key.startswith("param.")}
    unused = named - set(parameters)
    assert set(parameters) <= named
    assert unused == ({f"{name}_2_{side}" for name in ("shared", "bias") for side in "ab"} & unused)
    assert not any(torch.count_nonzero(oracle[f"grad.param.{name}"]) for name in unused)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(oracle[f"param.{name}"])
    return layer, parameters, oracle


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_agrees_with_the_released_code(case, kind):
    layer, parameters, oracle = _layer(case, kind)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case["method"] == "genft"], ids=lambda case: case["name"])
def test_kernels_agree_with_the_released_code(case, dtype):
    """Within twice what torch's own products at that dtype leave, and the house's ε (float32 factors in both)."""
    errors = {}
    for backend in ("reference", "triton"):
        layer, parameters, oracle = _layer(case, "Linear", dtype, backend)
        x = oracle["x"].to(dtype).requires_grad_()
        y = layer(x)
        (y.double() * oracle["cotangent"]).sum().backward()
        found = {"y": y, "grad.x": x.grad} | {f"grad.param.{name}": p.grad for name, p in parameters.items()}
        errors[backend] = {
            name: float((value.detach().double() - oracle[name]).norm() / oracle[name].norm())
            for name, value in found.items()
        }
    for name, error in errors["triton"].items():
        assert error <= 2 * errors["reference"][name] + EPSILON[dtype], (name, error, errors["reference"][name])
