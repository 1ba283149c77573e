"""The operations, for the hardware gate and the sweep: what goes in, what is true, which plans may be best.

To add an operation, add an `Operation` to `OPERATIONS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import genft_kernels
from genft_kernels import gate
from genft_kernels.activations import ACTIVATIONS
from genft_kernels.dropout import keep_mask
from genft_kernels.plan import (
    ContractPlan,
    DeviceFacts,
    LaunchPlan,
    Problem,
    ProductPlan,
    SkinnyPlan,
    default_plan,
    device_facts,
)

from .shapes import DTYPES

Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Operation:
    """One public operation of genft_kernels.

    Attributes:
        name: as in genft_kernels.
        inputs: sizes of its tensors from (m, n, k, r), in the order of its arguments.
        trained: the inputs whose gradients are checked.
        activations, factors: the inputs that come in odd layouts, and those that may be float32 beside bf16.
        truth: the same function in plain PyTorch, from tensors, options and the dropout seed.
        options: keyword settings of the gate's variants.
        algorithms: what a sweep chooses between.
        form: of `shapes.PRODUCTS` where it is built around a product with W0: the floor of its time; "" otherwise.
        problem: the sizes that plans are chosen by, from (m, n, k, r).
        sweep: the settings that it is swept with, from the rank.
        function: its name in genft_kernels, where that is another.
        extra: arguments that are no drawn tensors, from those that are.
    """

    name: str
    inputs: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]
    trained: tuple[str, ...]
    activations: tuple[str, ...]
    factors: tuple[str, ...]
    truth: Callable[..., Tensor]
    options: tuple[dict[str, Any], ...] = ({},)
    algorithms: tuple[str, ...] = ("thin", "fused")
    form: str = ""
    problem: Callable[[int, int, int, int], tuple[int, int, int, int]] = lambda m, n, k, r: (m, n, k, r)
    sweep: Callable[[int], dict[str, Any]] = lambda r: {}
    function: str = ""
    extra: Callable[[Tensors], dict[str, Any]] = lambda t: {}

    def sizes(self, m: int, n: int, k: int, r: int, itemsize: int) -> Problem:
        """What a plan is chosen by."""
        return Problem(self.function or self.name, *self.problem(m, n, k, r), itemsize)

    def run(self, tensors: Tensors, options: dict[str, Any], seed: Tensor | None, **how: Any) -> Tensor:
        extra = {**self.extra(tensors), **({"seed": seed} if options.get("dropout") else {})}
        return getattr(genft_kernels, self.function or self.name)(**tensors, **options, **extra, **how)  # type: ignore[no-any-return]


def _drop(tensor: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if not p or seed is None:
        return tensor
    keep = keep_mask(seed, p, range(tensor.shape[0]), range(tensor.shape[1]))
    return torch.where(keep, tensor / (1.0 - p), 0.0)


def _lowrank(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    x = t["x"]
    low = _drop(x, o.get("dropout", 0.0), seed) @ t["p"].to(x.dtype)
    return F.linear(x, t["weight"], t.get("bias")) + o.get("scale", 1.0) * low @ t["q"].to(x.dtype).t()


def _edit(t: Tensors, o: dict[str, Any], seed: Tensor | None = None) -> Tensor:
    x = t["x"]
    return x + o.get("scale", 1.0) * (x @ t["psi"].to(x.dtype).t()) @ t["phi"].to(x.dtype)


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


def _generated_linear(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    delta = o.get("scale", 1.0) * _generated(t, o, seed)
    return F.linear(t["x"], t["weight"] + delta.to(t["weight"].dtype), t.get("bias"))


def _generated_features(t: Tensors, o: dict[str, Any], seed: Tensor | None) -> Tensor:
    z = _generated(t, o, seed).t() @ t["a"].t()
    z = z if t.get("bias") is None else z + t["bias"]
    return ACTIVATIONS[o.get("inner_activation", "none")].forward(z)


GROUPS = 4  # updates in a batch of the grouped operation


def _groups(t: Tensors) -> Tensor:
    """The group of each sample, -1 for none; the third group has no sample."""
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
    """Sums of squares of dYᵀ x over its rows, or columns; the measure has no gradient."""

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
        algorithms=("fused",),
        problem=lambda m, n, k, r: (m, *((k, n) if orientation == "column" else (n, k)), 1),
        function="squared_gradient_sums",
        extra=lambda t: {"orientation": orientation},
    )


def _released(r: int) -> dict[str, Any]:
    """The released settings of GenFT that the goals are about: gelu at r = 16, leakyrelu at r = 37."""
    return {"activation": "leakyrelu" if r == 37 else "gelu"}


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
            algorithms=("thin",),
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
            algorithms=("thin",),
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
            algorithms=("thin",),
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
        Operation(
            "generated_linear",
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
            truth=_generated_linear,
            options=(
                {"activation": "gelu", "scale": 0.5},
                {"activation": "leakyrelu"},
                {"activation": "tanh", "dropout": 0.25},
                {"activation": "relu"},
                {"activation": "sigmoid"},
                {"activation": "none", "dropout": 0.1},
            ),
            algorithms=("panel", "fused"),
            form="generated",
            sweep=_released,
        ),
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
            algorithms=("fused",),
            problem=lambda m, n, k, r: (0, n, k, r),
            sweep=_released,
        ),
    )
}


# ---- inputs


@dataclass(frozen=True)
class Check:
    """One set-up of the gate; a value that travels to a worker process."""

    operation: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    algorithm: str = "auto"
    layout: str = "plain"  # "transposed", "strided", "expanded"
    wide: bool = False  # float32 factors
    bias: bool = True
    options: int = 0

    def __str__(self) -> str:
        words = [self.operation, f"{self.m}x{self.n}x{self.k}", f"r{self.r}", self.dtype, self.algorithm]
        if self.layout != "plain":
            words.append(self.layout)
        words += ["fp32 factors"] * self.wide + ["no bias"] * (not self.bias)
        return " ".join(words + [f"{k}={v}" for k, v in OPERATIONS[self.operation].options[self.options].items()])


def draw(check: Check, device: torch.device) -> tuple[Tensors, Tensor]:
    """The operation's tensors for a check, and the output's cotangent."""
    operation = OPERATIONS[check.operation]
    generator = torch.Generator(device).manual_seed(1)
    dtype = DTYPES[check.dtype]

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    tensors = {}
    for name, shape in operation.inputs(check.m, check.n, check.k, check.r).items():
        if name.endswith("bias") and not check.bias:
            continue
        scale = shape[-1] ** -0.5 if len(shape) > 1 and name not in ("x", "dy") else 1.0
        wide = check.wide and (name in operation.factors or (name == "bias" and "x" not in tensors))
        if name in operation.activations and check.layout == "transposed":
            tensor = random(shape[::-1], dtype).t()
        elif name in operation.activations and check.layout == "strided":
            tensor = random((shape[0], 2 * shape[1] + 3), dtype)[:, 1 : 2 * shape[1] + 1 : 2]
        elif name in operation.activations and check.layout == "expanded":
            tensor = random((1, shape[1]), dtype).expand(shape)
        else:
            tensor = random(shape, torch.float32 if wide else dtype)
        tensor = tensor if tensor.stride(0) == 0 else tensor * scale
        tensors[name] = tensor.detach().requires_grad_(name in operation.trained)
    with torch.no_grad():
        out = operation.truth(tensors, {}, None)
    return tensors, random(tuple(out.shape), out.dtype)


# ---- the hardware gate

SHAPES = (
    (64, 64, 64, 16),
    (1, 16, 16, 1),
    (3, 7, 5, 2),
    (17, 33, 65, 5),
    (127, 131, 129, 13),
    (0, 32, 48, 4),
    (300, 257, 511, 64),
    (200, 1000, 1016, 37),
    (1024, 768, 768, 128),
    (33, 64, 96, 144),  # past the widest rank that the kernels take
)
VARIANT_SHAPE = (97, 80, 144, 12)
TINY_SHAPES = ((17, 33, 35, 5), (1, 16, 16, 1), (0, 32, 48, 4))


def checks(dtypes: tuple[str, ...], *, tiny: bool = False) -> list[Check]:
    """The gate's list: every operation, algorithm and dtype on every shape; every variant on one odd shape."""
    found = []
    for operation in OPERATIONS.values():
        for algorithm, dtype in itertools.product((*operation.algorithms, "auto"), dtypes):
            for shape in TINY_SHAPES if tiny else SHAPES:
                problem = operation.sizes(*shape, DTYPES[dtype].itemsize)
                # Past some rank the default is the library's product, and there are no blocks to force.
                if algorithm == "auto" or default_plan(problem, DeviceFacts()).algorithm != "reference":
                    found.append(Check(operation.name, *shape, dtype, algorithm))
            base = Check(operation.name, *(TINY_SHAPES[0] if tiny else VARIANT_SHAPE), dtype, algorithm)
            if algorithm == "auto" and tiny:
                continue
            found += [replace(base, layout=layout) for layout in ("transposed", "strided", "expanded")]
            found += [replace(base, bias=False)]
            found += [replace(base, options=index) for index in range(1, len(operation.options))]
            if dtype != "fp32" and operation.factors:
                found.append(replace(base, wide=True))
    return found


def forced_plan(check: Check, device: torch.device) -> LaunchPlan | None:
    if check.algorithm == "auto":
        return None
    itemsize = DTYPES[check.dtype].itemsize
    problem = OPERATIONS[check.operation].sizes(check.m, check.n, check.k, check.r, itemsize)
    return replace(default_plan(problem, device_facts(device)), algorithm=check.algorithm)


def run_check(
    check: Check, device: torch.device, plan: LaunchPlan | None = None, repeat: bool = True
) -> dict[str, Any]:
    """Gate of one set-up: outputs and gradients by the rule, and bit-equal when run again. {"ok", "what", ...}"""
    operation = OPERATIONS[check.operation]
    options = operation.options[check.options]
    tensors, cotangent = draw(check, device)
    seed = torch.full((1,), 1234567, dtype=torch.int64, device=device)
    plan = plan or forced_plan(check, device)
    how: dict[str, Any] = {"backend": "auto"} if plan is None else {"plan": plan}

    def run(tensors: Tensors, function: Callable[[Tensors], Tensor], dy: Tensor) -> Tensors:
        trained = {name: t for name, t in tensors.items() if name in operation.trained}
        return gate.gradients([function(tensors)], trained, [dy])

    def exact(t: Tensors) -> Tensor:
        return operation.truth(t, options, seed)

    def tested() -> Tensors:
        return run(tensors, lambda t: operation.run(t, options, seed, **how), cotangent)

    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    try:
        with gate.poisoned():
            got = tested()
            unequal = gate.differing(tested) if repeat else []
        verdict = gate.judge(
            got, run(wide, exact, cotangent.double()), run(tensors, exact, cotangent), DTYPES[check.dtype]
        )
    except Exception as error:
        return {"what": str(check), "ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
    result = {"what": str(check), **verdict.json()}
    if unequal:
        result |= {"ok": False, "error": f"not bit-equal in two runs: {', '.join(unequal)}"}
    return result


def large_offset_check(device: torch.device) -> dict[str, Any]:
    """x with more than 2³¹ elements: the last rows of y and dX must be right."""
    m, n, k, r = (1 << 31) // 4096 + 1000, 64, 4096, 16
    tail = slice(m - 512, m)
    draw_one = torch.Generator(device).manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=draw_one, dtype=torch.bfloat16)

    x, weight, dy = random(m, k).requires_grad_(), random(n, k) / 64, random(m, n)
    psi, phi = ((random(r, k) / 64).requires_grad_() for _ in range(2))

    def run(x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, dy: Tensor, function: Any) -> Tensors:
        return gate.gradients([function(x, weight, psi, phi)], {"x": x}, [dy])

    def plain(x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor) -> Tensor:
        return F.linear(x + (x @ psi.t()) @ phi, weight)

    got = {name: t[tail] for name, t in run(x, weight, psi, phi, dy, genft_kernels.input_edit_linear).items()}
    cut = [x.detach()[tail].requires_grad_(), weight, psi, phi, dy[tail]]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in cut]
    verdict = gate.judge(got, run(*wide, plain), run(*cut, plain), torch.bfloat16)
    return {"what": f"input_edit_linear {m}x{n}x{k} r{r} bf16, offsets past 2^31", **verdict.json()}


# ---- plans worth measuring

# Blocks m, n, k, group, warps, stages of a fused product.
PRODUCTS = (
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 128, 32, 8, 8, 3),
    (128, 256, 64, 8, 8, 3),
    (256, 128, 64, 8, 8, 3),
    (128, 128, 128, 8, 8, 2),
    (64, 128, 64, 8, 4, 4),
    (64, 64, 64, 8, 4, 4),
    (16, 128, 128, 8, 4, 4),
)


def candidates(problem: Problem, operation: Operation, facts: DeviceFacts) -> list[LaunchPlan]:
    """Plans to measure for a problem, the default first; duplicates left out. Those that the card cannot run (shared
    memory, registers) fail or lose; they are not guessed here."""
    default = default_plan(problem, facts)
    half = 2 if problem.itemsize >= 4 else 1
    found = [default, LaunchPlan("reference")]
    if operation.form == "generated" or operation.name == "generated_features":
        found += _generated_candidates(default, operation, facts, half)
    elif operation.algorithms == ("fused",):
        found += _product_candidates(default, half)
    else:
        found += _low_rank_candidates(default, operation, problem.m, facts, half)
    return list(dict.fromkeys(plan for plan in found if plan.algorithm in (*operation.algorithms, "reference")))


def _low_rank_candidates(
    default: LaunchPlan, operation: Operation, m: int, facts: DeviceFacts, half: int
) -> list[LaunchPlan]:
    found = []
    for rows, columns, warps, stages in (
        (32, 128, 4, 3),
        (64, 32, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (64, 256, 8, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 3),
        (16, 256, 4, 3),
        (32, 256, 4, 2),
    ):
        for per_processor in (1, 2):
            groups = max(1, min(per_processor * facts.processors, -(-m // rows)))
            skinny = SkinnyPlan(max(16, rows // half), max(32, columns // half), groups, warps, stages)
            found.append(replace(default, algorithm="thin", skinny=skinny))
    return found + (_product_candidates(default, half) if "fused" in operation.algorithms else [])


def _product_candidates(default: LaunchPlan, half: int) -> list[LaunchPlan]:
    """Blocks of the fused product."""
    return [
        replace(
            default,
            algorithm="fused",
            product=ProductPlan(max(16, m // half), max(16, n // half), max(16, k // half), group, warps, stages),
        )
        for m, n, k, group, warps, stages in PRODUCTS
    ]


def _generated_candidates(default: LaunchPlan, operation: Operation, facts: DeviceFacts, half: int) -> list[LaunchPlan]:
    """Panel sizes against the L2, blocks of the passes over the generated matrix, blocks of the fused product."""
    found = []
    contracts = [
        ContractPlan(n // half, k // half, depth, groups * facts.processors, warps, stages, atomic)
        for n, k, depth, groups, warps, stages, atomic in (
            (64, 64, 32, 1, 8, 2, False),
            (64, 64, 64, 1, 4, 3, False),
            (64, 128, 64, 1, 8, 3, False),
            (128, 64, 64, 1, 8, 3, False),
            (128, 128, 64, 1, 8, 3, False),
            (128, 128, 32, 1, 8, 4, False),
            (64, 64, 64, 2, 4, 3, False),
            (128, 128, 64, 2, 8, 3, False),
        )
    ]
    for algorithm in operation.algorithms:
        found += [replace(default, algorithm=algorithm, contract=contract) for contract in contracts]
    if "panel" in operation.algorithms:
        for panel in (1 << 19, 1 << 21, 1 << 22, 1 << 23):
            contract = replace(default.contract, panel=panel)
            found.append(replace(default, algorithm="panel", contract=contract))
        found += _product_candidates(default, half)
    return found
