"""The element-wise activation functions, in one table.

An entry has the torch function and its backward. The Triton versions are in `genft_kernels._triton.kernels.activations`
under the names `<name>` and `<name>_grad`; a test compares the two tables.
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

    `forward(z)` = σ(z); `forward_(z)` is in place; `backward_(grad, z)` = grad·σ'(z) in place of grad, may overwrite z.
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


def activation(name: str, argument: str = "activation") -> Activation:
    """The activation `name`. Raises ValueError with the list of names if it does not exist."""
    entry = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if entry is None:
        raise ValueError(f"{argument}: got {name!r}, expected one of {sorted(ACTIVATIONS)}")
    return entry
