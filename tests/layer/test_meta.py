"""Layers without values: what `init_empty_weights` and `torch.device("meta")` make runs, with the shapes and dtypes of
the real layer; so does a real layer under FakeTensorMode."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from genft_modules import FusedGenLinear
from tests.support.cases import CASES, IDS, LAYERS, MODELS, REPRESENTATIVES
from tests.support.grids import pairwise

K, N = 10, 6
MAKING = {"device": lambda: torch.device("meta"), "accelerate": init_empty_weights}


def make(case: str, kind: str) -> FusedGenLinear:
    return FusedGenLinear.from_linear(LAYERS[kind](K, N).to(torch.bfloat16), CASES[case]())


def uses(layer: nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    """The results of training, of inference twice, and of a mixed batch."""
    call = call or layer
    found = [call(x)]
    found[0].float().sum().backward()
    layer.eval()
    found.append(call(x, adapter_names=["default", "__base__"]))
    with torch.no_grad():
        found += [call(x), call(x), call(x, adapter_names=["default", "__base__"])]
    return found


@pytest.mark.parametrize(("case", "kind", "making"), pairwise(list(CASES), list(LAYERS), list(MAKING)))
def test_a_layer_without_values(case, kind, making):
    with MAKING[making]():
        layer = make(case, kind)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    x = torch.empty(2, 3, K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    for y in uses(layer, x):
        assert (y.shape, y.dtype, y.is_meta) == ((2, 3, N), torch.bfloat16, True)
    assert x.grad.shape == x.shape
    gradients = {name: parameter.grad for name, parameter in layer.adapter_parameters().items()}
    real = make(case, kind).adapter_parameters()
    assert {name: (one.shape, one.dtype) for name, one in gradients.items()} == {
        name: (one.shape, one.dtype) for name, one in real.items()
    }
    assert (layer.get_delta_weight().shape, layer.get_delta_weight().is_meta) == ((N, K), True)
    assert layer.low_rank_factors() is None or layer.low_rank_factors()[0].is_meta


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_under_fake_tensor_mode(case, kind, device):
    layer = make(case, kind).to(device)
    x = torch.randn(2, 3, K, dtype=torch.bfloat16, device=device)
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(tensor) for name, tensor in layer.state_dict(keep_vars=True).items()}
        fake = mode.from_tensor(x).requires_grad_()
        for y in uses(layer, fake, lambda *args, **kw: functional_call(layer, state, args, kw)):
            assert (y.shape, y.dtype, y.device.type) == ((2, 3, N), torch.bfloat16, device.type)
        assert fake.grad.shape == x.shape
    real = layer(x)
    assert (real.shape, type(real)) == ((2, 3, N), torch.Tensor)  # nothing fake was kept


@pytest.mark.parametrize("case", REPRESENTATIVES)
@pytest.mark.parametrize("making", MAKING)
def test_a_model_without_values(case, making):
    build, targets = MODELS["llama"]
    base = build().to("meta")
    with MAKING[making]():
        model = get_peft_model(base, CASES[case](target_modules=targets))
    out = model(input_ids=IDS.to("meta")).logits
    assert (out.shape, out.is_meta) == ((*IDS.shape, 61), True)
