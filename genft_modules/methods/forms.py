"""The forms of an update ΔW. Each form is applied by one fused operation.

Notation: x [..., K] activations, W0 [N, K] the frozen weight as stored by `nn.Linear`, ΔW [N, K] the update. Factors
have the dtype of W0 or a wider one. Updates are added by concatenating their factors along r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from genft_kernels import (
    RowGroups,
    draw_seed,
    generated_linear,
    grouped_lowrank_linear,
    input_edit,
    input_edit_linear,
    lowrank_linear,
    sliced_linear,
)
from genft_kernels.activations import activation as activation_named
from genft_kernels.checks import as_rows, autocast, like_rows
from genft_kernels.dither import dithered_sum
from genft_modules.methods.weights import by_rows, weight_features


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale·Q Pᵀ with p = P [K, r] and q = Q [N, r]; `dropout` is applied to x before P."""

    p: Tensor
    q: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] in one operation."""
        return lowrank_linear(
            x,
            weight,
            self.p,
            self.q,
            bias,
            scale=self.scale,
            dropout=self.dropout,
            seed=draw_seed(x.device) if self.dropout else None,
            backend=backend,
        )

    def update(self, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        """Only x ΔWᵀ [..., N], for a base layer that computes its own product."""
        t = F.dropout(x, self.dropout) @ self.p.to(x.dtype)
        return (t @ self.q.to(t.dtype).t()) * self.scale

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] with ΔW = B A, in float32 or wider."""
        return _wide(self.p).t(), _wide(self.q) * self.scale

    def part(self, dim: int, where: slice) -> LowRank:
        """The part of the update for the rows (`dim` 0) or columns (1) `where` of W0."""
        return replace(self, q=self.q[where]) if dim == 0 else replace(self, p=self.p[where])

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K], in float32 or wider."""
        p, q = _wide(self.p), _wide(self.q)
        return (q @ p.t()) * self.scale


@dataclass(frozen=True)
class InputEdit:
    """ΔW = scale·(W0 φᵀ) ψ with psi = ψ [r, K] and phi = φ [r, K], applied as an edit of x without reading W0.

    For stacked experts with a pair each, psi and phi are [experts, r, K]: see `of` and `grouped_edit`.
    """

    psi: Tensor
    phi: Tensor
    scale: float = 1.0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] in one operation."""
        return input_edit_linear(x, weight, self.psi, self.phi, bias, scale=self.scale, backend=backend)

    def edit(self, x: Tensor, backend: str) -> Tensor:
        """x' [..., K] with base(x') = x (W0 + ΔW)ᵀ + b, for a base layer that computes its own product."""
        return input_edit(x, self.psi, self.phi, scale=self.scale, backend=backend)

    def of(self, expert: int) -> InputEdit:
        """The edit for one expert."""
        return self if self.psi.dim() == 2 else InputEdit(self.psi[expert], self.phi[expert], self.scale)

    def grouped_edit(self, to: Tensor, x: Tensor, rows: RowGroups, backend: str) -> Tensor:
        """to [S, ..., K] plus the edit of x [S, ..., K] with the pair of each sample's expert, which `rows` gives. All
        samples have one, and they are sorted by it."""
        update = grouped_lowrank_linear(x, None, self.psi.mT, self.phi.mT * self.scale, rows, backend=backend)
        return dithered_sum(to, update)

    def low_rank(self, weight: Tensor, backend: str) -> LowRank:
        """The same update as LowRank: P = ψᵀ, Q = W0 φᵀ."""
        return LowRank(self.psi.t(), weight_features(weight, self.phi, backend=backend), self.scale)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] with ΔW = B A, in float32 or wider."""
        phi = _wide(self.phi)
        return _wide(self.psi), (weight.to(phi.dtype) @ phi.t()) * self.scale

    def part(self, dim: int, where: slice) -> InputEdit:
        """The part of the update for some rows of W0, which is the same edit of x. Not available for columns."""
        if dim != 0:
            raise ValueError(f"dim: got {dim}, expected 0; see `low_rank`")
        return self

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K], in float32 or wider."""
        psi, phi = _wide(self.psi), _wide(self.phi)
        return (weight.to(phi.dtype) @ phi.t()) @ psi * self.scale


@dataclass(frozen=True)
class Generated:
    """ΔW = scale·drop(σ(H Bᵀ + row_bias 1ᵀ + 1 column_biasᵀ)) with h = H [N, r], b = B [K, r], row_bias [N] or None and
    column_bias [K] or None: full rank, generated tile by tile inside the product. `dropout` is applied to ΔW.

    With `hadamard`, ΔW = scale·W0 ⊙ σ(…), and `dropout` is applied to x in the product with ΔW.
    """

    h: Tensor
    b: Tensor
    row_bias: Tensor | None = None
    column_bias: Tensor | None = None
    scale: float = 1.0
    activation: str = "none"
    dropout: float = 0.0
    hadamard: bool = False

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] in one operation; in two products if x is dropped before ΔW alone."""
        if not (self.hadamard and self.dropout):
            return self._operation(x, weight, bias, "modulate" if self.hadamard else "add", backend)
        update = self.update(x, weight, backend)
        x, weight, bias = autocast(x, weight, bias)
        # The product is added to the update, not the other way round: one rounding, which small updates survive.
        y = like_rows(torch.addmm(as_rows(update), as_rows(x), weight.t()), update)
        return y if bias is None else y + bias

    def update(self, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        """Only x ΔWᵀ [..., N]."""
        (x,) = autocast(x)  # a cast of W0 inside would materialise the zeros, or W0
        if not self.hadamard:  # the same operation on a zero W0, an expanded tensor of one element
            zeros = x.new_zeros(()).expand(self.h.shape[0], self.b.shape[0])
            return self._operation(x, zeros, None, "add", backend)
        seed = draw_seed(x.device) if self.dropout else None
        return by_rows(
            weight,
            lambda rows, where: self.part(0, where)._operation(x, rows.to(x.dtype), None, "multiply", backend, seed),
        )

    def _operation(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, combine: str, backend: str, seed: Tensor | None = None
    ) -> Tensor:
        return generated_linear(
            x,
            weight,
            self.h,
            self.b,
            bias,
            row_bias=self.row_bias,
            column_bias=self.column_bias,
            combine=combine,
            scale=self.scale,
            activation=self.activation,
            dropout=self.dropout,
            seed=draw_seed(x.device) if self.dropout and seed is None else seed,
            backend=backend,
        )

    def low_rank(self) -> LowRank:
        """The same update as LowRank, if σ is none and there is no dropout; each bias adds one to the rank."""
        if self.activation != "none" or self.dropout or self.hadamard:
            raise ValueError(
                f"low_rank: got σ = {self.activation}, dropout = {self.dropout:g} and hadamard = {self.hadamard}, "
                "expected none, 0 and False"
            )
        p, q = [self.b], [self.h]
        if self.row_bias is not None:
            p.append(self.b.new_ones(self.b.shape[0], 1))
            q.append(self.row_bias[:, None])
        if self.column_bias is not None:
            p.append(self.column_bias[:, None])
            q.append(self.h.new_ones(self.h.shape[0], 1))
        return LowRank(torch.cat(p, dim=1), torch.cat(q, dim=1), self.scale)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: ΔW has full rank. (If σ is none, a generator without `hadamard` returns `LowRank` instead.)"""
        return None

    def part(self, dim: int, where: slice) -> Generated:
        """The part of the update for the rows (`dim` 0) or columns (1) `where` of W0."""
        if dim == 0:
            return replace(self, h=self.h[where], row_bias=None if self.row_bias is None else self.row_bias[where])
        column_bias = None if self.column_bias is None else self.column_bias[where]
        return replace(self, b=self.b[where], column_bias=column_bias)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K] without dropout, in float32 or wider."""
        z = _wide(self.h) @ _wide(self.b).t()
        if self.row_bias is not None:
            z += _wide(self.row_bias)[:, None]
        if self.column_bias is not None:
            z += _wide(self.column_bias)
        delta = activation_named(self.activation).forward(z) * self.scale
        return delta * weight if self.hadamard else delta


@dataclass(frozen=True)
class Slices:
    """ΔW is zero except for k rows, ΔW[indices] = values [k, K], or k columns, ΔW[:, indices] = values [N, k].

    `indices` int64 [k], unique; `orientation` "row" or "column"; `size`: N for rows, K for columns.
    """

    values: Tensor
    indices: Tensor
    orientation: str
    size: int

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] in one operation."""
        return sliced_linear(x, weight, self.values, self.indices, bias, orientation=self.orientation, backend=backend)

    def update(self, x: Tensor, weight: Tensor, backend: str) -> Tensor:
        """Only x ΔWᵀ [..., N], for a base layer that computes its own product."""
        values_t = self.values.to(x.dtype).t()
        if self.orientation == "column":
            return x.index_select(-1, self.indices) @ values_t
        t = x @ values_t
        return t.new_zeros(*t.shape[:-1], self.size).index_copy(-1, self.indices, t)

    def part(self, dim: int, where: slice) -> Slices | LowRank:
        """The part of the update for the rows (`dim` 0) or columns (1) `where` of W0. LowRank if that dimension is the
        indexed one: the number of indices inside `where` is known only on the device."""
        if dim == (0 if self.orientation == "row" else 1):
            return self.low_rank().part(dim, where)
        return replace(self, values=self.values[:, where] if dim == 1 else self.values[where])

    def low_rank(self) -> LowRank:
        """The same update as LowRank: one factor is a one-hot selection matrix with a column per slice."""
        places = torch.arange(self.size, device=self.indices.device)
        chosen = (places[:, None] == self.indices).to(self.values.dtype)
        if self.orientation == "column":
            return LowRank(chosen, self.values)
        return LowRank(self.values.t(), chosen)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [k, K] and B [N, k] with ΔW = B A, in float32 or wider."""
        return self.low_rank().low_rank_factors(weight)

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K], in float32 or wider."""
        values = _wide(self.values)
        return values.new_zeros(weight.shape).index_copy(1 if self.orientation == "column" else 0, self.indices, values)


Form = LowRank | InputEdit | Generated | Slices


def side_by_side(forms: Sequence[Form], weight: Tensor, backend: str) -> list[Form]:
    """The sum of several updates in as few forms as possible: one, unless they differ in dropout on x or are generated.

    Several input edits are concatenated; mixed with other forms they become low rank, which costs one pass over W0.
    Slices become low rank too, because two adapters may select the same ones. Generated forms stay separate and come
    first, because their operation includes the base product at no extra cost.
    """
    if len(forms) == 1:
        return list(forms)
    edits = [form for form in forms if isinstance(form, InputEdit)]
    if len(edits) == len(forms):
        psi = torch.cat([form.psi for form in edits])
        return [InputEdit(psi, torch.cat([form.phi * form.scale for form in edits]))]
    generated: list[Form] = []
    groups: dict[float, list[LowRank]] = {}
    for form in forms:
        if isinstance(form, Generated):
            generated.append(form)
            continue
        low = form.low_rank(weight, backend) if isinstance(form, InputEdit) else form
        low = low.low_rank() if isinstance(low, Slices) else low
        groups.setdefault(low.dropout, []).append(low)
    return [
        *generated,
        *(
            replace(
                group[0],
                p=torch.cat([form.p for form in group], dim=1),
                q=torch.cat([form.q * form.scale for form in group], dim=1),
                scale=1.0,
            )
            for group in groups.values()
        ),
    ]


def apply(forms: Sequence[Form], x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """x (W0 + Σ ΔW)ᵀ + b [..., N]: the first form's operation includes the product with W0; the other updates are added
    to it."""
    first, *others = forms
    return _sum(first.linear(x, weight, bias, backend), others, x, weight, backend)


def apply_around(
    base: Callable[[Tensor], Tensor], forms: Sequence[Form], x: Tensor, weight: Tensor, backend: str
) -> Tensor:
    """The same for a base layer that computes its own product: on the edited input, or with the updates added."""
    first, *others = forms
    if isinstance(first, InputEdit):
        return _sum(base(first.edit(x, backend)), others, x, weight, backend)
    return _sum(base(x), forms, x, weight, backend)


def _sum(y: Tensor, forms: Sequence[Form], x: Tensor, weight: Tensor, backend: str) -> Tensor:
    for form in forms:
        assert not isinstance(form, InputEdit)  # `side_by_side` returns an InputEdit only on its own
        y = y + form.update(x, weight, backend)
    return y


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
