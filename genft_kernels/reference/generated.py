"""The generated matrix T = drop(σ(H Bᵀ + row + column)) [N,K], computed one panel at a time: y = x Wᵀ + b, where W
combines W0 and T (see `COMBINATIONS`), and the features z = Tᵀ Aᵀ + bias for the next stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..activations import activation as activation_named
from ..dither import add_dithered
from ..dropout import keep_mask
from .common import GPU_PANEL_ELEMENTS, PANEL_ELEMENTS, add_product_, narrow, panels, parts, total

# What y = x Wᵀ + b is computed with: W0 + s T, W0 + s W0 ⊙ T, or s W0 ⊙ T, the update alone.
COMBINATIONS = ("add", "modulate", "multiply")

_GENERATED_ELEMENTS = 1 << 19  # larger panels than elsewhere, because they are used in products
_GENERATED_SHARE = 48  # for large matrices, the panel is this fraction of it
_LARGE = 1 << 23


@dataclass(frozen=True)
class GeneratedMatrix:
    """The inputs of T: H [N,r], B [K,r], row [N] or None, column [K] or None, σ, dropout probability and seed."""

    h: Tensor
    b: Tensor
    row: Tensor | None
    column: Tensor | None
    activation: str
    dropout: float
    seed: Tensor | None

    def part(self, rows: slice | None = None, columns: slice | None = None) -> GeneratedMatrix:
        """The inputs of a slice of rows or columns of T (except for the mask, which is that of the full matrix)."""
        rows, columns = rows or slice(None), columns or slice(None)
        return replace(
            self,
            h=self.h[rows],
            b=self.b[columns],
            row=None if self.row is None else self.row[rows],
            column=None if self.column is None else self.column[columns],
        )

    def with_biases_inside(self) -> GeneratedMatrix:
        """The same T with each bias as an extra rank, [H row 1] [B 1 column]ᵀ: needs no separate pass over a panel, and
        the gradients are computed with those of H and B."""
        h, b = [self.h], [self.b]
        if self.row is not None:
            h.append(self.row[:, None])
            b.append(self.b.new_ones(self.b.shape[0], 1))
        if self.column is not None:
            h.append(self.h.new_ones(self.h.shape[0], 1))
            b.append(self.column[:, None])
        return self if len(h) == 1 else replace(self, h=torch.cat(h, 1), b=torch.cat(b, 1), row=None, column=None)

    def preactivation(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        """Z of a part of T, in the flat buffer `memory`. Requires `with_biases_inside`."""
        h, b = self.h[rows], self.b[columns]
        return torch.mm(h, b.t(), out=memory[: h.shape[0] * b.shape[0]].view(h.shape[0], b.shape[0]))

    def value(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        """A part of T, in `memory`."""
        t = activation_named(self.activation).forward_(self.preactivation(rows, columns, memory))
        return self.drop_(t, rows, columns)

    def drop_(self, t: Tensor, rows: slice, columns: slice) -> Tensor:
        """Apply dropout to a part of T, in place."""
        if self.seed is not None:
            for part in parts(t):
                here = range(rows.start + part.start, rows.start + part.stop)
                keep = keep_mask(self.seed, self.dropout, here, range(columns.start, columns.stop))
                t[part].div_(1.0 - self.dropout).masked_fill_(keep.logical_not_(), 0.0)
        return t

    def combined_with(
        self, weight: Tensor, combine: str, scale: float, rows: slice, columns: slice, memory: Tensor
    ) -> Tensor:
        """A part of W, in W0's dtype; in `memory` if the dtypes are equal. A sum with W0 is dithered in 16 bits."""
        t, part = self.value(rows, columns, memory), weight[rows, columns]
        if narrow(weight):
            out = weight.new_empty(part.shape)
            for some in parts(part):
                update = t[some] * scale
                if combine != "add":
                    update = update.float() * part[some]
                if combine == "multiply":
                    out[some] = update
                else:
                    add_dithered(part[some], update, range(columns.start, columns.stop), out[some])
            return out
        t = t.to(weight.dtype)
        if combine == "add":
            return torch.add(part, t, alpha=scale, out=t)
        if combine == "modulate":
            return torch.addcmul(part, part, t, value=scale, out=t)
        return t.mul_(part) if scale == 1.0 else t.mul_(part).mul_(scale)

    def backward_(self, dt: Tensor, rows: slice, memory: Tensor) -> Tensor:
        """dL/dZ for rows of T from dL/dT, in place; Z is computed in `memory`, a few rows at a time if it is small."""
        columns = slice(0, dt.shape[1])
        self.drop_(dt, rows, columns)
        for part in panels(dt.shape[0], dt.shape[1], memory.numel()):
            z = self.preactivation(slice(rows.start + part.start, rows.start + part.stop), columns, memory)
            activation_named(self.activation).backward_(dt[part], z)
        return dt


class GeneratedGradients:
    """Sums dL/dH, dL/dB, dL/drow and dL/dcolumn over panels of E = dL/dZ, up to a constant `scale`. `needs` is in this
    order."""

    def __init__(self, made: GeneratedMatrix, needs: tuple[bool, bool, bool, bool], scale: float = 1.0) -> None:
        self.inside = made.with_biases_inside()
        self.scale = scale
        self.r = made.h.shape[1]
        self.needs = (needs[0], needs[1], needs[2] and made.row is not None, needs[3] and made.column is not None)
        # With biases as ranks. The second is [r,K], which is twice as fast in library products.
        self.h = torch.empty_like(self.inside.h) if self.needs[0] or self.needs[2] else None
        self.b_t = total(self.inside.b, *self.inside.b.t().shape) if self.needs[1] or self.needs[3] else None

    def add(self, e: Tensor, rows: slice) -> None:
        """Add E of a panel, in the dtype of the factors."""
        if self.h is not None:
            torch.mm(e, self.inside.b, out=self.h[rows])
        if self.b_t is not None:
            add_product_(self.b_t, self.inside.h[rows].t(), e)

    def results(self) -> tuple[Tensor | None, ...]:
        """Split the columns: the first r are the factor, the next the row bias, the last the column bias."""
        b = None if self.b_t is None else self.b_t.t()
        found = (self.h, b, self.h, b)
        columns: tuple[slice | int, ...] = (slice(0, self.r), slice(0, self.r), self.r, -1)
        return tuple(
            g[:, at].mul(self.scale).to(self.inside.h.dtype) if need and g is not None else None
            for g, at, need in zip(found, columns, self.needs, strict=True)
        )


def _panel_memory(made: GeneratedMatrix) -> Tensor:
    """A buffer for a panel of T [N,K], of rows or columns: at most half of T, unless T is small. Reused for all panels
    of an operation, because allocation is more expensive than the computation."""
    n, k = made.h.shape[0], made.b.shape[0]
    return made.h.new_empty(_panel_elements(n, k, made.h.device))


def _panel_elements(n: int, k: int, device: torch.device) -> int:
    elements = n * k
    if elements <= PANEL_ELEMENTS:
        return elements
    if device.type != "cpu":
        return max(min(elements // 2, GPU_PANEL_ELEMENTS // 2), n, k)
    return max(elements // _GENERATED_SHARE if elements > _LARGE else min(_GENERATED_ELEMENTS, elements // 2), n, k)


def _memory_for_z(memory: Tensor, elements: int, k: int) -> Tensor:
    """A buffer for Z of a panel, in addition to `memory` with dL/dT: of the same size, or an eighth for a large T."""
    return torch.empty_like(memory) if elements <= _LARGE else memory.new_empty(max(memory.numel() // 8, k))


def generated_linear_forward(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    combine: str,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor]:
    """y [M,N]. Nothing is saved: the backward pass recomputes the panels, and drop(x)."""
    seed, seed_x = seeds(combine, seed)
    made = GeneratedMatrix(h, b, row, column, activation, dropout, seed)
    if seed_x is not None:
        (x,) = _dropped(dropout, seed_x, x)
    n, k = weight.shape
    y = x.new_empty(x.shape[0], n)
    inside = made.with_biases_inside()
    memory = _panel_memory(inside)
    for rows in panels(n, k, memory.numel()):
        panel = inside.combined_with(weight, combine, scale, rows, slice(0, k), memory)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, panel.t(), out=y[:, rows])
    return (y,)


def generated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    b: Tensor,
    row: Tensor | None,
    column: Tensor | None,
    combine: str,
    scale: float,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dX = dY W; E = s drop(dYᵀ x)·σ'(Z), times W0 unless it is added; dH = E B, dB = Eᵀ H, drow = E 1, dcolumn = Eᵀ 1.

    dX uses panels of columns and the factors panels of rows: the results are disjoint, so nothing is summed in a
    low-precision tensor.
    """
    seed, seed_x = seeds(combine, seed)
    made = GeneratedMatrix(h, b, row, column, activation, dropout, seed)
    need_x, need_h, need_b, need_row, need_column = needs
    n, k = weight.shape
    gradients = GeneratedGradients(made, (need_h, need_b, need_row, need_column), scale)
    inside = gradients.inside
    memory = _panel_memory(inside)
    dx = None
    if need_x:
        dx = torch.empty_like(x)
        for columns in panels(k, n, memory.numel()):
            panel = inside.combined_with(weight, combine, scale, slice(0, n), columns, memory)
            torch.mm(dy, panel, out=dx[:, columns])
    if seed_x is not None:
        if dx is None:
            (x,) = _dropped(dropout, seed_x, x)
        else:
            x, dx = _dropped(dropout, seed_x, x, dx)
    if any(gradients.needs):
        for_z = _memory_for_z(memory, n * k, k)
        for rows in panels(n, k, memory.numel()):
            dt = _product(dy[:, rows].t(), x, memory)
            if combine != "add":
                dt.mul_(weight[rows])
            gradients.add(inside.backward_(dt, rows, for_z), rows)
    return dx, *gradients.results()


def seeds(combine: str, seed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The seeds for the dropout of T and for that of x, of which at most one is not None."""
    return (None, seed) if combine == "multiply" else (seed, None)


def _dropped(dropout: float, seed: Tensor, *sources: Tensor) -> list[Tensor]:
    """Matrices of one shape with the same elements dropped, because making the mask is most of the work."""
    found = [torch.empty_like(source) for source in sources]
    for rows in parts(sources[0]):
        keep = keep_mask(seed, dropout, range(rows.start, rows.stop), range(sources[0].shape[1]))
        for source, out in zip(sources, found, strict=True):
            out[rows] = torch.where(keep, source[rows] / (1.0 - dropout), 0.0)
    return found


def _product(left: Tensor, right: Tensor, memory: Tensor) -> Tensor:
    """left @ right in the dtype of `memory`, and stored there if the product has that dtype."""
    if left.dtype != memory.dtype:
        return (left @ right).to(memory.dtype)
    return torch.mm(left, right, out=memory[: left.shape[0] * right.shape[1]].view(left.shape[0], right.shape[1]))


def generated_features_forward(
    h: Tensor,
    b: Tensor,
    a: Tensor,
    bias: Tensor | None,
    column: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor]:
    """z [K,r2] from A [r2,N], reduced over N panel by panel."""
    made = GeneratedMatrix(h, b, None, column, activation, dropout, seed)
    z2_t = total(made.b, a.shape[0], made.b.shape[0])
    if bias is not None:
        z2_t += bias[:, None]
    inside = made.with_biases_inside()
    n, k = made.h.shape[0], made.b.shape[0]
    memory = _panel_memory(inside)
    for rows in panels(n, k, memory.numel()):
        t = inside.value(rows, slice(0, k), memory)
        add_product_(z2_t, a[:, rows], t)
    return (z2_t.t().to(made.b.dtype).contiguous(),)


def generated_features_backward(
    dz: Tensor,
    h: Tensor,
    b: Tensor,
    a: Tensor,
    column: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """dT = Aᵀ dzᵀ [N,K]; dA = (T dz)ᵀ; dH, dB and dcolumn from E = drop(dT)·σ'(Z)."""
    made = GeneratedMatrix(h, b, None, column, activation, dropout, seed)
    need_h, need_b, need_a, need_column = needs
    da = torch.empty_like(a) if need_a else None
    gradients = GeneratedGradients(made, (need_h, need_b, False, need_column))
    inside = gradients.inside
    n, k = made.h.shape[0], made.b.shape[0]
    memory = _panel_memory(inside)
    for_z = _memory_for_z(memory, n * k, k)
    for rows in panels(n, k, memory.numel()):
        if da is not None:
            da[:, rows] = (inside.value(rows, slice(0, k), memory) @ dz).t()
        if any(gradients.needs):
            dt = _product(a[:, rows].t(), dz.t(), memory)
            gradients.add(inside.backward_(dt, rows, for_z), rows)
    dh, db, _, dcolumn = gradients.results()
    return dh, db, da, dcolumn
