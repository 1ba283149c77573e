"""Groups of samples in a mixed batch, sorted on the device without synchronisation."""

from __future__ import annotations

from itertools import accumulate
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


def group_rows(index: Tensor | list[int], count: int, device: torch.device | None = None) -> RowGroups:
    """Sort the samples of a batch by group.

    Args:
        index: integers [S]: the group of each sample, 0 to count - 1, or -1 for none. In a tensor on a GPU the values
            are not checked, which would require a synchronisation; out-of-range values mean none.
        count: G, the number of groups.
        device: where the result of a list goes, by default the CPU; None for a tensor.

    Returns:
        `RowGroups`: group int32 [S], order int32 [S] and bounds int32 [G + 1], on the device of `index`.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count: got {count!r}, expected an integer >= 1")
    if isinstance(index, list):
        return _group_list(index, count, device)
    if device is not None:
        raise ValueError(f"device: got {device}, expected None because index is a tensor")
    check_tensor("index", index, "a tensor of int32 or int64, or a list")
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


def _group_list(index: list[int], count: int, device: torch.device | None) -> RowGroups:
    _check_range(index, count)
    sizes = [0] * (count + 1)
    for group in index:
        sizes[group + 1] += 1
    parts = (index, sorted(range(len(index)), key=index.__getitem__), list(accumulate(sizes)))
    return RowGroups(*[torch.tensor(part, dtype=torch.int32, device=device) for part in parts])


def _check_range(index: list[int], count: int) -> None:
    if set(map(type, index)) - {int}:
        raise TypeError(f"index: got {index}, expected integers")
    if index and not -1 <= min(index) <= max(index) < count:
        raise ValueError(f"index: got values from {min(index)} to {max(index)}, expected -1 to {count - 1}")


def check_groups(groups: list[int], count: int, x: Tensor) -> None:
    """Check the groups of the samples of x [S, ..., K] in a list."""
    if len(groups) != x.shape[0]:
        raise ValueError(f"rows: got {len(groups)} samples, expected S = {x.shape[0]} of x [S, ..., K]")
    _check_range(groups, count)


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
