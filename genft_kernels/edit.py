"""A frozen linear layer with an edited input, and the edit on its own."""

from __future__ import annotations

from torch import Tensor

from .checks import as_rows, autocast, check_activations, check_factor, check_linear, choice_of, like_rows, number
from .operation import Operation
from .plan import LaunchPlan
from .reference import edit as reference
from .reference.common import narrow

_input_edit = Operation(
    "input_edit",
    reference,
    sizes=lambda x, psi: (x.shape[0], x.shape[1], x.shape[1], psi.shape[0]),
    outputs={
        "edited": lambda x: x.new_empty(x.shape),
        "t": lambda x, psi: x.new_empty(x.shape[0], psi.shape[0]),
    },
    gradients=("x", "psi", "phi"),
)
_input_edit_linear = Operation(
    "input_edit_linear",
    reference,
    sizes=lambda x, weight, psi: (x.shape[0], *weight.shape, psi.shape[0]),
    outputs={
        "y": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]),
        "t": lambda x, psi: x.new_empty(x.shape[0], psi.shape[0]),
        "q": lambda x, weight, psi: x.new_empty((weight.shape[0], psi.shape[0]) if narrow(x) else 0),
    },
    gradients=("x", "psi", "phi"),
)


def input_edit(
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """The edit of the input only: x' = x + scale·(x ψᵀ) φ, for a base layer without a plain weight (a quantised one).

    Args:
        x: activations [..., K].
        psi: ψ [r, K], in the dtype of x or float32.
        phi: φ [r, K], likewise.
        scale, backend, plan: as in `lowrank_linear`.

    Returns:
        x' [..., K] in the dtype of x, with base(x') = x (W0 + scale·W0 φᵀ ψ)ᵀ + b. Differentiable (first order)
        in x, psi and phi.

    Source: WeGeFT (arXiv 2312.00700 v5); derivation in docs/mathematics.md.
    """
    check_activations(x)
    r = check_factor("psi", psi, x, (None, x.shape[-1]))
    check_factor("phi", phi, x, (r, x.shape[-1]))
    scale, choice = number("scale", scale), choice_of(backend, plan)
    (x,) = autocast(x)
    return like_rows(_input_edit(as_rows(x), psi, phi, scale, choice), x)


def input_edit_linear(
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with an edited input: y = (x + scale·(x ψᵀ) φ) W0ᵀ + b, equivalent to ΔW = scale·(W0 φᵀ) ψ.

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, in the dtype of x.
        psi: ψ [r, K], in the dtype of x or float32.
        phi: φ [r, K], likewise.
        bias: [N] or None, in the dtype of x.
        scale, backend, plan: as in `lowrank_linear`.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable (first order) in x, psi,
        phi and bias.

    Source: WeGeFT (arXiv 2312.00700 v5); derivation in docs/mathematics.md.
    """
    check_linear(x, weight, bias)
    r = check_factor("psi", psi, x, (None, weight.shape[1]))
    check_factor("phi", phi, x, (r, weight.shape[1]))
    scale, choice = number("scale", scale), choice_of(backend, plan)
    x, weight, bias = autocast(x, weight, bias)
    y = _input_edit_linear(as_rows(x), weight, psi, phi, bias, scale, choice)
    return like_rows(y, x)
