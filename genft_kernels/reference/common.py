"""Products with a dimension r, with optional dropout, and their sum with a product with W0."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import Mask

PANEL_ELEMENTS = 1 << 16  # a panel and its mask fit in a core's L2 cache
GPU_PANEL_ELEMENTS = 1 << 23  # enough to fill a GPU
_TILE = 16


def panels(rows: int, columns: int, elements: int = PANEL_ELEMENTS) -> Iterator[slice]:
    """Slices of rows for panels of at most `elements`; large ones have a multiple of the register tile's height."""
    height = max(1, elements // max(columns, 1))
    if height > _TILE:
        height -= height % _TILE
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def parts(source: Tensor) -> Iterator[slice]:
    """The panels of a matrix for element-wise work, of a size that suits the device."""
    rows, columns = source.shape
    return panels(rows, columns, PANEL_ELEMENTS if source.device.type == "cpu" else GPU_PANEL_ELEMENTS)


def mask_of(source: Tensor, dropout: float, seed: Tensor) -> Mask:
    """The mask of a matrix."""
    return Mask(seed, dropout, range(source.shape[0]), range(source.shape[1]))


def total(like: Tensor, *shape: int) -> Tensor:
    """Zeros for summing panels: in float32 if `like` has 16 bits, to avoid rounding after every panel."""
    return like.new_zeros(shape, dtype=torch.float32 if narrow(like) else like.dtype)


def narrow(tensor: Tensor) -> bool:
    """Whether a tensor has 16 bits, where small updates may be lost in rounding."""
    return tensor.dtype.itemsize == 2


def add_product_(sum_: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_ += left @ right."""
    return sum_.addmm_(left, right) if sum_.dtype == left.dtype else sum_.add_(left @ right)


def project(source: Tensor, factor: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(source) @ factor: [M,C] @ [C,r] -> [M,r]."""
    if seed is None:
        return source @ factor
    out = source.new_empty(source.shape[0], factor.shape[1])
    mask = mask_of(source, dropout, seed)
    for rows in parts(source):
        torch.mm(mask.drop(source[rows], rows), factor, out=out[rows])
    return out


def outer(left: Tensor, source: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """leftᵀ @ drop(source): [r,M] @ [M,C] -> [r,C]."""
    if seed is None:
        return left.t() @ source
    out = total(source, left.shape[1], source.shape[1])
    mask = mask_of(source, dropout, seed)
    for rows in parts(source):
        add_product_(out, left[rows].t(), mask.drop(source[rows], rows))
    return out


def add_update(
    source: Tensor,
    weight: Tensor,
    left: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    each: Callable[[Mask, slice, Tensor], None] | None = None,
) -> Tensor:
    """source @ weightᵀ + scale · drop(left @ factor) + bias: [M,K], [N,K], [M,r] and [r,N] -> [M,N].

    In 16 bits the update is written first (`add_base_`); else it is added last, because it is the cheaper product.
    With dropout, `each` gets the mask, each part of the rows, and what is kept of it: the mask is not made twice.
    """
    first = narrow(source)
    if seed is None and not first:
        return F.linear(source, weight, bias).addmm_(left, factor, alpha=scale)
    if first:
        out = source.new_empty(source.shape[0], factor.shape[1])
        out.addmm_(left, factor, beta=0, alpha=scale)
    else:
        out = F.linear(source, weight, bias)
    if seed is not None:
        mask = mask_of(out, dropout, seed)
        for rows in parts(out):
            kept = mask.kept(rows)
            if first:
                out[rows] = mask.drop(out[rows], rows, kept)
            else:
                out[rows].add_(mask.drop(left[rows] @ factor, rows, kept), alpha=scale)
            if each is not None:
                each(mask, rows, kept)
    return add_base_(out, source, weight.t(), bias) if first else out


def add_base_(update: Tensor, source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """update + source @ weight + bias, in the memory of `update` [M,N]: source [M,K], weight [K,N].

    The product is added in float32 and the sum rounded once. The bias is added last: added to the update, it would
    increase the update's rounding error.
    """
    update.addmm_(source, weight)
    return update if bias is None else update.add_(bias)


def scaled(factor: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale · factor in `dtype`."""
    factor = cast(factor, dtype)
    return factor if scale == 1.0 else factor * scale


def cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor.to(dtype)`, which takes a microsecond even if there is nothing to do."""
    return factor if factor.dtype == dtype else factor.to(dtype)
