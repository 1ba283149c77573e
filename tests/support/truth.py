"""What every kernel is held to: the formulas of methods with ΔW written out, in float64, differentiated by autograd.

Nothing here is shared with genft_kernels but the dropout mask, which has tests of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import genft_kernels as gk
from genft_kernels.dropout import keep_mask
from genft_kernels.gate import EPSILON  # err(kernel) <= 2 · err(torch at that dtype) + EPSILON
from genft_kernels.plan import ALGORITHMS_OF


def dropped(source: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        return source
    keep = keep_mask(seed, p, range(source.shape[0]), range(source.shape[1]))
    return source * keep / (1.0 - p)


def lowrank_linear(x, weight, p, q, bias=None, *, scale=1.0, dropout=0.0, seed=None):
    flat = x.reshape(-1, x.shape[-1])
    y = F.linear(flat, weight, bias) + scale * (dropped(flat, dropout, seed) @ p) @ q.t()
    return y.view(*x.shape[:-1], weight.shape[0])


def rescaled_linear(x, weight, p, q, gain, bias=None, *, scale=1.0, dropout=0.0, seed=None):
    flat = x.reshape(-1, x.shape[-1])
    d = dropped(flat, dropout, seed)
    y = F.linear(flat, weight, bias) + F.linear(d, gain[:, None] * (weight + scale * q @ p.t()) - weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def input_edit_linear(x, weight, psi, phi, bias=None, *, scale=1.0):
    return F.linear(x, weight + scale * (weight @ phi.t()) @ psi, bias)


def input_edit(x, psi, phi, *, scale=1.0):
    return x + scale * (x @ psi.t()) @ phi


def grouped_lowrank_linear(x, weight, p, q, bias=None, *, rows):
    """Sample by sample, each with a weight of its own."""
    plain = weight if weight is not None else x.new_zeros(q.shape[1], x.shape[-1])
    taken = [int(i) for i in rows.group]
    weights = [plain + q[g] @ p[g].t() if 0 <= g < len(p) else plain for g in taken]
    if not weights:
        return F.linear(x, plain, bias) + 0 * (p.sum() + q.sum())
    return torch.stack([F.linear(x[i], w, bias) for i, w in enumerate(weights)]) + 0 * (p.sum() + q.sum())


FUNCTIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "leakyrelu": F.leaky_relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def weight_features(weight, a, bias=None, *, ratio=1.0, activation="none", dropout=0.0, seed=None):
    z = ratio * dropped(weight, dropout, seed) @ a.t()
    return FUNCTIONS[activation](z if bias is None else z + bias)


def generated(h, b, row_bias, column_bias, activation, dropout, seed):
    z = h @ b.t()
    z = z if row_bias is None else z + row_bias[:, None]
    z = z if column_bias is None else z + column_bias
    return dropped(FUNCTIONS[activation](z), dropout, seed)


def generated_linear(
    x, weight, h, b, bias, row_bias, column_bias, *, combine="add", scale=1.0, activation="none", dropout=0.0, seed=None
):
    alone = combine == "multiply"
    update = scale * generated(h, b, row_bias, column_bias, activation, dropout, None if alone else seed)
    if alone:
        flat = dropped(x.reshape(-1, x.shape[-1]), dropout, seed)
        return F.linear(flat.view(x.shape), weight * update, bias)
    return F.linear(x, weight + (update if combine == "add" else weight * update), bias)


def generated_features(
    h, b, a, bias, column_bias, *, inner_activation="none", activation="none", dropout=0.0, seed=None
):
    z = generated(h, b, None, column_bias, activation, dropout, seed).t() @ a.t()
    return FUNCTIONS[inner_activation](z if bias is None else z + bias)


def sliced_linear(x, weight, values, indices, bias=None, *, orientation, scale=1.0):
    delta = torch.zeros_like(weight).index_copy(1 if orientation == "column" else 0, indices, scale * values.to(weight))
    return F.linear(x, weight + delta, bias)


def squared_gradient_sums(dy, x, *, orientation="row"):
    """By autograd, of a layer whose weight trains."""
    weight = x.new_zeros(dy.shape[-1], x.shape[-1], requires_grad=True)
    (gradient,) = torch.autograd.grad(F.linear(x.detach(), weight), weight, dy.detach())
    return gradient.square().sum(0 if orientation == "column" else 1)


@dataclass(frozen=True)
class Case:
    """One call of an operation: the operation, its truth, tensors by name in order, keyword arguments."""

    operation: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)


def make_case(
    name: str,
    m: int | tuple[int, ...],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout: float = 0.0,
    activation: str = "none",
    scale: float = 0.7,
) -> Case:
    """Random inputs for the operation called `name`; everything but the weight requires grad."""
    factor_dtype = factor_dtype or dtype

    def tensor(*shape: int, kind: torch.dtype = dtype, grad: bool = True, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, dtype=torch.float64, device=device)).to(kind).requires_grad_(grad)

    lead = m if isinstance(m, tuple) else (m,)
    if name == "grouped_lowrank_linear":
        lead = lead or (1,)  # it wants a batch
    x, weight = tensor(*lead, k), tensor(n, k, grad=False, size=k**-0.5)
    b = tensor(n) if bias else None
    drop = {"dropout": dropout, "seed": gk.draw_seed(device)} if dropout else {}
    if name == "lowrank_linear":
        p = tensor(k, r, kind=factor_dtype, size=k**-0.5)
        q = tensor(n, r, kind=factor_dtype)
        tensors = {"x": x, "weight": weight, "p": p, "q": q, "bias": b}
        return Case(gk.lowrank_linear, lowrank_linear, tensors, {"scale": scale, **drop})
    if name == "rescaled_linear":
        p = tensor(k, r, kind=factor_dtype, size=k**-0.5)
        q, gain = tensor(n, r, kind=factor_dtype), tensor(n, kind=factor_dtype)
        tensors = {"x": x, "weight": weight, "p": p, "q": q, "gain": gain, "bias": b}
        return Case(gk.rescaled_linear, rescaled_linear, tensors, {"scale": scale, **drop})
    if name.startswith("sliced_linear"):
        columns = name == "sliced_linear_column"
        size = k if columns else n
        indices = torch.randperm(size, device=device)[:r]
        values = tensor(*((n, len(indices)) if columns else (len(indices), k)), kind=factor_dtype, size=k**-0.5)
        tensors = {"x": x, "weight": weight, "values": values, "indices": indices, "bias": b}
        options = {"orientation": "column" if columns else "row", "scale": scale}
        return Case(gk.sliced_linear, sliced_linear, tensors, options)
    if name == "grouped_lowrank_linear":
        p, q = tensor(GROUPS, k, r, kind=factor_dtype, size=k**-0.5), tensor(GROUPS, n, r, kind=factor_dtype)
        index = torch.randint(-1, GROUPS, (lead[0],), device=device)
        index[index == 2] = 0  # one group is empty
        tensors = {"x": x, "weight": weight, "p": p, "q": q, "bias": b}
        return Case(_grouped_lowrank_linear, grouped_lowrank_linear, tensors, {"rows": gk.group_rows(index, GROUPS)})
    psi, phi = (tensor(r, k, kind=factor_dtype, size=k**-0.5) for _ in range(2))
    if name == "input_edit_linear":
        tensors = {"x": x, "weight": weight, "psi": psi, "phi": phi, "bias": b}
        return Case(gk.input_edit_linear, input_edit_linear, tensors, {"scale": scale})
    if name == "input_edit":
        return Case(gk.input_edit, input_edit, {"x": x, "psi": psi, "phi": phi}, {"scale": scale})
    if name == "weight_features":
        rank_bias = tensor(r, kind=factor_dtype) if bias else None
        options = {"ratio": scale, "activation": activation, **drop}
        return Case(gk.weight_features, weight_features, {"weight": weight, "a": psi, "bias": rank_bias}, options)
    h, factor = tensor(n, r, kind=factor_dtype), tensor(k, r, kind=factor_dtype)
    row, column = (tensor(size, kind=factor_dtype) if bias else None for size in (n, k))
    if name.startswith("generated_linear"):
        tensors = {"x": x, "weight": weight, "h": h, "b": factor, "bias": b, "row_bias": row, "column_bias": column}
        combine = name.removeprefix("generated_linear").removeprefix("_") or "add"
        options = {"combine": combine, "scale": scale, "activation": activation, **drop}
        return Case(_generated_linear, generated_linear, tensors, options)
    if name == "generated_features":
        a = tensor(r + 3, n, kind=factor_dtype, size=n**-0.5)
        rank_bias = tensor(r + 3, kind=factor_dtype) if bias else None
        tensors = {"h": h, "b": factor, "a": a, "bias": rank_bias, "column_bias": column}
        options = {"inner_activation": "tanh", "activation": activation, **drop}
        return Case(_generated_features, generated_features, tensors, options)
    raise ValueError(f"name: {name!r} is no operation")


def _grouped_lowrank_linear(x, weight, p, q, bias, *, rows, **options):
    return gk.grouped_lowrank_linear(x, weight, p, q, rows, bias, **options)


def _generated_linear(x, weight, h, b, bias, row_bias, column_bias, **options):
    return gk.generated_linear(x, weight, h, b, bias, row_bias=row_bias, column_bias=column_bias, **options)


def _generated_features(h, b, a, bias, column_bias, **options):
    return gk.generated_features(h, b, a, bias, column_bias=column_bias, **options)


def called(name: str) -> str:
    """The name in genft_kernels of one of OPERATIONS."""
    return re.sub("_(row|column|modulate|multiply)$", "", name)


# Each operation, and the algorithms that it has.
ALGORITHMS = {
    name: ("reference", *ALGORITHMS_OF[called(name)])
    for name in (
        "lowrank_linear",
        "rescaled_linear",
        "input_edit_linear",
        "input_edit",
        "weight_features",
        "grouped_lowrank_linear",
        "generated_linear",
        "generated_linear_modulate",
        "generated_features",
        "sliced_linear_row",
        "sliced_linear_column",
    )
}
# Its panels are also those of its dropout on x.
ALGORITHMS["generated_linear_multiply"] = ("reference", "fused")
ALGORITHMS["rescaled_linear"] = ("reference", "seeded")  # the others differ in the launches of lowrank_linear alone
OPERATIONS = tuple(ALGORITHMS)
GROUPS = 4  # updates in a case of the grouped operation
WITH_DROPOUT = (
    "lowrank_linear",
    "rescaled_linear",
    "weight_features",
    "generated_linear",
    "generated_linear_multiply",
    "generated_features",
)


def run(
    function: Callable[..., Tensor],
    case: Case,
    dtype: torch.dtype | None = None,
    *,
    cotangent: Tensor | None = None,
    **extra: Any,
) -> dict[str, Tensor]:
    """Output and gradients, by name, for a random `cotangent` unless there is one. With `dtype`, every tensor is cast
    to it first."""
    leaves = {}
    for name, tensor in case.tensors.items():
        if tensor is not None:
            cast = tensor.detach()
            if dtype is not None and tensor.is_floating_point():
                cast = cast.to(dtype)
            # A cast keeps the strides that the test chose; detach alone shares memory, which no call may write.
            leaves[name] = cast.requires_grad_(tensor.requires_grad)
    y = function(*(leaves.get(name) for name in case.tensors), **case.options, **extra)
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad(y, wanted, cotangent.to(y)) if wanted else ()
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    return {"y": y.detach(), **{f"grad.{name}": g for name, g in zip(names, gradients, strict=True)}}


def error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖; the plain norm where the truth is zero. NaN stays NaN and passes nothing."""
    difference = (found.double() - truth.double()).norm()
    size = truth.double().norm()
    return float(difference / size if size > 0 else difference)


def assert_close_to_truth(case: Case, dtype: torch.dtype, **extra: Any) -> None:
    """The 2× rule on the output and on every gradient."""
    truth = run(case.truth, case, torch.float64)
    torch_own = run(case.truth, case, dtype)
    found = run(case.operation, case, **extra)
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        source = name.removeprefix("grad.")
        factor = case.tensors["a"].dtype if "a" in case.tensors else dtype
        expected = factor if name == "y" else case.tensors[source].dtype
        assert found[name].dtype == expected, (name, found[name].dtype)
        budget = 2.0 * error(torch_own[name], value) + EPSILON[dtype]
        actual = error(found[name], value)
        assert actual <= budget, f"{name}: error {actual:.2e}, budget {budget:.2e}"
