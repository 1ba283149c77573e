"""The element-wise functions a generator may apply: one table, one entry per function.

An entry holds the torch function and its backward. The Triton twins live in `genft_kernels._triton.activations` under
the names `<name>` and `<name>_grad`; a test holds the two tables together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAKY_SLOPE = 0.01  # torch's and the released GenFT code's default


aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An element-wise function σ of the pre-activation z.

    `forward(z)` = σ(z); `forward_(z)` the same in z's own memory; `backward_(grad, z)` = grad·σ'(z) in the memory of
    grad, which may use up z.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    forward_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("none", lambda z: z, lambda z: z, lambda grad, z: grad),
        Activation(
            "relu",
            torch.relu,
            torch.relu_,
            lambda grad, z: aten.threshold_backward(grad, z, 0.0, grad_input=grad),
        ),
        Activation(
            "leakyrelu",
            lambda z: torch.nn.functional.leaky_relu(z, LEAKY_SLOPE),
            lambda z: aten.leaky_relu_(z, LEAKY_SLOPE),
            lambda grad, z: aten.leaky_relu_backward(grad, z, LEAKY_SLOPE, False, grad_input=grad),
        ),
        Activation(
            "gelu",
            torch.nn.functional.gelu,
            aten.gelu_,
            lambda grad, z: aten.gelu_backward(grad, z, grad_input=grad),
        ),
        Activation(
            "tanh",
            torch.tanh,
            torch.tanh_,
            lambda grad, z: aten.tanh_backward(grad, z.tanh_(), grad_input=grad),
        ),
        Activation(
            "sigmoid",
            torch.sigmoid,
            torch.sigmoid_,
            lambda grad, z: aten.sigmoid_backward(grad, z.sigmoid_(), grad_input=grad),
        ),
    )
}


def activation(name: str) -> Activation:
    """The entry called `name`. Raises ValueError that lists what exists."""
    entry = ACTIVATIONS.get(name)
    if entry is None:
        raise ValueError(f"activation: got {name!r}, expected one of {sorted(ACTIVATIONS)}")
    return entry
