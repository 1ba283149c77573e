"""What a layer keeps in inference: the same numbers, made once, and made anew when anything that they came from has
changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from genft_modules import FusedGenLinear, LoRAConfig
from tests.support.cases import CASES, DEVICE, KINDS, randomize

K, N = 10, 6


def make(case: str, dtype: torch.dtype = torch.float64) -> tuple[FusedGenLinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = randomize(FusedGenLinear.from_linear(nn.Linear(K, N).to(DEVICE, dtype), CASES[case]()))
    return layer.eval(), torch.randn(5, K, dtype=dtype, device=DEVICE)


def kept(layer: FusedGenLinear) -> object:
    return layer.kept._forms


def fresh(layer: FusedGenLinear, x: torch.Tensor) -> torch.Tensor:
    """From forms made for this call alone: with gradients none are kept."""
    return layer(x).detach()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_kept_forms_give_the_same(case, mode):
    layer, x = make(case)
    expected = fresh(layer, x)
    assert kept(layer) is None
    with mode():
        torch.testing.assert_close(layer(x), expected)
        first = kept(layer)
        torch.testing.assert_close(layer(x), expected)
    assert kept(layer) is first is not None
    with torch.no_grad():  # what was made in inference mode serves outside of it too
        torch.testing.assert_close(layer(x), expected)
    assert kept(layer) is first
    layer(x).sum().backward()  # and does not stand in the way of a gradient
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def step(layer: FusedGenLinear) -> None:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1).step()


def load(layer: FusedGenLinear, **how: bool) -> None:
    layer.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in layer.state_dict().items()}, **how)


def other_weight(layer: FusedGenLinear) -> None:
    with torch.no_grad():
        layer.base_layer.weight.mul_(2)


def another_weight(layer: FusedGenLinear) -> None:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight * 2, requires_grad=False)


def data(layer: FusedGenLinear) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data * 2


CHANGES = {
    "an optimizer's step": step,
    "load_state_dict": load,
    "load_state_dict that assigns": lambda layer: load(layer, assign=True),
    "W0 in place": other_weight,
    "another W0": another_weight,
    "other data": data,
    "a second adapter": lambda layer: (
        layer.add_adapter("b", CASES["lora"](init_lora_weights=False)),
        layer.set_adapter(["default", "b"]),
    ),
    "one merged and not": lambda layer: (layer.merge(), step(layer), layer.unmerge()),
    "a hook": lambda layer: layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output),
    "a cast": lambda layer: layer.to(torch.float32).to(torch.float64),
    "writes through .data, then eval()": lambda layer: ([p.data.mul_(2) for p in layer.parameters()], layer.eval()),
}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(case, change):
    layer, x = make(case)
    with torch.no_grad():
        before = layer(x)
        CHANGES[change](layer)
        after = layer(x)
    torch.testing.assert_close(after, fresh(layer, x))
    assert not torch.allclose(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", KINDS)
def test_training_keeps_nothing_and_lets_go(case):
    layer, x = make(case)
    with torch.no_grad():
        layer(x)
        assert kept(layer) is not None
        layer.train()
        assert kept(layer) is None
        layer(x)
        assert kept(layer) is None
        layer.eval()
        layer(x)
    assert kept(copy.deepcopy(layer)) is kept(pickle.loads(pickle.dumps(layer))) is None


@pytest.mark.parametrize("case", ["gift_mlp", "peanut", "sas", "genft", "wegeft"])
def test_a_kept_layer_does_what_lora_does(case):
    """x P, the base layer's own and t Qᵀ, as for LoRA, whatever the method."""

    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function._opname)
            return function(*args, **(kwargs or {}))

    layer, x = make(case)
    plain = FusedGenLinear.from_linear(nn.Linear(K, N).to(DEVICE, torch.float64), LoRAConfig(r=4)).eval()
    seen = {}
    for name, one in (("lora", plain), (case, layer)):
        with torch.no_grad():
            one(x)
            (form,) = one._forms(one._active_generators(), one._weight(), True)
            with Products() as mode:
                form.linear(x, one.base_layer.weight, one.base_layer.bias, "reference")
        seen[name] = mode.names
    assert seen[case] == seen["lora"]


def test_what_is_kept_is_small():
    """N·r and K·r elements beside W0's N·K, in its dtype or the factors'."""
    layer = FusedGenLinear.from_linear(nn.Linear(512, 384, device=DEVICE), CASES["wegeft"]()).eval()
    with torch.no_grad():
        layer(torch.randn(3, 512, device=DEVICE))
    (form,) = layer.kept._forms
    assert form.q.shape == (384, 4)
    assert form.p.data_ptr() == layer.genft_generators["default"].pair.psi.data_ptr()


def test_watchers_get_their_own():
    """What a dispatch mode or a compiler sees is made in its call."""
    layer, x = make("gift_mlp")

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Mode():
        layer(x)
    assert kept(layer) is None
