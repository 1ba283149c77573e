"""The formula of each operation in plain PyTorch, and its inputs, for the correctness gate and the tuner.

To add an operation, add an `Operation` to `OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import genft_kernels

from .activations import ACTIVATIONS
from .dropout import keep_mask
from .gate import Verdict, gradients, judge
from .plan import Problem

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Operation:
    """One public operation of genft_kernels.

    Attributes:
        name: as in genft_kernels.
        inputs: shapes of its tensors from (m, n, k, r), in the order of its arguments.
        trained: the inputs whose gradients are checked.
        activations, factors: the inputs tested with other layouts, and those that may be float32 with bf16 activations.
        truth: the same function in plain PyTorch, of tensors, options and the dropout seed.
        options: keyword arguments of the variants to check.
        form: for an operation built around a product with W0, whose time is its baseline: "lowrank" (W0 is frozen in
            the baseline) or "generated" (W0 is trained in it); else "".
        problem: the sizes for choosing a plan, from (m, n, k, r).
        sweep: keyword arguments for timing, from the rank.
        function: its name in genft_kernels, if different from `name`.
        extra: other arguments, from the drawn tensors.
    """

    name: str
    inputs: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]
    trained: tuple[str, ...]
    activations: tuple[str, ...]
    factors: tuple[str, ...]
    truth: Callable[..., Tensor]
    options: tuple[dict[str, Any], ...] = ({},)
    form: str = ""
    problem: Callable[[int, int, int, int], tuple[int, int, int, int]] = lambda m, n, k, r: (m, n, k, r)
    sweep: Callable[[int], dict[str, Any]] = lambda r: {}
    function: str = ""
    extra: Callable[[Tensors], dict[str, Any]] = lambda t: {}

    @property
    def called(self) -> str:
        """Its name in genft_kernels and in plans."""
        return self.function or self.name

    def sizes(self, m: int, n: int, k: int, r: int, itemsize: int) -> Problem:
        """The problem for choosing a plan."""
        return Problem(self.called, *self.problem(m, n, k, r), itemsize)

    def run(self, tensors: Tensors, options: dict[str, Any], seed: Tensor | None, **how: Any) -> Tensor:
        extra = {**self.extra(tensors), **({"seed": seed} if options.get("dropout") else {})}
        return getattr(genft_kernels, self.called)(**tensors, **options, **extra, **how)  # type: ignore[no-any-return]


def _drop(tensor: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if not p or seed is None:
        return tensor
    keep = keep_mask(seed, p, range(tensor.shape[0]), range(tensor.shape[1]))
    return torch.where(keep, tensor / (1.0 - p), 0.0)


def _lowrank(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    x = t["x"]
    low = _drop(x, o.get("dropout", 0.0), seed) @ t["p"].to(x.dtype)
    y: Tensor = F.linear(x, t["weight"], t.get("bias")) + (low * o.get("scale", 1.0)) @ t["q"].to(x.dtype).t()
    return y


def _rescaled(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    x, gain = t["x"], t["gain"].to(t["x"].dtype)
    d = _drop(x, o.get("dropout", 0.0), seed)
    z = F.linear(d, t["weight"]) + (d @ t["p"].to(x.dtype) * o.get("scale", 1.0)) @ t["q"].to(x.dtype).t()
    y: Tensor = gain * z + F.linear(x - d, t["weight"], t.get("bias"))
    return y


def _edit(t: Tensors, o: dict[str, Any], seed: Tensor | None = None) -> Tensor:
    x = t["x"]
    edited: Tensor = x + (x @ t["psi"].to(x.dtype).t() * o.get("scale", 1.0)) @ t["phi"].to(x.dtype)
    return edited


def _features(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    w = t["weight"]
    z = o.get("ratio", 1.0) * _drop(w, o.get("dropout", 0.0), seed) @ t["a"].to(w.dtype).t()
    bias = t.get("bias")
    z = z.to(t["a"].dtype) if bias is None else z.to(t["a"].dtype) + bias
    return ACTIVATIONS[o.get("activation", "none")].forward(z)


def _generated(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    z = t["h"] @ t["b"].t()
    for name in ("row_bias", "column_bias"):
        if name in t:
            z = z + (t[name][:, None] if name == "row_bias" else t[name])
    return _drop(ACTIVATIONS[o.get("activation", "none")].forward(z), o.get("dropout", 0.0), seed)


def _generated_linear(t: Tensors, o: dict[str, Any], seed: Tensor | None, *, combine: str) -> Tensor:
    x, w = t["x"], t["weight"]
    if combine == "multiply":
        x, seed = _drop(x, o.get("dropout", 0.0), seed), None
    delta = (o.get("scale", 1.0) * _generated(t, o, seed)).to(w.dtype)
    delta = delta if combine == "add" else w * delta
    return F.linear(x, delta if combine == "multiply" else w + delta, t.get("bias"))


def _generated_features(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    z = _generated(t, o, seed).t() @ t["a"].t()
    z = z if t.get("bias") is None else z + t["bias"]
    return ACTIVATIONS[o.get("inner_activation", "none")].forward(z)


GROUPS = 4  # updates in a batch of the grouped operation


def _groups(t: Tensors) -> Tensor:
    """The group of each sample, -1 for none; the third group is empty."""
    index = torch.arange(t["x"].shape[0], device=t["x"].device) * 7 % (GROUPS + 1) - 1
    return torch.where(index == 2, 0, index)


def _grouped(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    x, groups = t["x"], _groups(t)
    y = F.linear(x, t["weight"], t.get("bias"))
    for group, (p, q) in enumerate(zip(t["p"].to(x.dtype), t["q"].to(x.dtype), strict=True)):
        y = y + torch.where(groups[:, None] == group, (x @ p) @ q.t(), 0.0)
    return y


def _slices(t: Tensors, columns: bool) -> Tensor:
    """Rows or columns spread over the whole weight."""
    size, count = t["weight"].shape[columns], t["values"].shape[columns]
    return torch.arange(count, device=t["weight"].device) * (size // count)


def _sliced(t: Tensors, o: dict[str, Any], seed: Tensor | None, *, columns: bool) -> Tensor:
    w = t["weight"]
    delta = torch.zeros_like(w).index_copy(int(columns), _slices(t, columns), o.get("scale", 1.0) * t["values"].to(w))
    return F.linear(t["x"], w + delta, t.get("bias"))


def _squares(orientation: str) -> Operation:
    """Sums of squares of the rows or columns of dYᵀ x; not differentiable."""

    def truth(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
        gradient = t["dy"].t() @ t["x"]
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(int(orientation == "row"))

    return Operation(
        f"squared_gradient_sums_{orientation}",
        lambda m, n, k, r: {"dy": (m, n), "x": (m, k)},
        trained=(),
        activations=("dy", "x"),
        factors=(),
        truth=truth,
        problem=lambda m, n, k, r: (m, *((k, n) if orientation == "column" else (n, k)), 1),
        function="squared_gradient_sums",
        extra=lambda t: {"orientation": orientation},
    )


def _released(r: int) -> dict[str, Any]:
    """The activations of GenFT's released settings: gelu for r = 16, leakyrelu for r = 37."""
    return {"activation": "leakyrelu" if r == 37 else "gelu"}


def _generated_operation(combine: str, *options: dict[str, Any]) -> Operation:
    """A product with W0 and a generated matrix, for one way of combining them."""
    return Operation(
        "generated_linear" if combine == "add" else f"generated_linear_{combine}",
        lambda m, n, k, r: {
            "x": (m, k),
            "weight": (n, k),
            "h": (n, r),
            "b": (k, r),
            "bias": (n,),
            "row_bias": (n,),
            "column_bias": (k,),
        },
        trained=("x", "h", "b", "bias", "row_bias", "column_bias"),
        activations=("x", "weight"),
        factors=("h", "b", "row_bias", "column_bias"),
        truth=partial(_generated_linear, combine=combine),
        options=options,
        form="generated",
        sweep=_released,
        function="generated_linear",
        extra=lambda t: {"combine": combine},
    )


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "lowrank_linear",
            lambda m, n, k, r: {"x": (m, k), "weight": (n, k), "p": (k, r), "q": (n, r), "bias": (n,)},
            trained=("x", "p", "q", "bias"),
            activations=("x", "weight"),
            factors=("p", "q"),
            truth=_lowrank,
            options=({"scale": 2.0}, {"scale": 0.5, "dropout": 0.25}),
            form="lowrank",
        ),
        Operation(
            "rescaled_linear",
            lambda m, n, k, r: {"x": (m, k), "weight": (n, k), "p": (k, r), "q": (n, r), "gain": (n,), "bias": (n,)},
            trained=("x", "p", "q", "gain", "bias"),
            activations=("x", "weight"),
            factors=("p", "q", "gain"),
            truth=_rescaled,
            options=({"scale": 2.0}, {"scale": 0.5, "dropout": 0.25}),
        ),
        Operation(
            "input_edit_linear",
            lambda m, n, k, r: {"x": (m, k), "weight": (n, k), "psi": (r, k), "phi": (r, k), "bias": (n,)},
            trained=("x", "psi", "phi", "bias"),
            activations=("x", "weight"),
            factors=("psi", "phi"),
            truth=lambda t, o, seed: F.linear(_edit(t, o), t["weight"], t.get("bias")),
            options=({"scale": 2.0},),
            form="lowrank",
        ),
        Operation(
            "input_edit",
            lambda m, n, k, r: {"x": (m, k), "psi": (r, k), "phi": (r, k)},
            trained=("x", "psi", "phi"),
            activations=("x",),
            factors=("psi", "phi"),
            truth=_edit,
            options=({"scale": 2.0},),
            problem=lambda m, n, k, r: (m, k, k, r),
        ),
        Operation(
            "weight_features",
            lambda m, n, k, r: {"weight": (n, k), "a": (r, k), "bias": (r,)},
            trained=("a", "bias"),
            activations=("weight",),
            factors=("a",),
            truth=_features,
            options=({}, {"ratio": 0.5, "dropout": 0.25, "activation": "gelu"}, {"activation": "leakyrelu"}),
            problem=lambda m, n, k, r: (n, n, k, r),
        ),
        Operation(
            "grouped_lowrank_linear",
            lambda m, n, k, r: {
                "x": (m, k),
                "weight": (n, k),
                "p": (GROUPS, k, r),
                "q": (GROUPS, n, r),
                "bias": (n,),
            },
            trained=("x", "p", "q", "bias"),
            activations=("x", "weight"),
            factors=("p", "q"),
            truth=_grouped,
            extra=lambda t: {"rows": genft_kernels.group_rows(_groups(t), GROUPS)},
        ),
        Operation(
            "sliced_linear_row",
            lambda m, n, k, r: {"x": (m, k), "weight": (n, k), "values": (min(r, n), k), "bias": (n,)},
            trained=("x", "values", "bias"),
            activations=("x", "weight"),
            factors=("values",),
            truth=lambda t, o, seed: _sliced(t, o, seed, columns=False),
            options=({"scale": 2.0},),
            function="sliced_linear",
            extra=lambda t: {"indices": _slices(t, False), "orientation": "row"},
        ),
        Operation(
            "sliced_linear_column",
            lambda m, n, k, r: {"x": (m, k), "weight": (n, k), "values": (n, min(r, k)), "bias": (n,)},
            trained=("x", "values", "bias"),
            activations=("x", "weight"),
            factors=("values",),
            truth=lambda t, o, seed: _sliced(t, o, seed, columns=True),
            options=({"scale": 2.0},),
            function="sliced_linear",
            extra=lambda t: {"indices": _slices(t, True), "orientation": "column"},
        ),
        _squares("row"),
        _squares("column"),
        _generated_operation(
            "add",
            {"activation": "gelu", "scale": 0.5},
            {"activation": "leakyrelu"},
            {"activation": "tanh", "dropout": 0.25},
            {"activation": "relu"},
            {"activation": "sigmoid"},
            {"activation": "none", "dropout": 0.1},
        ),
        _generated_operation("modulate", {"scale": 2.0}, {"activation": "gelu", "dropout": 0.25}),
        _generated_operation("multiply", {"scale": 2.0}, {"dropout": 0.25}),
        Operation(
            "generated_features",
            lambda m, n, k, r: {"h": (n, r), "b": (k, r), "a": (r, n), "bias": (r,), "column_bias": (k,)},
            trained=("h", "b", "a", "bias", "column_bias"),
            activations=("h", "b"),
            factors=(),
            truth=_generated_features,
            options=(
                {"activation": "gelu", "inner_activation": "gelu"},
                {"activation": "leakyrelu"},
                {"activation": "tanh", "dropout": 0.25},
            ),
            problem=lambda m, n, k, r: (0, n, k, r),
            sweep=_released,
        ),
    )
}


def draw(
    operation: Operation,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    layout: str = "plain",
    wide: bool = False,
    bias: bool = True,
) -> tuple[Tensors, Tensor]:
    """Random inputs for an operation of sizes (m, n, k, r), and a cotangent for its output.

    Args:
        layout: memory layout of the activations: "plain", "transposed", "strided" or "expanded".
        wide: factors in float32.
        bias: whether to include biases.
    """
    generator = torch.Generator(device).manual_seed(1)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    tensors: Tensors = {}
    for name, shape in operation.inputs(*sizes).items():
        if name.endswith("bias") and not bias:
            continue
        scale = shape[-1] ** -0.5 if len(shape) > 1 and name not in ("x", "dy") else 1.0
        widened = wide and (name in operation.factors or (name == "bias" and "x" not in tensors))
        if name in operation.activations and layout == "transposed":
            tensor = random(shape[::-1], dtype).t()
        elif name in operation.activations and layout == "strided":
            tensor = random((shape[0], 2 * shape[1] + 3), dtype)[:, 1 : 2 * shape[1] + 1 : 2]
        elif name in operation.activations and layout == "expanded":
            tensor = random((1, shape[1]), dtype).expand(shape)
        else:
            tensor = random(shape, torch.float32 if widened else dtype)
        tensor = tensor if tensor.stride(0) == 0 else tensor * scale
        tensors[name] = tensor.detach().requires_grad_(name in operation.trained)
    with torch.no_grad():
        out = operation.truth(tensors, {}, None)
    return tensors, random(tuple(out.shape), out.dtype)


@dataclass
class Examination:
    """Comparison of an operation on given tensors with its formula in float64: output and gradients, by the rule of
    `genft_kernels.gate`. The truth is computed once."""

    operation: Operation
    tensors: Tensors
    cotangent: Tensor
    options: dict[str, Any]
    dtype: torch.dtype

    @cached_property
    def seed(self) -> Tensor:
        return torch.full((1,), 1234567, dtype=torch.int64, device=self.cotangent.device)

    def results(self, **how: Any) -> Tensors:
        """Output and gradients by name; `how`: `plan` or `backend` of the operation."""
        return self._gradients(lambda t: self.operation.run(t, self.options, self.seed, **how), self.tensors)

    def verdict(self, got: Tensors) -> Verdict:
        return judge(got, *self._expected, self.dtype)

    @cached_property
    def _expected(self) -> tuple[Tensors, Tensors]:
        """The truth, and the results of plain PyTorch at this dtype."""
        double = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in self.tensors.items()}
        found = [
            self._gradients(lambda t: self.operation.truth(t, self.options, self.seed), tensors)
            for tensors in (double, self.tensors)
        ]
        return found[0], found[1]

    def _gradients(self, function: Callable[[Tensors], Tensor], tensors: Tensors) -> Tensors:
        trained = {name: t for name, t in tensors.items() if name in self.operation.trained}
        out = function(tensors)
        return gradients([out], trained, [self.cotangent.to(out.dtype)])
