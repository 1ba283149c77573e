"""Groups of samples in a mixed batch, sorted on the device without synchronisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        came = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: got {came}, expected a tensor of int32 or int64")
    if index.dim() != 1:
        raise ValueError(f"index: shape {tuple(index.shape)}, expected [S], one integer per sample")
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in index.aminmax())
        if low < -1 or high >= count:
            raise ValueError(f"index: got values from {low} to {high}, expected -1 to {count - 1}")
    order = torch.argsort(index, stable=True)
    bounds = torch.searchsorted(index[order], torch.arange(count + 1, dtype=index.dtype, device=index.device))
    return RowGroups(index.to(torch.int32), order.to(torch.int32), bounds.to(torch.int32))
