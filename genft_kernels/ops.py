"""The one door to the operations: argument checks, `torch.library` operators, autograd, choice of what runs.

Each operation is a public function that checks its arguments and calls a `genft::` operator on matrices. The operator
resolves its plan when it runs (shapes are symbols while torch.compile traces) and calls the reference or the Triton
launcher; both modules have the same functions. Its backward is an operator too, so that a compiled graph holds one
node for each.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from . import reference, sharded
from .activations import activation as activation_named
from .checks import (
    autocast,
    check_activations,
    check_dropout,
    check_factor,
    check_linear,
    check_weight,
    choice_of,
)
from .operator import operator
from .plan import LIBRARY, LaunchPlan, resolve
from .sharded import is_sharded


def launcher(plan: LaunchPlan) -> ModuleType:
    if plan.algorithm in LIBRARY:
        return reference
    from . import _triton

    return _triton


def _resolve(choice: str, operation: str, x: Tensor, n: int, r: int) -> tuple[ModuleType, tuple[LaunchPlan, ...]]:
    """The module that runs the call, and the plan as its extra argument (the reference takes none)."""
    plan = resolve(choice, operation, x.shape[0], n, x.shape[1], r, x.dtype, x.device)
    return launcher(plan), (() if plan.algorithm in LIBRARY else (plan,))


def present(gradients: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    """Operators return tensors only, in the layout that their fake promises: an empty one stands for a gradient that
    nobody asked for."""
    return [like.new_empty(0) if g is None else g.contiguous() for g in gradients]


def wanted(gradients: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


# ---- lowrank_linear


@operator("lowrank_linear")
def _lowrank_linear(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    plan: str,
) -> tuple[Tensor, Tensor]:
    run, extra = _resolve(plan, "lowrank_linear", x, weight.shape[0], p.shape[1])
    return run.lowrank_linear_forward(x, weight, p, q, bias, scale, dropout, seed, *extra)  # type: ignore[no-any-return]


@_lowrank_linear.register_fake
def _(x, weight, p, q, bias, scale, dropout, seed, plan):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], p.shape[1])


@operator("lowrank_linear_backward")
def _lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    plan: str,
    needs: list[bool],
) -> list[Tensor]:
    run, extra = _resolve(plan, "lowrank_linear", x, weight.shape[0], p.shape[1])
    return present(run.lowrank_linear_backward(dy, x, weight, p, q, t, scale, dropout, seed, tuple(needs), *extra), dy)


@_lowrank_linear_backward.register_fake
def _(dy, x, weight, p, q, t, scale, dropout, seed, plan, needs):  # type: ignore[no-untyped-def]
    shapes = (x.shape, p.shape, q.shape, (weight.shape[0],))
    dtypes = (dy.dtype, p.dtype, q.dtype, dy.dtype)
    return [
        dy.new_empty(s if need else (0,), dtype=d if need else dy.dtype)
        for s, d, need in zip(shapes, dtypes, needs, strict=True)
    ]


def _lowrank_linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, p, q, _, ctx.scale, ctx.dropout, seed, ctx.plan = inputs
    ctx.save_for_backward(x, weight, p, q, output[1], seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _lowrank_linear_autograd(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, weight, p, q, t, seed = ctx.saved_tensors
    wants = ctx.needs_input_grad
    needs = [wants[0], wants[2], wants[3], wants[4]]
    dx, dp, dq, db = wanted(
        _lowrank_linear_backward(dy, x, weight, p, q, t, ctx.scale, ctx.dropout, seed, ctx.plan, needs), needs
    )
    return dx, None, dp, dq, db, None, None, None, None


_lowrank_linear.register_autograd(_lowrank_linear_autograd, setup_context=_lowrank_linear_context)


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank update: y = x W0ᵀ + scale·(drop(x) P) Qᵀ + b.

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, the dtype of x.
        p: factor [K, r], the dtype of x or float32.
        q: factor [N, r], likewise. ΔW = scale·Q Pᵀ.
        bias: [N] or None, the dtype of x.
        scale: s.
        dropout: the share of elements of x that the low-rank path does not see, 0 <= dropout < 1.
        seed: int64 [1] from `draw_seed`, required when dropout > 0; decides the mask.
        backend: "auto" (Triton on a GPU, else the reference), "triton" or "reference".
        plan: a `LaunchPlan` that overrides the choice.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable once in x, p, q and bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits.

    Source: docs/mathematics.md derives the form, which LoRA, GIFT, PEANuT, SaS and GenFT with a linear outer
    activation have.
    """
    check_linear(x, weight, bias)
    r = check_factor("p", p, x, (weight.shape[1], None))
    check_factor("q", q, x, (weight.shape[0], r))
    seed = check_dropout(dropout, seed, x)
    x, weight, bias = autocast(x, weight, bias)
    y: Tensor = _lowrank_linear(
        x.reshape(-1, x.shape[-1]), weight, p, q, bias, float(scale), float(dropout), seed, choice_of(backend, plan)
    )[0]
    return y.view(*x.shape[:-1], weight.shape[0])


# ---- input_edit


@operator("input_edit")
def _input_edit(x: Tensor, psi: Tensor, phi: Tensor, scale: float, plan: str) -> tuple[Tensor, Tensor]:
    run, extra = _resolve(plan, "input_edit", x, x.shape[1], psi.shape[0])
    return run.input_edit_forward(x, psi, phi, scale, *extra)  # type: ignore[no-any-return]


@_input_edit.register_fake
def _(x, psi, phi, scale, plan):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape[0], psi.shape[0])


@operator("input_edit_backward")
def _input_edit_backward(
    g: Tensor, x: Tensor, psi: Tensor, phi: Tensor, t: Tensor, scale: float, plan: str, needs: list[bool]
) -> list[Tensor]:
    run, extra = _resolve(plan, "input_edit", x, x.shape[1], psi.shape[0])
    return present(run.input_edit_backward(g, x, psi, phi, t, scale, tuple(needs), *extra), g)


@_input_edit_backward.register_fake
def _(g, x, psi, phi, t, scale, plan, needs):  # type: ignore[no-untyped-def]
    return [
        g.new_empty(like.shape if need else (0,), dtype=like.dtype if need else g.dtype)
        for like, need in zip((x, psi, phi), needs, strict=True)
    ]


def _input_edit_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, psi, phi, ctx.scale, ctx.plan = inputs
    ctx.save_for_backward(x, psi, phi, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _input_edit_autograd(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 5
    x, psi, phi, t = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    dx, dpsi, dphi = wanted(_input_edit_backward(g, x, psi, phi, t, ctx.scale, ctx.plan, needs), needs)
    return dx, dpsi, dphi, None, None


_input_edit.register_autograd(_input_edit_autograd, setup_context=_input_edit_context)


def input_edit(
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """x' = x + scale·(x ψᵀ) φ: the edit alone, for a base layer that is not a plain weight (a quantised one).

    Args:
        x: activations [..., K].
        psi: ψ [r, K], the dtype of x or float32.
        phi: φ [r, K], likewise.
        scale, backend, plan: as in `lowrank_linear`.

    Returns:
        x' [..., K] in the dtype of x. base(x') = x (W0 + scale·W0 φᵀ ψ)ᵀ + b. Differentiable once in x, psi and phi.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits.

    Source: WeGeFT (arXiv 2312.00700 v5); docs/mathematics.md derives the form.
    """
    check_activations(x)
    r = check_factor("psi", psi, x, (None, x.shape[-1]))
    check_factor("phi", phi, x, (r, x.shape[-1]))
    (x,) = autocast(x)
    edited: Tensor = _input_edit(x.reshape(-1, x.shape[-1]), psi, phi, float(scale), choice_of(backend, plan))[0]
    return edited.view(x.shape)


# ---- input_edit_linear


@operator("input_edit_linear")
def _input_edit_linear(
    x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, bias: Tensor | None, scale: float, plan: str
) -> tuple[Tensor, Tensor, Tensor]:
    run, extra = _resolve(plan, "input_edit_linear", x, weight.shape[0], psi.shape[0])
    y, t, q = run.input_edit_linear_forward(x, weight, psi, phi, bias, scale, *extra)
    return y, t, x.new_empty(0) if q is None else q


@_input_edit_linear.register_fake
def _(x, weight, psi, phi, bias, scale, plan):  # type: ignore[no-untyped-def]
    q = x.new_empty((weight.shape[0], psi.shape[0]) if reference.narrow(x) else 0)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], psi.shape[0]), q


@operator("input_edit_linear_backward")
def _input_edit_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    q: Tensor,
    scale: float,
    plan: str,
    needs: list[bool],
) -> list[Tensor]:
    run, extra = _resolve(plan, "input_edit_linear", x, weight.shape[0], psi.shape[0])
    features = q if reference.narrow(x) else None
    return present(
        run.input_edit_linear_backward(dy, x, weight, psi, phi, t, features, scale, tuple(needs), *extra), dy
    )


@_input_edit_linear_backward.register_fake
def _(dy, x, weight, psi, phi, t, q, scale, plan, needs):  # type: ignore[no-untyped-def]
    shapes = (x.shape, psi.shape, phi.shape, (weight.shape[0],))
    dtypes = (dy.dtype, psi.dtype, phi.dtype, dy.dtype)
    return [
        dy.new_empty(s if need else (0,), dtype=d if need else dy.dtype)
        for s, d, need in zip(shapes, dtypes, needs, strict=True)
    ]


def _input_edit_linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, psi, phi, _, ctx.scale, ctx.plan = inputs
    ctx.save_for_backward(x, weight, psi, phi, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _input_edit_linear_autograd(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, weight, psi, phi, t, q = ctx.saved_tensors
    wants = ctx.needs_input_grad
    needs = [wants[0], wants[2], wants[3], wants[4]]
    dx, dpsi, dphi, db = wanted(
        _input_edit_linear_backward(dy, x, weight, psi, phi, t, q, ctx.scale, ctx.plan, needs), needs
    )
    return dx, None, dpsi, dphi, db, None, None


_input_edit_linear.register_autograd(_input_edit_linear_autograd, setup_context=_input_edit_linear_context)


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
    """A frozen linear layer on an edited input: y = (x + scale·(x ψᵀ) φ) W0ᵀ + b, that is ΔW = scale·(W0 φᵀ) ψ.

    Args:
        x: activations [..., K].
        weight: frozen W0 [N, K], any strides, the dtype of x.
        psi: ψ [r, K], the dtype of x or float32.
        phi: φ [r, K], likewise.
        bias: [N] or None, the dtype of x.
        scale, backend, plan: as in `lowrank_linear`.

    Returns:
        y [..., N] in the dtype of x (under autocast, in the autocast dtype). Differentiable once in x, psi, phi, bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits.

    Source: WeGeFT (arXiv 2312.00700 v5); docs/mathematics.md derives the form.
    """
    check_linear(x, weight, bias)
    r = check_factor("psi", psi, x, (None, weight.shape[1]))
    check_factor("phi", phi, x, (r, weight.shape[1]))
    x, weight, bias = autocast(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _input_edit_linear(rows, weight, psi, phi, bias, float(scale), choice_of(backend, plan))[0]
    return y.view(*x.shape[:-1], weight.shape[0])


# ---- weight_features


@operator("weight_features")
def _weight_features(
    weight: Tensor, a: Tensor, bias: Tensor | None, ratio: float, dropout: float, seed: Tensor | None, plan: str
) -> Tensor:
    run, extra = _resolve(plan, "weight_features", weight, weight.shape[0], a.shape[0])
    return run.weight_features_forward(weight, a, bias, ratio, dropout, seed, *extra)  # type: ignore[no-any-return]


@_weight_features.register_fake
def _(weight, a, bias, ratio, dropout, seed, plan):  # type: ignore[no-untyped-def]
    return a.new_empty(weight.shape[0], a.shape[0])


@operator("weight_features_backward")
def _weight_features_backward(
    dz: Tensor, weight: Tensor, ratio: float, dropout: float, seed: Tensor | None, plan: str
) -> Tensor:
    run, extra = _resolve(plan, "weight_features", weight, weight.shape[0], dz.shape[1])
    return run.weight_features_backward(dz, weight, ratio, dropout, seed, *extra)  # type: ignore[no-any-return]


@_weight_features_backward.register_fake
def _(dz, weight, ratio, dropout, seed, plan):  # type: ignore[no-untyped-def]
    return dz.new_empty(dz.shape[1], weight.shape[1])


def _weight_features_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, _, ctx.ratio, ctx.dropout, seed, ctx.plan = inputs
    ctx.save_for_backward(weight, seed)


def _weight_features_autograd(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    weight, seed = ctx.saved_tensors
    da = db = None
    if ctx.needs_input_grad[1]:
        da = _weight_features_backward(dz, weight, ctx.ratio, ctx.dropout, seed, ctx.plan)
    if ctx.needs_input_grad[2]:
        db = dz.sum(0)
    return None, da, db, None, None, None, None


_weight_features.register_autograd(_weight_features_autograd, setup_context=_weight_features_context)


def weight_features(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    ratio: float = 1.0,
    activation: str = "none",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    plan: LaunchPlan | None = None,
) -> Tensor:
    """Features of a frozen weight: h = σ(ratio·drop(W0) Aᵀ + bias), in one pass over W0.

    Args:
        weight: frozen W0 [N, K], any strides; or a DTensor cut along one dimension: then only [N, r] is reduced.
        a: A [r, K], the dtype of W0 or float32.
        bias: [r] in the dtype of A, or None.
        ratio: ρ.
        activation: σ, a name of `genft_kernels.activations.ACTIVATIONS`.
        dropout: the share of elements of W0 that are dropped, 0 <= dropout < 1; the mask is never stored.
        seed: int64 [1] from `draw_seed`, required when dropout > 0.
        backend, plan: as in `lowrank_linear`.

    Returns:
        h [N, r] in the dtype of A. Differentiable once in a and bias.

    Raises:
        ValueError, TypeError: naming the argument, what came and what fits.

    Source: the first stage of GIFT (arXiv 2312.00700) and GenFT (arXiv 2506.11042); docs/mathematics.md.
    """
    sigma = activation_named(activation)
    check_weight(weight)
    r = check_factor("a", a, weight, (None, weight.shape[1]))
    if bias is not None:
        check_factor("bias", bias, a, (r,))
    if is_sharded(weight):
        options = {"ratio": ratio, "dropout": dropout, "backend": backend, "plan": plan}
        return sharded.weight_features(weight_features, weight, a, bias, sigma.forward, seed, **options)
    seed = check_dropout(dropout, seed, weight)
    z = _weight_features(weight, a, bias, float(ratio), float(dropout), seed, choice_of(backend, plan))
    # σ acts on [N, r]: torch's own function, fused by torch.compile, costs less than a kernel of ours would save.
    return sigma.forward(z)


__all__ = ["input_edit", "input_edit_linear", "lowrank_linear", "weight_features"]
