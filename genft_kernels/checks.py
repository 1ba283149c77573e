"""Argument checks, made before any work is done. The message names the argument, what it got and what it expects."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .plan import BACKENDS, LaunchPlan

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DENSE = torch.strided


def choice_of(backend: str, plan: LaunchPlan | None) -> LaunchPlan | str:
    """The plan, or else the backend."""
    if plan is not None:
        if not isinstance(plan, LaunchPlan):
            raise TypeError(f"plan: got {type(plan).__name__}, expected a LaunchPlan")
        return plan
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {BACKENDS}")
    return backend


def number(name: str, value: Any) -> float:
    """A finite number of Python or numpy as a float. A tensor is refused: reading it would synchronise a GPU, and it
    would get no gradient."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (int, Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a finite number")
        try:
            value = float(value)
        except OverflowError:
            value = inf
    found: float = value
    if not -inf < found < inf:
        raise ValueError(f"{name}: got {found}, expected a finite number")
    return found


def check_tensor(name: str, value: Any, expected: str = "a tensor") -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    if value.layout is not _DENSE or value.is_nested:
        came = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
        raise TypeError(f"{name}: got {came}, expected a dense tensor (torch.strided)")


def check_activations(x: Tensor) -> None:
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: dtype {x.dtype}, expected one of {FLOATS}")
    shape = x.shape
    if not shape or not shape[-1]:
        raise ValueError(f"x: shape {tuple(shape)}, expected [..., K] with K >= 1")


def check_weight(weight: Tensor) -> None:
    check_tensor("weight", weight)
    if weight.dtype not in FLOATS:
        raise TypeError(
            f"weight: dtype {weight.dtype} is not supported, expected one of {FLOATS}; "
            "for a quantised base layer, use input_edit and the layer's own product"
        )
    shape = weight.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"weight: shape {tuple(shape)}, expected [N, K] with N, K >= 1")
    if weight.requires_grad:
        raise ValueError("weight: requires grad, expected a frozen weight; call weight.requires_grad_(False)")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_activations(x)
    check_weight(weight)
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x: last dimension {x.shape[-1]}, expected K = {k} of weight [N, K]")
    device, dtype = x.device, x.dtype
    if device != weight.device:
        raise ValueError(f"weight: on {weight.device}, expected the device of x, {device}")
    if dtype != weight.dtype and not autocasting(x):
        raise TypeError(f"weight: dtype {weight.dtype}, expected that of x, {dtype} (autocast is off)")
    if bias is not None:
        check_tensor("bias", bias, "a tensor [N] or None")
        if bias.shape != (n,):
            raise ValueError(f"bias: shape {tuple(bias.shape)}, expected [N] = [{n}]")
        if bias.device != device:
            raise ValueError(f"bias: on {bias.device}, expected the device of x, {device}")
        if bias.dtype != dtype and not (autocasting(x) and bias.dtype in FLOATS):
            raise TypeError(f"bias: dtype {bias.dtype}, expected that of x, {dtype} (autocast is off)")


def check_factor(name: str, factor: Tensor, like: Tensor, shape: tuple[int | None, ...]) -> int:
    """Check a factor against `shape` (None: the rank, any size of at least 1). Returns the rank, or the last size."""
    check_tensor(name, factor)
    sizes = factor.shape
    fits, rank = len(sizes) == len(shape), 0
    if fits:
        rank = sizes[-1]
        for size, want in zip(sizes, shape, strict=True):
            if want is None:
                rank = size
            elif size != want:
                fits = False
    if not fits:
        expected = ", ".join("r" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: shape {tuple(sizes)}, expected [{expected}]")
    if rank < 1:
        raise ValueError(f"{name}: rank {rank}, expected r >= 1")
    if factor.device != like.device:
        raise ValueError(f"{name}: on {factor.device}, expected {like.device}")
    dtype = factor.dtype
    if dtype != torch.float32 and dtype != like.dtype and not (autocasting(like) and dtype in FLOATS):
        fits_too = " or ".join(str(kind) for kind in dict.fromkeys((like.dtype, torch.float32)))
        raise TypeError(f"{name}: dtype {dtype}, expected {fits_too}")
    return rank


ORIENTATIONS = ("row", "column")


def check_orientation(orientation: str) -> bool:
    """True for columns."""
    if not isinstance(orientation, str) or orientation not in ORIENTATIONS:
        raise ValueError(f"orientation: got {orientation!r}, expected one of {ORIENTATIONS}")
    return orientation == "column"


def check_indices(indices: Tensor, k: int, size: int, like: Tensor) -> None:
    """Check for int64 [k] on the device of `like`. Values are not checked, which would synchronise a GPU."""
    check_tensor("indices", indices, "an int64 tensor")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices: dtype {indices.dtype}, expected torch.int64")
    if indices.shape != (k,):
        raise ValueError(f"indices: shape {tuple(indices.shape)}, expected [{k}], one per slice of values")
    if k > size:
        raise ValueError(f"indices: got {k}, expected at most {size}; indices must be unique")
    if indices.device != like.device:
        raise ValueError(f"indices: on {indices.device}, expected {like.device}")


def check_dropout(dropout: float, seed: Tensor | None, like: Tensor) -> Tensor | None:
    """The seed to use; None without dropout."""
    if not 0.0 <= number("dropout", dropout) < 1.0:
        raise ValueError(f"dropout: got {dropout}, expected 0 <= dropout < 1")
    if seed is None:
        if dropout == 0.0:
            return None
        raise ValueError("seed: got None, expected draw_seed(device) because dropout > 0")
    check_tensor("seed", seed, "a tensor from draw_seed(device)")
    if seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != like.device:
        raise ValueError(
            f"seed: {seed.dtype} {tuple(seed.shape)} on {seed.device}, expected int64 (1,) on {like.device}"
        )
    return None if dropout == 0.0 else seed


def autocasting(x: Tensor) -> bool:
    """Whether autocast is enabled for the device of x."""
    if not torch._C._is_any_autocast_enabled():
        return False  # ten times faster than the check by device
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as a matrix."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """y, computed from `as_rows(x)`, with the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast does for nn.Linear; factors keep their dtype, products accumulate in float32."""
    if not autocasting(x) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *others))
