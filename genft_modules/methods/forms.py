"""What a generator yields: the form of its update, that is, which fused operation applies it.

Notation: x [..., K] activations, W0 [N, K] the frozen weight as `nn.Linear` stores it, ΔW [N, K] the update. Factors
have the dtype of W0 or a wider one. Updates are added by setting factors side by side along r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from genft_kernels import (
    draw_seed,
    generated_linear,
    input_edit,
    input_edit_linear,
    lowrank_linear,
    sliced_linear,
)
from genft_kernels.activations import activation as activation_named
from genft_modules.methods.weights import weight_features


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale·Q Pᵀ with p = P [K, r] and q = Q [N, r]; `dropout` acts on the elements of x before P."""

    p: Tensor
    q: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] as one operation."""
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

    def update(self, x: Tensor, backend: str) -> Tensor:
        """x ΔWᵀ [..., N] alone, for a base layer that has to make its own product."""
        t = F.dropout(x, self.dropout) @ self.p.to(x.dtype)
        return (t @ self.q.to(t.dtype).t()) * self.scale

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] with ΔW = B A, in float32 or wider."""
        return _wide(self.p).t(), _wide(self.q) * self.scale

    def part(self, dim: int, where: slice) -> LowRank:
        """The update of the rows (`dim` 0) or columns (1) `where` of W0 alone."""
        return replace(self, q=self.q[where]) if dim == 0 else replace(self, p=self.p[where])

    def delta_weight(self, weight: Tensor) -> Tensor:
        """ΔW [N, K], in float32 or wider."""
        p, q = _wide(self.p), _wide(self.q)
        return (q @ p.t()) * self.scale


@dataclass(frozen=True)
class InputEdit:
    """ΔW = scale·(W0 φᵀ) ψ with psi = ψ [r, K] and phi = φ [r, K]: x is edited, the weight is not looked at."""

    psi: Tensor
    phi: Tensor
    scale: float = 1.0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] as one operation."""
        return input_edit_linear(x, weight, self.psi, self.phi, bias, scale=self.scale, backend=backend)

    def edit(self, x: Tensor, backend: str) -> Tensor:
        """x' [..., K] with base(x') = x (W0 + ΔW)ᵀ + b, for a base layer that has to make its own product."""
        return input_edit(x, self.psi, self.phi, scale=self.scale, backend=backend)

    def low_rank(self, weight: Tensor, backend: str) -> LowRank:
        """The same update in the other form: P = ψᵀ, Q = W0 φᵀ."""
        return LowRank(self.psi.t(), weight_features(weight, self.phi, backend=backend), self.scale)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] with ΔW = B A, in float32 or wider."""
        phi = _wide(self.phi)
        return _wide(self.psi), (weight.to(phi.dtype) @ phi.t()) * self.scale

    def part(self, dim: int, where: slice) -> InputEdit:
        """The update of some rows of W0 alone, which edit the same x. Columns have no edit of their own."""
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
    column_bias [K] or None: of full rank, made tile by tile inside the product. `dropout` acts on the elements of ΔW.
    """

    h: Tensor
    b: Tensor
    row_bias: Tensor | None = None
    column_bias: Tensor | None = None
    scale: float = 1.0
    activation: str = "none"
    dropout: float = 0.0

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] as one operation."""
        return generated_linear(
            x,
            weight,
            self.h,
            self.b,
            bias,
            row_bias=self.row_bias,
            column_bias=self.column_bias,
            scale=self.scale,
            activation=self.activation,
            dropout=self.dropout,
            seed=draw_seed(x.device) if self.dropout else None,
            backend=backend,
        )

    def update(self, x: Tensor, backend: str) -> Tensor:
        """x ΔWᵀ [..., N] alone: the same operation on a W0 of zeros, which are one element in memory."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the operation's cast of W0 would write all zeros out
        return self.linear(x, x.new_zeros(()).expand(self.h.shape[0], self.b.shape[0]), None, backend)

    def low_rank(self) -> LowRank:
        """The same update in the other form, where σ is none and nothing is dropped: a bias is one more column."""
        if self.activation != "none" or self.dropout:
            raise ValueError(f"low_rank: σ is {self.activation} and dropout {self.dropout:g}, expected none and 0")
        p, q = [self.b], [self.h]
        if self.row_bias is not None:
            p.append(self.b.new_ones(self.b.shape[0], 1))
            q.append(self.row_bias[:, None])
        if self.column_bias is not None:
            p.append(self.column_bias[:, None])
            q.append(self.h.new_ones(self.h.shape[0], 1))
        return LowRank(torch.cat(p, dim=1), torch.cat(q, dim=1), self.scale)

    def low_rank_factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """None: as long as σ is none the generator yields a `LowRank` in the place of this; else the rank is full."""
        return None

    def part(self, dim: int, where: slice) -> Generated:
        """The update of the rows (`dim` 0) or columns (1) `where` of W0 alone."""
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
        return activation_named(self.activation).forward(z) * self.scale


@dataclass(frozen=True)
class Slices:
    """ΔW is zero but for k of its rows, ΔW[indices] = values [k, K], or of its columns, ΔW[:, indices] = values [N, k].

    `indices` int64 [k], all different; `orientation` "row" or "column"; `size`: N for rows, K for columns.
    """

    values: Tensor
    indices: Tensor
    orientation: str
    size: int

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x (W0 + ΔW)ᵀ + b [..., N] as one operation."""
        return sliced_linear(x, weight, self.values, self.indices, bias, orientation=self.orientation, backend=backend)

    def update(self, x: Tensor, backend: str) -> Tensor:
        """x ΔWᵀ [..., N] alone, for a base layer that has to make its own product."""
        values_t = self.values.to(x.dtype).t()
        if self.orientation == "column":
            return x.index_select(-1, self.indices) @ values_t
        t = x @ values_t
        return t.new_zeros(*t.shape[:-1], self.size).index_copy(-1, self.indices, t)

    def part(self, dim: int, where: slice) -> Slices | LowRank:
        """The update of the rows (`dim` 0) or columns (1) `where` of W0 alone. How many of the slices lie there only
        the device knows; so where the slices themselves would be counted out, it is low rank."""
        if dim == (0 if self.orientation == "row" else 1):
            return self.low_rank().part(dim, where)
        return replace(self, values=self.values[:, where] if dim == 1 else self.values[where])

    def low_rank(self) -> LowRank:
        """The same update in the other form: one of its factors only selects, a column of it for each slice."""
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
    """The sum of several updates as the fewest forms: one, unless they differ in dropout on x or are generated.

    Input edits stay an input edit; beside another form they become low rank, at the price of one pass over W0. So do
    slices, with a factor that only selects, for two adapters may have the same ones. A generated form stands for
    itself, and comes first: its operation carries the base layer's product at no price, where the low-rank ones add
    little to what is there.
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
    """x (W0 + Σ ΔW)ᵀ + b [..., N]: the first form's operation, which has the product with W0 in it, and what the others
    add to it."""
    first, *others = forms
    return _sum(first.linear(x, weight, bias, backend), others, x, backend)


def apply_around(base: Callable[[Tensor], Tensor], forms: Sequence[Form], x: Tensor, backend: str) -> Tensor:
    """The same with a base layer that makes its own product: on an edited input, or with the updates beside it."""
    first, *others = forms
    if isinstance(first, InputEdit):
        return _sum(base(first.edit(x, backend)), others, x, backend)
    return _sum(base(x), forms, x, backend)


def _sum(y: Tensor, forms: Sequence[Form], x: Tensor, backend: str) -> Tensor:
    for form in forms:
        assert not isinstance(form, InputEdit)  # `side_by_side` leaves one only where it stands alone
        y = y + form.update(x, backend)
    return y


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
