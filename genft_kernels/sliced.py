"""Operations on a few rows or columns of a weight: the linear layer, and the criterion for selecting them."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    as_rows,
    autocast,
    check_activations,
    check_factor,
    check_indices,
    check_linear,
    check_orientation,
    check_tensor,
    choice_of,
    like_rows,
    number,
)
from .operation import Operation
from .plan import SQUARES, LaunchPlan
from .reference import sliced as reference

_sliced_linear = Operation(
    "sliced_linear",
    reference,
    sizes=lambda x, weight, indices: (x.shape[0], *weight.shape, indices.shape[0]),
    outputs={"y": lambda x, weight: x.new_empty(x.shape[0], weight.shape[0])},
    gradients=("x", "values"),
)
_squared_gradient_sums = Operation(
    SQUARES,
    reference,
    sizes=lambda dy, x: (x.shape[0], dy.shape[1], x.shape[1], 1),
    outputs={"sums": lambda dy: dy.new_empty(dy.shape[1], dtype=torch.promote_types(dy.dtype, torch.float32))},
)


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    orientation: str = "row",
    scale: float = 1.0,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with an update of a few rows or columns: y = x (W0 + ΔW)ᵀ + b with ΔW[I] = scale·V for
    rows or ΔW[:, I] = scale·V for columns, and zero elsewhere.

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, in the dtype of x.
        values: V, [k, K] for rows or [N, k] for columns, in the dtype of x or float32.
        indices: I, int64 [k], unique rows (0 to N−1) or columns (0 to K−1). The values are not checked, which would
            synchronise a GPU; out-of-range or duplicate indices give undefined results.
        bias: [N] or None, in the dtype of x.
        orientation: "row" or "column".
        scale: s, a finite number.
        backend, plan: as in `lowrank_linear`.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable (first order) in x, values
        and bias; only the k selected rows or columns of the weight gradient are computed.

    Source: GRFT (arXiv 2507.00016); derivation in docs/mathematics.md.
    """
    check_linear(x, weight, bias)
    columns = check_orientation(orientation)
    n, k = weight.shape
    count = check_factor("values", values, x, (n, None) if columns else (None, k))
    check_indices(indices, count, k if columns else n, x)
    scale, choice = number("scale", scale), choice_of(backend, plan)
    x, weight, bias = autocast(x, weight, bias)
    y = _sliced_linear(as_rows(x), weight, values, indices, bias, columns, scale, choice)
    return like_rows(y, x)


def squared_gradient_sums(
    dy: Tensor,
    x: Tensor,
    *,
    orientation: str = "row",
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """Sums of squares of the rows or columns of a weight gradient G = dYᵀ x [N, K], which is computed tile by tile
    (panel by panel in the reference) and never materialised in full.

    Args:
        dy: gradient of the layer's output [..., N].
        x: the layer's input [..., K], with the leading dimensions, dtype and device of dy.
        orientation: "row": Σ_k G[n,k]² for each row n; "column": Σ_n G[n,k]² for each column k.
        backend, plan: as in `lowrank_linear`; the algorithm on Triton is "fused".

    Returns:
        [N] or [K], in float32 or wider. Not differentiable.

    Source: the criterion of GRFT (arXiv 2507.00016), which sums these over calibration batches.
    """
    columns = check_orientation(orientation)
    check_activations(x)
    check_tensor("dy", dy)
    if dy.dim() != x.dim() or dy.shape[:-1] != x.shape[:-1] or dy.shape[-1] == 0:
        raise ValueError(f"dy: shape {tuple(dy.shape)}, expected [..., N] with N >= 1 for x {tuple(x.shape)}")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy: dtype {dy.dtype}, expected that of x, {x.dtype}")
    if dy.device != x.device:
        raise ValueError(f"dy: on {dy.device}, expected the device of x, {x.device}")
    choice = choice_of(backend, plan)
    left, right = (tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in ((x, dy) if columns else (dy, x)))
    return _squared_gradient_sums(left, right, choice)
