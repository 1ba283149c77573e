"""Groups of samples in a mixed batch, sorted on the device without synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensor


class RowGroups(NamedTuple):
    """The groups of S samples, from `group_rows`; each group has one of G updates.

    group: int32 [S], the group of each sample; a number outside of 0 to G - 1 means none.
    order: int32 [S], the samples sorted by group.
    bounds: int32 [G + 1]; the samples of group g are order[bounds[g] : bounds[g + 1]].
    """

    group: Tensor
    order: Tensor
    bounds: Tensor

    @property
    def groups(self) -> int:
        """G."""
        return self.bounds.shape[0] - 1


def group_rows(index: Tensor, count: int) -> RowGroups:
    """Sort the samples of a batch by group.

    Args:
        index: integers [S]: the group of each sample, 0 to count - 1, or -1 for none. On a GPU the values are not
            checked, which would require a synchronisation; out-of-range values mean none.
        count: G, the number of groups.

    Returns:
        `RowGroups`: group int32 [S], order int32 [S] and bounds int32 [G + 1], on the device of `index`.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count: got {count!r}, expected an integer >= 1")
    check_tensor("index", index, "a tensor of int32 or int64")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index: got {index.dtype}, expected a tensor of int32 or int64")
    if index.dim() != 1:
        raise ValueError(f"index: shape {tuple(index.shape)}, expected [S], one integer per sample")
    plain = type(index) is Tensor and not torch.compiler.is_compiling()  # a fake tensor has no values
    if plain and index.device.type == "cpu" and index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < -1 or high >= count:
            raise ValueError(f"index: got values from {low} to {high}, expected -1 to {count - 1}")
    order = torch.argsort(index, stable=True)
    bounds = torch.searchsorted(index[order], torch.arange(count + 1, dtype=index.dtype, device=index.device))
    return RowGroups(index.to(torch.int32), order.to(torch.int32), bounds.to(torch.int32))


def check_rows(rows: RowGroups, x: Tensor) -> None:
    """Check the groups of the samples of x [S, ..., K]. Values are not checked, which would synchronise a GPU."""
    if not isinstance(rows, RowGroups):
        raise TypeError(f"rows: got {type(rows).__name__}, expected RowGroups from group_rows")
    for part in rows:
        check_tensor("rows", part, "RowGroups from group_rows")
        if part.dtype != torch.int32 or part.dim() != 1:
            raise ValueError(f"rows: got {part.dtype} {tuple(part.shape)}, expected int32 vectors, from group_rows")
        if part.device != x.device:
            raise ValueError(f"rows: on {part.device}, expected the device of x, {x.device}")
    samples = rows.group.shape[0]
    if samples != x.shape[0] or samples != rows.order.shape[0]:
        raise ValueError(f"rows: got {samples} samples, expected S = {x.shape[0]} of x [S, ..., K]")
