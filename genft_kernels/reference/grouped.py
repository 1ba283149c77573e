"""y_i = x_i W0ᵀ + x_i P_g Q_gᵀ + b for sample i of group g.

On a CPU, samples are sorted by group, unless those of each group are neighbours, and consecutive groups with equally
many samples are one batched product with their factors as they lie. Where sorting would copy more than that, and where
it would mean to wait for `bounds`, factors are gathered, one for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .common import add_base_, cast, panels, total

_GATHERED_ELEMENTS = 1 << 20  # number of elements of factors gathered at a time
_ROWS_TO_STAY = 16  # rows of a sample from which copying them takes longer than a product of their own


def grouped_lowrank_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    group: Tensor,
    order: Tensor,
    bounds: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [M,N] and t [M,r], t_i = x_i P_g."""
    samples = _samples(x, p, q, group, order, bounds)
    p, q = cast(p, x.dtype), cast(q, x.dtype)
    xs = samples.arrange(x)
    y, t = samples.empty(x, q.shape[1]), samples.empty(x, p.shape[2])
    for batch in samples.batches:
        t_g = batch.rows_of(t)
        _product(batch.rows_of(xs), batch.factors_of(p), out=t_g)
        _product(t_g, batch.factors_of(q).mT, out=batch.rows_of(y))
    y, t = samples.restore(y), samples.restore(t)
    return y if weight is None else add_base_(y, x, weight.t(), bias), t


def grouped_lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    group: Tensor,
    order: Tensor,
    bounds: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """u_i = dy_i Q_g; dX_i = dy_i W0 + u_i P_gᵀ, dP_g = Σ x_iᵀ u_i and dQ_g = Σ dy_iᵀ t_i over the group."""
    need_x, need_p, need_q = needs
    samples = _samples(x, p, q, group, order, bounds)
    p_x, q_x = cast(p, dy.dtype), cast(q, dy.dtype)
    dys = samples.arrange(dy)
    xs, ts = samples.arrange(x) if need_p else x, samples.arrange(t) if need_q else t
    dx = samples.empty(x, x.shape[1]) if need_x else None
    dp, dq = (samples.sums(like.mT) if need else None for like, need in ((p, need_p), (q, need_q)))
    for batch in samples.batches:
        dy_g = batch.rows_of(dys)
        if need_x or need_p:
            u_g = _product(dy_g, batch.factors_of(q_x))
            if dx is not None:
                _product(u_g, batch.factors_of(p_x).mT, out=batch.rows_of(dx))
            if dp is not None:
                batch.add_(dp, _product(u_g.mT, batch.rows_of(xs)))
        if dq is not None:
            batch.add_(dq, _product(batch.rows_of(ts).mT, dy_g))
    dx = None if dx is None else samples.restore(dx)
    return (
        dx if dx is None or weight is None else add_base_(dx, dy, weight),
        None if dp is None else cast(dp[: p.shape[0]].mT, p.dtype),
        None if dq is None else cast(dq[: q.shape[0]].mT, q.dtype),
    )


def listed_lowrank_linear(
    x: Tensor,
    weight: Tensor | None,
    p: Sequence[Tensor],
    q: Sequence[Tensor],
    scale: Sequence[float],
    group: list[int],
    bias: Tensor | None,
) -> Tensor:
    """y [M,N] with s_g x_i P_g Q_gᵀ for factors P_g [K,r_g] and Q_g [N,r_g] in lists; on a CPU, without gradients.

    Between two layers, decoding evicts everything from the caches, so each step of Python counts: samples stay where
    they are if those of each group are neighbours, or if there is one group. Samples of many rows stay in any case,
    with products of their own.
    """
    if len(p) == 1 and 2 * group.count(-1) <= len(group):
        t = x @ cast(p[0], x.dtype)
        if scale[0] != 1.0:
            t.mul_(scale[0])
        y = t @ cast(q[0], x.dtype).t()
        if -1 in group:  # computed with the others; not 0 times them, which may be infinite
            y.view(len(group), -1).masked_fill_(torch.tensor([g < 0 for g in group])[:, None], 0.0)
        return y if weight is None else add_base_(y, x, weight.t(), bias)
    places: list[list[int]] = [[] for _ in p]
    without: list[int] = []
    for sample, g in enumerate(group):
        (without if g < 0 else places[g]).append(sample)
    each = x.shape[0] // max(len(group), 1)
    y = x.new_empty(x.shape[0], q[0].shape[0])
    apart = any(mine and mine[-1] - mine[0] >= len(mine) for mine in places)
    order, xs = None, x
    if not apart:
        parts = [(g, mine[0], mine[-1] + 1) for g, mine in enumerate(places) if mine]
    elif each >= _ROWS_TO_STAY:
        parts = [(g, sample, sample + 1) for sample, g in enumerate(group) if g >= 0]
    else:
        order = torch.tensor([sample for mine in (*places, without) for sample in mine])
        xs = _taken(x, order, len(group))
        ends = [0, *accumulate(map(len, places))]
        parts = [(g, first, last) for g, (first, last) in enumerate(pairwise(ends)) if first < last]
    for g, first, last in parts:
        rows = slice(first * each, last * each)
        t = xs[rows] @ cast(p[g], x.dtype)
        if scale[g] != 1.0:
            t.mul_(scale[g])
        torch.mm(t, cast(q[g], x.dtype).t(), out=y[rows])
    if without:
        begin = 0
        for first, last in [*sorted((first, last) for _, first, last in parts), (len(group), len(group))]:
            if begin < first:
                y[begin * each : first * each].zero_()
            begin = last
    if order is not None:
        y = _taken(y, order.argsort(), len(group))
    return y if weight is None else add_base_(y, x, weight.t(), bias)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right of two matrices or two batches of them."""
    return (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out=out)


def _on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _samples(x: Tensor, p: Tensor, q: Tensor, group: Tensor, order: Tensor, bounds: Tensor) -> _Sorted | _Gathered:
    each = x.shape[0] // max(group.shape[0], 1)
    if _on_host(x) and ((found := _Sorted(x, order, bounds)).order is None or each <= p.shape[2]):
        return found
    return _Gathered(x, group, p.shape[0], max(p.shape[1], q.shape[1]) * p.shape[2])


class _Run(NamedTuple):
    """Consecutive groups with equally many samples: their rows, and the groups."""

    rows: slice
    groups: slice

    def rows_of(self, matrix: Tensor) -> Tensor:
        """[groups, rows / groups, C]; of one group, a matrix."""
        count = self.groups.stop - self.groups.start
        found = matrix[self.rows]
        return found if count == 1 else found.view(count, -1, matrix.shape[1])

    def factors_of(self, stack: Tensor) -> Tensor:
        single = self.groups.stop - self.groups.start == 1
        return stack[self.groups.start] if single else stack[self.groups]

    def add_(self, stack: Tensor, values: Tensor) -> None:
        """A group is in one run."""
        self.factors_of(stack).copy_(values)


class _Sorted:
    """The samples sorted by group (not if those of each group are neighbours), in runs."""

    def __init__(self, x: Tensor, order: Tensor, bounds: Tensor) -> None:
        self.samples = order.shape[0]
        each = x.shape[0] // max(self.samples, 1)
        places: list[int] = order.tolist()
        ends: list[int] = bounds.tolist()
        self.everyone = ends[0] == 0 and ends[-1] == self.samples
        groups = [(g, *pair) for g, pair in enumerate(pairwise(ends)) if pair[0] < pair[1]]
        apart = any(places[end - 1] - places[start] >= end - start for _, start, end in groups)
        self.order = order if apart else None
        self.inverse = order.argsort() if apart else None
        found: list[list[int]] = []  # first and last group, first and last sample of each run, samples of a group
        for g, start, end in groups:
            first = start if apart else places[start]
            size = end - start
            if found and found[-1][1:] == [g, found[-1][2], first, size]:
                found[-1][1], found[-1][3] = g + 1, first + size
            else:
                found.append([g, g + 1, first, first + size, size])
        self.batches = [
            _Run(slice(first * each, last * each), slice(one, other)) for one, other, first, last, _ in found if each
        ]

    def empty(self, x: Tensor, columns: int) -> Tensor:
        """A matrix for every row; zeros where no run writes."""
        return (x.new_empty if self.everyone else x.new_zeros)(x.shape[0], columns)

    def sums(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    def arrange(self, matrix: Tensor) -> Tensor:
        return matrix if self.order is None else _taken(matrix, self.order, self.samples)

    def restore(self, matrix: Tensor) -> Tensor:
        return matrix if self.inverse is None else _taken(matrix, self.inverse, self.samples)


def _taken(matrix: Tensor, index: Tensor, samples: int) -> Tensor:
    """The rows of a matrix in another order of its samples."""
    if matrix.shape[0] == samples:
        return matrix.index_select(0, index)
    return matrix.reshape(samples, -1).index_select(0, index).view(matrix.shape)


class _Panel(NamedTuple):
    """Samples, each with its factors: their rows, the group of each, and the number of groups."""

    rows: slice
    group: Tensor
    groups: int

    def rows_of(self, matrix: Tensor) -> Tensor:
        return matrix[self.rows].view(self.group.shape[0], -1, matrix.shape[1])

    def factors_of(self, stack: Tensor) -> Tensor:
        taken = stack.index_select(0, self.group.clamp(0, self.groups - 1))
        return taken.masked_fill_(self._none()[:, None, None], 0.0)

    def add_(self, stack: Tensor, values: Tensor) -> None:
        """Samples without a group are added to an extra one, which is discarded."""
        stack.index_add_(0, torch.where(self._none(), self.groups, self.group), values.to(stack.dtype))

    def _none(self) -> Tensor:
        return (self.group < 0) | (self.group >= self.groups)


class _Gathered:
    """The samples as they come, in panels of a bounded number of `elements` of factors."""

    def __init__(self, x: Tensor, group: Tensor, groups: int, elements: int) -> None:
        self.groups = groups
        each = x.shape[0] // max(group.shape[0], 1)
        self.batches = [
            _Panel(slice(part.start * each, part.stop * each), group[part], groups)
            for part in panels(group.shape[0] if each else 0, elements, _GATHERED_ELEMENTS)
        ]

    def empty(self, x: Tensor, columns: int) -> Tensor:
        return x.new_empty(x.shape[0], columns)

    def sums(self, like: Tensor) -> Tensor:
        return total(like, self.groups + 1, *like.shape[1:])

    def arrange(self, matrix: Tensor) -> Tensor:
        return matrix

    def restore(self, matrix: Tensor) -> Tensor:
        return matrix
