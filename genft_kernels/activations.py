"""The element-wise functions a generator may apply: one table, one entry per function.

An entry holds the torch function and its derivative with respect to the pre-activation z. The Triton twins live in
`genft_kernels._triton.activations` under the names `<name>` and `<name>_grad`; a test holds the two tables together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAKY_SLOPE = 0.01  # torch's and the released GenFT code's default


@dataclass(frozen=True)
class Activation:
    """An element-wise function: `forward(z)` and `derivative(z)`, both of the shape and dtype of z."""

    name: str
    forward: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _gelu_grad(z: Tensor) -> Tensor:
    cdf = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
    return cdf + z * torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))


def _sigmoid_grad(z: Tensor) -> Tensor:
    y = torch.sigmoid(z)
    return y * (1.0 - y)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("none", lambda z: z, torch.ones_like),
        Activation("relu", torch.relu, lambda z: (z > 0).to(z.dtype)),
        Activation(
            "leakyrelu",
            lambda z: torch.nn.functional.leaky_relu(z, LEAKY_SLOPE),
            lambda z: torch.where(z > 0, 1.0, LEAKY_SLOPE).to(z.dtype),
        ),
        Activation("gelu", torch.nn.functional.gelu, _gelu_grad),
        Activation("tanh", torch.tanh, lambda z: 1.0 - torch.tanh(z).square()),
        Activation("sigmoid", torch.sigmoid, _sigmoid_grad),
    )
}


def activation(name: str) -> Activation:
    """The entry called `name`. Raises ValueError that lists what exists."""
    entry = ACTIVATIONS.get(name)
    if entry is None:
        raise ValueError(f"activation: got {name!r}, expected one of {sorted(ACTIVATIONS)}")
    return entry
