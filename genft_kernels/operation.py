"""Operations from a reference and a short declaration: the `torch.library` operator, its fake kernel, its autograd, and
the dispatch to a backend.

`torch.library.custom_op` with `register_autograd` is equivalent but slower: 83 µs per call without gradient and 152 µs
with, of which the body takes 45 µs, against 67 µs and 100 µs for an operator registered directly with the dispatcher
(input_edit_linear on one row, Xeon at 2.5 GHz, torch 2.13). In plain eager mode (`eager`), calls bypass the dispatcher.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .checks import autocasting
from .plan import LIBRARY, LaunchPlan, resolve

_OPERATORS = torch.library.Library("genft", "DEF")
_TYPES = {"Tensor | None": "Tensor?", "list[bool]": "bool[]"}  # Python annotation → schema type
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float, bool, str, list, LaunchPlan))


def eager(*arguments: Any) -> bool:
    """Whether a call with these arguments can bypass the dispatcher: there is no compiler, tracer, dispatch mode (such
    as selective checkpointing), functorch transform, profiler, forward-mode AD or tensor subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ) and _PLAIN.issuperset(map(type, arguments))


class Operation:
    """One operation on matrices: `operation(*arguments, plan)` returns its result; `plan` is a `LaunchPlan` or a
    backend.

    The arguments are those of `<name>_forward` in the family's reference. The parameters of `<name>_backward` determine
    which arguments and outputs are saved. The gradient of `bias` is handled here: the sum of the output's gradient.

    Args:
        name: the operators are `genft::<name>` and `genft::<name>_backward`.
        reference: the module with both functions. The module of the same name in `_triton` has both, too, with the plan
            as last argument.
        sizes: function that returns (m, n, k, r) for choosing a plan; its parameters name the arguments it needs.
        outputs: functions that allocate the result and the tensors saved for backward; their parameters name the
            arguments they need.
        gradients: the arguments that `<name>_backward` differentiates, in its order; empty if there is no backward.
            A mapping has a function for each that allocates its gradient, for arguments that are not saved.
        backward_sizes: like `sizes`, if backward does not have the arguments that `sizes` names.
    """

    def __init__(
        self,
        name: str,
        reference: ModuleType,
        *,
        sizes: Callable[..., tuple[int, int, int, int]],
        outputs: Mapping[str, Callable[..., Tensor]],
        gradients: Sequence[str] | Mapping[str, Callable[..., Tensor]] = (),
        backward_sizes: Callable[..., tuple[int, int, int, int]] | None = None,
    ) -> None:
        self._forward = _Pass(name, f"{name}_forward", reference, sizes)
        names = self._forward.names
        self._empty = [_of_named(empty, names) for empty in outputs.values()]
        result = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
        self.overload = _define(name, self._forward, result, self.body, self._fake)
        self.operators: dict[Any, Callable[..., Any]] = {self.overload: self.body}  # registered with torch
        self._eager: Any = None
        dispatched = _without_gradient(self.overload)
        if gradients:
            self._backward = _Pass(name, f"{name}_backward", reference, backward_sizes or sizes, like=names[0])
            given = self._backward.names
            self._made = [
                _of_named(gradients[one], given) if isinstance(gradients, Mapping) else _like(given.index(one))
                for one in gradients
            ]
            self._biased = "bias" in names
            self.backward_overload = _define(
                f"{name}_backward", self._backward, "Tensor[]", self.backward_body, self._backward_fake
            )
            self.operators[self.backward_overload] = self.backward_body
            _register(f"{name}_backward", _without_gradient(self.backward_overload), self.backward_overload)
            self._wanted = [names.index(gradient) for gradient in (*gradients, *(("bias",) * self._biased))]
            saved = self._backward.names[1:-1]
            tensors = [name for name in saved if self._backward.types[name].startswith("Tensor")]
            others = [name for name in saved if name not in tensors]
            known = [*names, *outputs]
            self._tensors, self._others = ([known.index(name) for name in kind] for kind in (tensors, others))
            self._order = [[*tensors, *others].index(name) for name in saved]
            self._eager = self._differentiable(self._forward, self._backward_now)
            dispatched = self._differentiable(_below_autograd(self.overload), self.backward_overload)
        _register(name, dispatched, self.overload)

    def __call__(self, *arguments: Any) -> Tensor:
        if not eager(*arguments):
            found = self.overload(*arguments[:-1], str(arguments[-1]))
        elif self._eager is not None and torch.is_grad_enabled():
            found = self._eager.apply(*arguments)
        else:
            found = self._forward(*arguments)
        return found if isinstance(found, Tensor) else found[0]

    # Execution. The last of `arguments` is a plan.

    def _run_backward(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """The gradients; None if `needs` is False."""
        *given, needs, plan = arguments
        asked = needs[: len(self._made)]
        found: tuple[Tensor | None, ...] = (None,) * len(asked)
        if any(asked):
            found = self._backward(*given, asked, plan)
        return (*found, given[0].sum(0) if needs[-1] else None) if self._biased else found

    def _backward_now(self, *arguments: Any) -> Sequence[Tensor | None]:
        """The gradients, through the dispatcher if not `eager` or if higher derivatives may be requested."""
        if torch.is_grad_enabled() or not eager(*arguments):
            *given, plan = arguments
            found: Sequence[Tensor] = self.backward_overload(*given, str(plan))
            return found
        return self._run_backward(*arguments)

    # Operators return only tensors, in the layout of their fake kernels; an empty tensor represents None.

    def body(self, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        return _only([arguments[0].new_empty(0) if one is None else one for one in self._forward(*arguments)])

    def _fake(self, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
        return _only([empty(arguments) for empty in self._empty])

    def backward_body(self, *arguments: Any) -> list[Tensor]:
        dy = arguments[0]
        return [dy.new_empty(0) if one is None else one.contiguous() for one in self._run_backward(*arguments)]

    def _backward_fake(self, *arguments: Any) -> list[Tensor]:
        dy, needs = arguments[0], arguments[-2]
        made = [*self._made, *([lambda arguments: arguments[0][0]] * self._biased)]
        return [
            torch.empty_like(make(arguments), memory_format=torch.contiguous_format) if need else dy.new_empty(0)
            for make, need in zip(made, needs, strict=True)
        ]

    def _differentiable(
        self, forward: Callable[..., Any], backward: Callable[..., Sequence[Tensor | None]]
    ) -> type[torch.autograd.Function]:
        def run(ctx: Any, *arguments: Any) -> Any:
            found = forward(*arguments)
            outputs = (found,) if isinstance(found, Tensor) else found
            known = (*arguments[:-1], *outputs)
            ctx.save_for_backward(*[known[at] for at in self._tensors])
            ctx.others = [known[at] for at in self._others]
            ctx.plan = arguments[-1]
            if len(outputs) > 1:
                ctx.mark_non_differentiable(*[one for one in outputs[1:] if one is not None])
                ctx.set_materialize_grads(False)
            return found

        def differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            if dy is not None:
                saved = (*ctx.saved_tensors, *ctx.others)
                needs = [ctx.needs_input_grad[at] for at in self._wanted]
                made = backward(dy, *[saved[at] for at in self._order], needs, ctx.plan)
                for at, need, gradient in zip(self._wanted, needs, made, strict=True):
                    gradients[at] = gradient if need else None
            return tuple(gradients)

        methods = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
        return type(f"BackwardFor_{self._forward.operation}", (torch.autograd.Function,), methods)


class _Pass:
    """The forward or backward pass of an operation: a function of its reference and its Triton counterpart."""

    def __init__(
        self, operation: str, function: str, reference: ModuleType, sizes: Callable[..., Any], like: str | None = None
    ) -> None:
        self.operation, self.function, self.reference = operation, function, reference
        parameters = inspect.signature(getattr(reference, function)).parameters.values()
        named = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self.types = {p.name: _TYPES.get(p.annotation, p.annotation) for p in named}
        self.names = list(self.types)
        self.like = 0 if like is None else self.names.index(like)
        self.sizes = _of_named(sizes, self.names)

    def __call__(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Run the pass with autocast disabled and the tensors' device as the current one, as the dispatcher does for
        torch's own kernels. (Casts are made in the public functions; backward may run under a different autocast
        setting than forward; Triton launches on the current device.)"""
        *given, plan = arguments
        like = given[self.like]
        module = self.reference
        if not is_library(plan, like):
            found = resolve(plan, self.operation, *self.sizes(given), like.dtype, like.device)
            if found.algorithm not in LIBRARY:
                module = _triton(self.reference.__name__)
                given.append(found)
        run: Callable[..., tuple[Tensor | None, ...]] = getattr(module, self.function)
        casting = autocasting(like)
        elsewhere = like.is_cuda and like.get_device() != torch.cuda.current_device()
        if not casting and not elsewhere:
            return run(*given)
        with (
            torch.autocast(like.device.type, enabled=False) if casting else nullcontext(),
            torch.cuda.device_of(like) if elsewhere else nullcontext(),
        ):
            return run(*given)


def is_library(plan: LaunchPlan | str, like: Tensor) -> bool:
    """Whether the plan is the library's regardless of sizes."""
    if isinstance(plan, LaunchPlan):
        return plan.algorithm in LIBRARY
    return plan == "reference" or (plan == "auto" and not like.is_cuda)


@cache
def _triton(reference: str) -> ModuleType:
    return import_module(reference.replace(".reference.", "._triton."))


def _of_named(function: Callable[..., Any], names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    """`function`, whose parameters name some of the arguments, as a function of all arguments."""
    chosen = [names.index(name) for name in inspect.signature(function).parameters]
    return lambda arguments: function(*[arguments[at] for at in chosen])


def _like(at: int) -> Callable[[Sequence[Any]], Any]:
    return lambda arguments: arguments[at]


def _only(outputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# ---- registration with the dispatcher


def _define(name: str, one: _Pass, result: str, body: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    arguments = ", ".join(f"{kind} {argument}" for argument, kind in one.types.items())
    _OPERATORS.define(f"{name}({arguments}, str plan) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    # Dynamo must not trace the body in compiled graphs; _disable_dynamo takes a function, and `body` is a method.
    kernel = torch._disable_dynamo(lambda *arguments: body(*arguments))  # type: ignore[attr-defined]
    _OPERATORS.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genft::{name}", fake, lib=_OPERATORS)
    overload = getattr(torch.ops.genft, name).default

    def batched(info: Any, dims: Any, *arguments: Any) -> tuple[Any, Any]:
        """A loop over samples; the use case of vmap here is per-sample gradients."""

        def sample(at: int) -> Any:
            picked = zip(arguments, dims, strict=True)
            return overload(*(one.select(dim, at) if isinstance(dim, int) else one for one, dim in picked))

        found = [sample(at) for at in range(info.batch_size)]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return type(found[0])(map(torch.stack, zip(*found, strict=True))), type(found[0])([0] * len(found[0]))

    torch.library.register_vmap(f"genft::{name}", batched, lib=_OPERATORS)
    return overload


def _register(name: str, function: Any, overload: Any) -> None:
    """Register `function` as the autograd kernel of an operator, also inside functorch transforms, which call it once
    per level."""
    below = _below_autograd(overload)
    listed = "Tensor[]" in str(overload._schema).rpartition("->")[2]

    def run(*arguments: Any) -> Any:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        if any(forward_ad.unpack_dual(one).tangent is not None for one in tensors):
            raise NotImplementedError(f"genft::{name} has no forward-mode derivative; use a gradient (reverse mode)")
        if not torch.is_grad_enabled() or not any(one.requires_grad for one in tensors):
            return below(*arguments)
        with enable_single_level_autograd_function():
            found = super(torch.autograd.Function, function).apply(*arguments)
        return list(found) if listed else found

    _OPERATORS.impl(name, run, "Autograd")


def _below_autograd(overload: Any) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            found = overload(*arguments)
        return tuple(found) if isinstance(found, list) else found

    return run


def _without_gradient(overload: Any) -> Any:
    """An autograd function whose backward raises an error."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{overload} has no gradient: genft's operations support first derivatives only")

    run = _below_autograd(overload)
    methods = {"forward": staticmethod(lambda ctx, *arguments: run(*arguments)), "backward": staticmethod(refuse)}
    return type(f"BackwardFor_{overload._opname}", (torch.autograd.Function,), methods)
