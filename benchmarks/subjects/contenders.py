"""Who runs: one registry for every suite, gate and sweep.

To add a method of ours, add a `Method`: its naive version, the operations with each algorithm forced, the module, its
place in the suites, the goals and the whole model follow from it. To add a peer, add a `Contender` to `PEERS`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import genft_kernels
import genft_modules
from benchmarks.measure.shapes import Case
from benchmarks.subjects import naive
from benchmarks.subjects.operations import forced
from genft_kernels.dropout import keep_mask
from genft_kernels.plan import (
    ALGORITHMS_OF,
    LIBRARY,
    LaunchPlan,
    Problem,
    choose_plan,
    device_facts,
    resolve,
    triton_can_run,
)

Build = Callable[[nn.Linear, Case], nn.Module]


@dataclass(frozen=True)
class Method:
    """A method of ours.

    Attributes:
        name: as in `genft_modules.METHODS`, with the setting where there are several.
        form: "lowrank", "generated" or "slices": which floor it is held to.
        naive: the class that builds ΔW in full; in float64 it is the truth.
        config, fields: the config class's name in genft_modules, and its fields at rank r. Where genft_modules does not
            have the class yet, only the naive version runs.
        operation: the operation that makes y, for the plan that a result file names.
        apply: y through the operations from a naive layer's tensors, taking `backend=` or `plan=`: then every algorithm
            of `operation` runs on its own too, the library's among them; None where only the module is measured, by its
            own choice and on the library.
        model: the layers of a language model that its paper adapts, and the rank there.
        ready: what its layer needs before it can be applied, from the layer and the naive one.
    """

    name: str
    form: str
    naive: type[naive.Naive]
    config: str
    fields: Callable[[int], dict[str, Any]]
    operation: str
    apply: Callable[..., Tensor] | None = None
    model: tuple[tuple[str, ...], int] = (("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 64)
    ready: Callable[[nn.Module, naive.Naive], None] | None = None


def _genft(own: type[naive.NaiveGenft], r: int) -> dict[str, Any]:
    shared, specific = own.split(r)
    return {
        "generator_share_dim": shared,
        "individual_features": specific,
        "ratio_W0": own.ratio,
        "scaling": own.scale,
        "inner_activation": own.inner,
        "outer_activation": own.outer,
    }


def _select(layer: nn.Module, own: naive.NaiveGrft) -> None:
    layer.genft_generators["default"].select(own.indices)


def _apply_genft(own: naive.NaiveGenft, x: Tensor, **how: Any) -> Tensor:
    """Both stages; `how` is for the last operation, which is where the product is."""
    a1, b1, a2, b2 = own.factors()
    h1 = genft_kernels.weight_features(own.weight, a1, own.bias_1_a, ratio=own.ratio, activation=own.inner)
    h2 = genft_kernels.generated_features(
        h1, b1, a2, own.bias_2_a, column_bias=own.bias_1_b, inner_activation=own.inner, activation=own.outer
    )
    return genft_kernels.generated_linear(
        x, own.weight, b2, h2, own.bias, row_bias=own.bias_2_b, scale=own.scale, activation=own.outer, **how
    )


METHODS = (
    Method(
        "wegeft",
        "lowrank",
        naive.NaiveWegeft,
        "WeGeFTConfig",
        lambda r: {"r": r, "wegeft_alpha": naive.NaiveWegeft.scale * r},
        "input_edit_linear",
        lambda own, x, **how: genft_kernels.input_edit_linear(
            x, own.weight, own.psi, own.phi, own.bias, scale=own.scale, **how
        ),
    ),
    Method(
        "lora",
        "lowrank",
        naive.NaiveLora,
        "LoRAConfig",
        lambda r: {"r": r, "lora_alpha": naive.NaiveLora.scale * r},
        "lowrank_linear",
        lambda own, x, **how: genft_kernels.lowrank_linear(
            x, own.weight, own.lora_A.t(), own.lora_B, own.bias, scale=own.scale, **how
        ),
    ),
    Method("gift", "lowrank", naive.NaiveGift, "GIFTConfig", lambda r: {"r": r}, "input_edit_linear"),
    Method(
        "sas",
        "lowrank",
        naive.NaiveSas,
        "SaSConfig",
        lambda r: dict(zip(("r_shared", "r_specific"), naive.NaiveSas.split(r), strict=True)),
        "lowrank_linear",
    ),
    Method("peanut", "lowrank", naive.NaivePeanut, "PeanutConfig", lambda r: {"r": r}, "lowrank_linear"),
    Method(
        "hira",
        "generated",
        naive.NaiveHira,
        "HiRAConfig",
        lambda r: {"r": r},
        "generated_linear",
        lambda own, x, **how: genft_kernels.generated_linear(
            x, own.weight, own.hira_B, own.hira_A.t(), own.bias, combine="modulate", **how
        ),
        (("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 32),
    ),
    *(
        Method(
            f"grft-{orientation}",
            "slices",
            own,
            "GRFTConfig",
            # A random choice for whole models; a layer of its own is given the naive one's.
            lambda r, orientation=orientation: {"k": r, "orientation": orientation, "selection": "random"},
            "sliced_linear",
            lambda own, x, orientation=orientation, **how: genft_kernels.sliced_linear(
                x, own.weight, own.values, own.indices, own.bias, orientation=orientation, **how
            ),
            model=(("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 16),
            ready=_select,
        )
        for orientation, own in (("row", naive.NaiveGrft), ("column", naive.NaiveGrftColumns))
    ),
    *(
        Method(
            name,
            form,
            own,
            "GenFTConfig",
            partial(_genft, own),
            "generated_linear" if form == "generated" else "lowrank_linear",
            _apply_genft if form == "generated" else None,
            (("q_proj", "v_proj"), 8),
        )
        for name, form, own in (
            ("genft-linear", "lowrank", naive.NaiveGenftLinear),
            ("genft-gelu", "generated", naive.NaiveGenft),
            ("genft-leakyrelu", "generated", naive.NaiveGenftLeaky),
        )
    ),
)


@dataclass(frozen=True)
class Contender:
    """One way to run a layer.

    Attributes:
        name: as tables show it.
        kind: "floor", "genft", "naive" or "peer".
        method: what it computes.
        form: whose floor it is held to, a key of `shapes.PRODUCTS`.
        build: the layer from a frozen `nn.Linear` (kept, not copied) and a case.
        twin: a plain-PyTorch module of the same function, with parameters of the same names on tensors of its own;
            in float64 it is the truth, in the case's dtype the error that is allowed. None: a deep copy of the layer.
        compiled: whether torch.compile is put around it.
        operation, algorithm: the operation of ours that makes y, and the algorithm it is told to use ("": its choice).
        needs: a package that has to be importable.
        kinked: an activation of the method has a kink, see `gate.judge`.
    """

    name: str
    kind: str
    method: str
    form: str
    build: Build
    twin: Callable[[nn.Module, nn.Linear, Case], nn.Module] | None = None
    compiled: bool = False
    operation: str = ""
    algorithm: str = ""
    needs: str = ""
    kinked: bool = False

    def missing(self, device: torch.device) -> str:
        """Why it cannot run on `device`; empty if it can."""
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.algorithm not in ("", *LIBRARY) and not triton_can_run(device):
            return f"{self.algorithm}: Triton does not run on {device.type}"
        return ""

    def plan(self, case: Case, n: int | None = None) -> LaunchPlan | None:
        """What our operation runs for a layer of the case (its first, unless `n` says which). None where there is no
        such operation, or none with this algorithm."""
        if self.operation not in ALGORITHMS_OF:
            return None
        n = case.shape.n[0] if n is None else n
        if not self.algorithm:
            return resolve("auto", self.operation, case.shape.m, n, case.shape.k, case.r, case.dtype, case.device)
        problem = Problem(self.operation, case.shape.m, n, case.shape.k, case.r, case.itemsize)
        facts = device_facts(case.device)
        chosen = choose_plan(problem, facts)
        return chosen if chosen.algorithm == self.algorithm else forced(problem, facts, self.algorithm)


def trainable(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a layer trains, by name; of ours by the released name."""
    if isinstance(layer, genft_modules.FusedGenLinear):
        return layer.adapter_parameters("default")
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


# ---- ours


class Kernel(nn.Module):
    """The operations on a naive layer's tensors, without the module around them."""

    def __init__(self, own: naive.Naive, apply: Callable[..., Tensor], plan: LaunchPlan | None) -> None:
        super().__init__()
        self.own, self.apply_operation, self.plan = own, apply, plan

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_operation(self.own, x, plan=self.plan)


def _copied(own: dict[str, nn.Parameter], twin: naive.Naive) -> naive.Naive:
    with torch.no_grad():
        for name, parameter in trainable(twin).items():
            parameter.copy_(own[name])
    return twin


def _naive(method: Method) -> Contender:
    return Contender(
        f"naive-{method.name}",
        "naive",
        method.name,
        method.form,
        lambda linear, case: method.naive(linear, case.r),
        kinked=method.naive.kinked,
    )


def _module(method: Method, algorithm: str = "") -> Contender:
    """The layer; `algorithm`: "library" or its own choice."""

    def build(linear: nn.Linear, case: Case) -> nn.Module:
        config = getattr(genft_modules, method.config)(**method.fields(case.r))
        backend = "reference" if algorithm else "auto"
        layer = genft_modules.FusedGenLinear.from_linear(linear, config, backend=backend)
        if method.ready is not None:
            method.ready(layer, method.naive(linear, case.r))
        return layer.to(case.dtype)

    def twin(layer: nn.Module, linear: nn.Linear, case: Case) -> nn.Module:
        return _copied(trainable(layer), method.naive(linear, case.r))

    return Contender(
        f"genft-{method.name}" + f"-{algorithm}" * bool(algorithm),
        "genft",
        method.name,
        method.form,
        build,
        twin,
        operation=method.operation,
        algorithm=algorithm,
        kinked=method.naive.kinked,
    )


def _kernel(method: Method, algorithm: str) -> Contender:
    def build(linear: nn.Linear, case: Case) -> nn.Module:
        plan = contender.plan(case, linear.out_features)
        if plan is None:
            raise ValueError(f"{algorithm}: there are no blocks for {case}")
        return Kernel(method.naive(linear, case.r), method.apply, plan)

    def twin(layer: nn.Module, linear: nn.Linear, case: Case) -> nn.Module:
        own = {name.removeprefix("own."): p for name, p in trainable(layer).items()}
        return _copied(own, method.naive(linear, case.r))

    contender = Contender(
        f"genft-{method.name}-{algorithm}",
        "genft",
        method.name,
        method.form,
        build,
        twin,
        operation=method.operation,
        algorithm=algorithm,
        kinked=method.naive.kinked,
    )
    return contender


class Released(nn.Module):
    """A naive layer as GenFT's released code applies it: x ΔWᵀ is a product of its own, added to that with W0."""

    def __init__(self, own: naive.Naive) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.own.weight, self.own.bias) + nn.functional.linear(x, self.own.delta())


def _released(method: Method) -> Contender:
    return replace(
        _naive(method),
        name=f"released-{method.name}",
        build=lambda linear, case: Released(method.naive(linear, case.r)),
    )


def _ours(method: Method) -> list[Contender]:
    found = [_naive(method)]
    if method.form == "generated":  # with ΔW in one product, under torch.compile too, and in a product of its own
        compiled = replace(_naive(method), name=f"naive-{method.name}-compiled", compiled=True)
        found += [compiled, _released(method)]
    if hasattr(genft_modules, method.config):
        found.append(_module(method))
    if method.apply is not None:
        found += [_kernel(method, algorithm) for algorithm in (*ALGORITHMS_OF[method.operation], "library")]
    elif hasattr(genft_modules, method.config):
        found.append(_module(method, "library"))
    return found


# ---- floors and peers


def _frozen(linear: nn.Linear, case: Case) -> nn.Module:
    return linear


def _trainable(linear: nn.Linear, case: Case) -> nn.Module:
    """The weight is trained, a bias is not: what an update of full rank cannot do without."""
    own = nn.Linear(linear.in_features, linear.out_features, bias=False, device=case.device, dtype=case.dtype)
    own.weight = nn.Parameter(linear.weight.detach().clone())
    own.bias = linear.bias
    return own


def _peft(config: Callable[[int], Any]) -> Build:
    """peft's own layer. Its parameters are in the model's dtype, as ours are: float32 ones would make peft cast x."""

    def build(linear: nn.Linear, case: Case) -> nn.Module:
        holder = nn.ModuleDict({"layer": linear})
        model = peft.get_peft_model(holder, config(case.r), autocast_adapter_dtype=False)
        return model.base_model.model["layer"].to(case.dtype)

    return build


def _lora(r: int, **more: Any) -> Any:
    return peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["layer"], **more)


class Reseeded(nn.Module):
    """A layer with dropout that draws the same mask in every call, so that the gate can compare calls."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        y: Tensor = self.layer(x)
        return y


class SeededDropout(nn.Module):
    """Dropout with the mask that our operations draw."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        keep = keep_mask(genft_kernels.draw_seed(x.device), self.p, range(x.shape[0]), range(x.shape[1]))
        return torch.where(keep, x / (1.0 - self.p), 0.0)


def _dropping(build: Build) -> Build:
    return lambda linear, case: Reseeded(build(linear, case))


def _fused(config: Callable[[int], Any]) -> Build:
    """peft's layer, computed by our operation."""
    build = _peft(config)

    def fused(linear: nn.Linear, case: Case) -> nn.Module:
        layer = build(linear, case)
        genft_modules.fuse_lora(layer)
        return layer

    return fused


def _unfused(layer: nn.Module, linear: nn.Linear, case: Case) -> nn.Module:
    """The same layer as peft computes it, with the masks of our operation."""
    twin = copy.deepcopy(layer)
    genft_modules.unfuse_lora(twin)
    for module in twin.modules():
        for name, part in module.named_children():
            if isinstance(part, nn.Dropout):
                setattr(module, name, SeededDropout(part.p))
    return twin


def _loralib(linear: nn.Linear, case: Case) -> nn.Module:
    import loralib

    own = loralib.Linear(linear.in_features, linear.out_features, r=case.r, lora_alpha=2 * case.r, merge_weights=False)
    own.weight, own.bias = linear.weight, linear.bias
    return own.to(case.device, case.dtype)


def _torchtune(linear: nn.Linear, case: Case) -> nn.Module:
    from torchtune.modules.peft import LoRALinear

    bias = linear.bias is not None
    own = LoRALinear(linear.in_features, linear.out_features, rank=case.r, alpha=2 * case.r, use_bias=bias)
    own = own.to(case.device, case.dtype)
    own.weight = linear.weight
    if bias:
        own.bias = linear.bias
    return own


PEERS = (
    Contender("frozen", "floor", "none", "frozen", _frozen),
    Contender("trainable", "floor", "full", "trainable", _trainable),
    Contender("peft-lora", "peer", "lora", "lowrank", _peft(_lora)),
    Contender("peft-lora-compiled", "peer", "lora", "lowrank", _peft(_lora), compiled=True),
    Contender("peft-dora", "peer", "dora", "lowrank", _peft(partial(_lora, use_dora=True))),
    Contender("peft-lora-dropout", "peer", "lora", "lowrank", _dropping(_peft(partial(_lora, lora_dropout=0.1)))),
    Contender("fused-lora", "genft", "lora", "lowrank", _fused(_lora), _unfused, operation="lowrank_linear"),
    Contender(
        "fused-lora-dropout",
        "genft",
        "lora",
        "lowrank",
        _dropping(_fused(partial(_lora, lora_dropout=0.1))),
        _unfused,
        operation="lowrank_linear",
    ),
    Contender(
        "fused-dora",
        "genft",
        "dora",
        "lowrank",
        _fused(partial(_lora, use_dora=True)),
        _unfused,
        operation="rescaled_linear",
    ),
    Contender("peft-vera", "peer", "vera", "lowrank", _peft(lambda r: peft.VeraConfig(r=r, target_modules=["layer"]))),
    Contender(
        "peft-peanut", "peer", "peanut", "lowrank", _peft(lambda r: peft.PeanutConfig(r=r, target_modules=["layer"]))
    ),
    Contender(
        "peft-hira", "peer", "hira", "generated", _peft(lambda r: peft.HiraConfig(r=r, target_modules=["layer"]))
    ),
    Contender("loralib-lora", "peer", "lora", "lowrank", _loralib, needs="loralib"),
    Contender("torchtune-lora", "peer", "lora", "lowrank", _torchtune, needs="torchtune"),
)

CONTENDERS = {c.name: c for c in (*PEERS, *(c for method in METHODS for c in _ours(method)))}


def names(*kinds: str, method: str = "", form: str = "", compiled: bool = True) -> list[str]:
    """Registered contenders of these kinds (all, if none is named), of a method or a form."""
    return [
        c.name
        for c in CONTENDERS.values()
        if (not kinds or c.kind in kinds)
        and method in ("", c.method)
        and form in ("", c.form)
        and (compiled or not c.compiled)
    ]


def methods(form: str = "") -> list[Method]:
    """The methods whose module exists, of a form."""
    return [m for m in METHODS if form in ("", m.form) and f"genft-{m.name}" in CONTENDERS]
