"""Mixed precision: what autocast, GradScaler and half-precision weights do to nn.Linear, they do to an adapted one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genft_kernels.reference import edit, features, generated, grouped, lowrank, sliced
from genft_modules import FusedGenLinear
from tests.support.cases import CASES, DEVICE, LAYERS, REPRESENTATIVES, randomize

K, N, M = 10, 6, 7
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
# (weights, activations that arrive, autocast): the ways in which people train
SETTINGS = {
    "half base, float32 adapter": lambda half: (half, half, None),
    "half base, autocast": lambda half: (half, half, half),
    "float32 base, autocast": lambda half: (torch.float32, torch.float32, half),
    "float32 base, autocast, behind another layer": lambda half: (torch.float32, half, half),
}


def adapted(case: str, weights: torch.dtype, kind: str = "Linear", k: int = K, n: int = N) -> FusedGenLinear:
    torch.manual_seed(0)
    return randomize(FusedGenLinear.from_linear(LAYERS[kind](k, n).to(DEVICE, weights), CASES[case]())).train()


def run(layer: nn.Module, x: torch.Tensor, autocast: torch.dtype | None, scale: float = 1.0) -> torch.Tensor:
    with torch.autocast(DEVICE, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    (y.float().square().sum() * scale).backward()
    return y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
@HALVES
def test_dtypes_are_those_of_nn_linear(case, setting, half):
    weights, activations, autocast = SETTINGS[setting](half)
    layer = adapted(case, weights)
    plain = nn.Linear(K, N).to(DEVICE, weights)
    x = torch.randn(M, K, device=DEVICE).to(activations).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, want = run(layer, x, autocast), run(plain, other, autocast)
    assert y.dtype == want.dtype
    assert x.grad.dtype == other.grad.dtype == activations
    for name, parameter in layer.adapter_parameters().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name

    layer.float()
    for parameter in layer.adapter_parameters().values():
        parameter.grad = None
    wide = x.detach().float().requires_grad_()
    exact = run(layer, wide, None)
    # within what half-precision rounding of the inputs of each product costs
    room = 8 * torch.finfo(half).eps * (1 + exact.abs().max())
    assert (y.float() - exact).abs().max() <= room
    assert (x.grad.float() - wide.grad).abs().max() <= 8 * torch.finfo(half).eps * (1 + wide.grad.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_grad_scaler_skips_an_overflow_and_steps_otherwise(case):
    layer = adapted(case, torch.float32)
    optimizer = torch.optim.SGD(layer.adapter_parameters().values(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1)
    x = torch.randn(M, K, device=DEVICE)
    for blow_up in (False, True, False):
        before = [parameter.detach().clone() for parameter in layer.adapter_parameters().values()]
        scale = scaler.get_scale()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = layer(x * (1e4 if blow_up else 1.0)).float().square().mean() * (1e30 if blow_up else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, b) for p, b in zip(layer.adapter_parameters().values(), before, strict=True))
        assert moved != blow_up
        assert scaler.get_scale() == scale * (0.5 if blow_up else 2.0)
        assert all(torch.isfinite(parameter).all() for parameter in layer.adapter_parameters().values())


class Upcasts(TorchDispatchMode):
    """Every tensor of at least `least` elements and more than 16 bits that an operation makes."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.least and tensor.dtype.itemsize > 2:
                    self.found.append((str(function), tensor.dtype, tuple(tensor.shape)))
        return out


@pytest.fixture
def looked_into(monkeypatch):
    """A dispatch mode sees one of our operators as one call: this applies it to what they are made of. Returns a
    function that takes the mode and gives the list of the bodies that ran in it."""

    def look(mode: TorchDispatchMode) -> list[str]:
        ran: list[str] = []

        def within(name, body):
            def run(*args, **kwargs):
                ran.append(name)
                with mode:
                    return body(*args, **kwargs)

            return run

        for module in (lowrank, edit, features, generated, grouped, sliced):
            for name, body in list(vars(module).items()):
                if name.endswith(("_forward", "_backward")) and body.__module__ == module.__name__:
                    monkeypatch.setattr(module, name, within(name, body))
        return ran

    return look


@pytest.mark.parametrize("case", REPRESENTATIVES)
@pytest.mark.parametrize("autocast", [False, True], ids=["half base", "autocast"])
def test_no_whole_tensor_is_upcast(case, autocast, looked_into):
    """Neither x, y nor W0, forward or backward: float32 is for factors and bounded panels."""
    m, k, n = 600, 1100, 1000
    layer = adapted(case, torch.bfloat16, k=k, n=n)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    upcasts = Upcasts(min(m * k, m * n, n * k))
    ran = looked_into(upcasts)
    with upcasts, torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert {name.rpartition("_")[2] for name in ran} == {"forward", "backward"}
    assert upcasts.found == []
    x.float()
    assert upcasts.found == []
    with upcasts:
        x.float()
    assert len(upcasts.found) == 1
