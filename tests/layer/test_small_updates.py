"""N1 for whole layers: in bfloat16 every method's ΔW reaches y and dX, on average in full, at 10⁻³ of W0.

tests/kernels/test_small_updates.py has the operations; here the factors are float32, as `from_linear` keeps them, and
made from a bfloat16 W0 by each method.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genft_modules import FusedGenLinear
from tests.support.cases import CASES, randomize
from tests.support.device import DEVICE

SIDE = 512
LOW_RANK_KINDS = ("wegeft", "lora", "grft")
# An output bias of GIFT is an update of its own, which nothing scales; halves of a weight are the methods once more.
NAMES = [name for name in CASES if name != "gift_sigmoid_biases" and not name.endswith("halves")]


def gains(name: str, size: float, backend: str, **options: object) -> dict[str, float]:
    """<answer, true answer> / <true answer, true answer> of y and dX, the answer being what ΔW changes; with `options`
    of the layer's call."""
    torch.manual_seed(0)
    linear = nn.Linear(SIDE, SIDE).to(DEVICE, torch.bfloat16)
    nn.init.ones_(linear.bias)
    config = CASES[name]()
    if name.startswith("grft"):
        config.k = SIDE // 2  # a mean needs many elements
    layer = FusedGenLinear.from_linear(linear, config, backend=backend)
    randomize(layer)
    generator = layer.genft_generators["default"]

    def scale_by(factor: float) -> None:
        if "scale" in vars(generator):  # others have one that is 1 for the class
            generator.scale *= factor
            return
        parameters = layer.adapter_parameters()
        with torch.no_grad():  # ΔW is proportional to it
            parameters[next(key for key in ("psi", "values", "hira_B") if key in parameters)].mul_(factor)

    def answer() -> tuple[torch.Tensor, torch.Tensor]:
        y = layer(x, **options)
        return y.detach().double(), torch.autograd.grad(y, x, dy)[0].double()

    delta = layer.get_delta_weight().detach().double()
    scale_by(size * float(linear.weight.double().norm() / delta.norm()))
    delta = layer.get_delta_weight().detach().double()
    generator_of_x = torch.Generator(DEVICE).manual_seed(1)
    x, dy = (torch.randn(SIDE, SIDE, device=DEVICE, generator=generator_of_x).bfloat16() for _ in range(2))
    x.requires_grad_()
    with_delta = answer()
    scale_by(0.0)
    true = (x.detach().double() @ delta.t(), dy.double() @ delta)
    if "adapter_names" in options:
        for part in true:
            part[-1] = 0.0  # the last sample has no adapter
    found = [a - b for a, b in zip(with_delta, answer(), strict=True)]
    return {what: float((f * t).sum() / (t * t).sum()) for what, f, t in zip(("y", "dx"), found, true, strict=True)}


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in NAMES), *((name, "triton") for name in LOW_RANK_KINDS)]
)
def test_the_layer_answers_in_full(name, backend):
    for what, gain in gains(name, 1e-3, backend).items():
        assert abs(gain - 1) <= 0.03, (what, gain)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, backend) for name in LOW_RANK_KINDS for backend in ("reference", "triton")), ("genft_gelu", "reference")],
)
def test_so_do_mixed_batches(name, backend):
    names = ["default"] * (SIDE - 1) + ["__base__"]
    for what, gain in gains(name, 1e-3, backend, adapter_names=names).items():
        assert abs(gain - 1) <= 0.03, (what, gain)
