"""Every operation in plain PyTorch, forward and backward written out: the truth in tests and the path taken on a CPU.

Notation: x [M,K] rows of activations, weight W0 [N,K] frozen, P [K,r], Q [N,r], ψ and φ [r,K], s scale. Nothing of
N·K elements is allocated: dropout goes panel by panel, everything else is products whose results are [M,N], [M,K] or
have a side of r. The derivations are in docs/mathematics.md.

In 16 bits an update is never added to a result that is rounded already, which would lose it: it is written first,
and the library adds its product with W0 to it in float32 (`add_base_`).

Factors may be in a wider dtype than the activations: products run in the activations' dtype (a library product
accumulates wider inside), gradients come back in the factor's dtype.

A backward returns one entry per differentiable input, None where `needs` is False.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activation as activation_named
from .dither import add_dithered
from .dropout import keep_mask
from .rows import RowGroups

_PANEL_ELEMENTS = 1 << 16  # a panel and its mask stay in a core's L2 ...
_GPU_PANEL_ELEMENTS = 1 << 23  # ... or keep a whole GPU busy
_TILE = 16
_GENERATED_ELEMENTS = 1 << 19  # a panel of a generated matrix meets products, which want it larger ...
_GENERATED_SHARE = 48  # ... and of a large matrix, this part of it
_LARGE = 1 << 23
_GATHERED_ELEMENTS = 1 << 20  # factors are copied for this much of a batch at a time


# ---- skinny products, with dropout where a seed is given


def _panels(rows: int, columns: int, elements: int = _PANEL_ELEMENTS) -> Iterator[slice]:
    """Stretches of rows that make panels of at most `elements`, whole register tiles of a product if they are many."""
    height = max(1, elements // max(columns, 1))
    if height > _TILE:
        height -= height % _TILE
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _parts(source: Tensor) -> Iterator[slice]:
    """The panels of a matrix that element-wise work goes through, of a size for its device."""
    rows, columns = source.shape
    return _panels(rows, columns, _PANEL_ELEMENTS if source.device.type == "cpu" else _GPU_PANEL_ELEMENTS)


def _dropped(panel: Tensor, rows: slice, dropout: float, seed: Tensor) -> Tensor:
    """`panel`, rows of a larger matrix, with dropped elements zero and survivors scaled by 1/(1-p)."""
    keep = keep_mask(seed, dropout, range(rows.start, rows.stop), range(panel.shape[1]))
    return torch.where(keep, panel / (1.0 - dropout), 0.0)


def _total(like: Tensor, *shape: int) -> Tensor:
    """Zeros to sum panels in: float32 where the half precision of `like` would be rounded to at every panel."""
    return like.new_zeros(shape, dtype=torch.float32 if narrow(like) else like.dtype)


def narrow(tensor: Tensor) -> bool:
    """Whether a tensor has 16 bits, in which an update may be smaller than the rounding of what it is added to."""
    return tensor.dtype.itemsize == 2


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right."""
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


def _project(source: Tensor, factor: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(source) @ factor: [M,C] @ [C,r] -> [M,r]."""
    if seed is None:
        return source @ factor
    out = source.new_empty(source.shape[0], factor.shape[1])
    for rows in _parts(source):
        torch.mm(_dropped(source[rows], rows, dropout, seed), factor, out=out[rows])
    return out


def _outer(left: Tensor, source: Tensor, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """leftᵀ @ drop(source): [r,M] @ [M,C] -> [r,C]."""
    if seed is None:
        return left.t() @ source
    out = _total(source, left.shape[1], source.shape[1])
    for rows in _parts(source):
        _add_product_(out, left[rows].t(), _dropped(source[rows], rows, dropout, seed))
    return out


def add_update(
    source: Tensor,
    weight: Tensor,
    left: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """source @ weight + drop(left @ factor) + bias: [M,K] @ [K,N] and [M,r] @ [r,N] -> [M,N].

    In 16 bits the update is written first (`add_base_`); wider, an update of rank r is the cheaper product to add.
    """
    if narrow(source):
        out = left @ factor
        if seed is not None:
            for rows in _parts(out):
                out[rows] = _dropped(out[rows], rows, dropout, seed)
        return add_base_(out, source, weight, bias)
    out = F.linear(source, weight.t(), bias)
    if seed is None:
        return out.addmm_(left, factor)
    for rows in _parts(out):
        out[rows] += _dropped(left[rows] @ factor, rows, dropout, seed)
    return out


def add_base_(update: Tensor, source: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """update + source @ weight + bias, in the memory of `update` [M,N]: source [M,K], weight [K,N].

    The product is added in float32 and the sum rounded once. A bias comes last: in the update it would set the place
    that the update is rounded to.
    """
    update.addmm_(source, weight)
    return update if bias is None else update.add_(bias)


# ---- y = x W0ᵀ + s (drop(x) P) Qᵀ + b


def lowrank_linear_forward(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns y [M,N] and t = s drop(x) P [M,r], which the backward wants."""
    t = _project(x, p.to(x.dtype) * scale, dropout, seed)
    return add_update(x, weight.t(), t, q.to(x.dtype).t(), bias), t


def lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """u = s dY Q; dX = dY W0 + drop(u Pᵀ), dP = drop(x)ᵀ u, dQ = dYᵀ t, db = Σ dY."""
    need_x, need_p, need_q, need_bias = needs
    dx = dp = dq = None
    # What reads dY and x comes first, while they are in the cache; the large product pushes them out.
    if need_q:
        dq = _outer(t, dy).t().to(q.dtype)
    if need_x or need_p:
        u = dy @ (q.to(dy.dtype) * scale)
        if need_p:
            dp = _outer(u, x, dropout, seed).t().to(p.dtype)
        if need_x:
            dx = add_update(dy, weight, u, p.to(dy.dtype).t(), None, dropout, seed)
    return dx, dp, dq, dy.sum(0) if need_bias else None


# ---- x' = x + s (x ψᵀ) φ, and its product with W0


def _edited(source: Tensor, left: Tensor, factor: Tensor, *, overwrite: bool = False) -> Tensor:
    """source + left @ factor: [M,C] + [M,r] @ [r,C], in source's memory if it may; 16 bits keep the sum's mean."""
    if not narrow(source):
        return source.addmm_(left, factor) if overwrite else torch.addmm(source, left, factor)
    out = source if overwrite else source.new_empty(source.shape)
    for rows in _parts(source):
        # In float32: the update may be below what float16 can hold.
        add_dithered(source[rows], left[rows].float() @ factor.float(), range(source.shape[1]), out[rows])
    return out


def input_edit_forward(x: Tensor, psi: Tensor, phi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns x' [M,K] and t = s x ψᵀ [M,r]."""
    t = x @ (psi.to(x.dtype) * scale).t()
    return _edited(x, t, phi.to(x.dtype)), t


def input_edit_backward(
    g: Tensor,
    x: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    scale: float,
    needs: tuple[bool, bool, bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From g = dL/dx': u = s g φᵀ; dX = g + u ψ, dψ = uᵀ x, dφ = tᵀ g. `overwrite`: dX may be written into g."""
    need_x, need_psi, need_phi = needs
    dx = dpsi = dphi = None
    if need_phi:
        dphi = _outer(t, g).to(phi.dtype)
    if need_x or need_psi:
        u = g @ (phi.to(g.dtype) * scale).t()
        if need_psi:
            dpsi = _outer(u, x).to(psi.dtype)
        if need_x:
            dx = _edited(g, u, psi.to(g.dtype), overwrite=overwrite)
    return dx, dpsi, dphi


def edit_by_features(x: Tensor, weight: Tensor) -> bool:
    """Whether an edited linear layer makes y from the features Q = W0 φᵀ [N,r], y = x W0ᵀ + t Qᵀ + b, and not from x'.

    In 16 bits always, forward and backward: x' would round the update away, and dY W0 that of dX. Else where x' is the
    larger of the two, forward.
    """
    return narrow(x) or x.shape[0] > weight.shape[0]


def input_edit_linear_forward(
    x: Tensor, weight: Tensor, psi: Tensor, phi: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y = x' W0ᵀ + b [M,N], t [M,r] and, in 16 bits, the features Q [N,r] for the backward; x' is not kept."""
    if not edit_by_features(x, weight):
        edited, t = input_edit_forward(x, psi, phi, scale)
        return F.linear(edited, weight, bias), t, None
    q = weight @ phi.to(weight.dtype).t()
    y, t = lowrank_linear_forward(x, weight, psi.t(), q, bias, scale, 0.0, None)
    return y, t, q if narrow(x) else None


def input_edit_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    psi: Tensor,
    phi: Tensor,
    t: Tensor,
    q: Tensor | None,
    scale: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """With the features, the backward of a low-rank update and dφ = dQᵀ W0; else that of the edit at g = dY W0."""
    dx = dpsi = dphi = None
    db = dy.sum(0) if needs[3] else None
    if q is not None:
        dx, dp, dq, _ = lowrank_linear_backward(
            dy, x, weight, psi.t(), q, t, scale, 0.0, None, (needs[0], needs[1], needs[2], False)
        )
        dpsi = None if dp is None else dp.t()
        dphi = None if dq is None else (dq.t() @ weight).to(phi.dtype)
    elif any(needs[:3]):
        dx, dpsi, dphi = input_edit_backward(
            dy @ weight, x, psi, phi, t, scale, (needs[0], needs[1], needs[2]), overwrite=True
        )
    return dx, dpsi, dphi, db


# ---- y_i = x_i W0ᵀ + x_i P_g Q_gᵀ + b for sample i of group g


def _per_sample(factor: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor [G,C,r] of each sample, [S,C,r]; zeros for a sample of no group."""
    last = factor.shape[0] - 1
    taken = factor.index_select(0, index.clamp(0, last)).to(dtype)
    return taken.masked_fill_(((index < 0) | (index > last))[:, None, None], 0.0)


def _by_sample(rows: RowGroups, *matrices: Tensor) -> tuple[Tensor, ...]:
    """Each matrix [M,C] as [S,M/S,C]."""
    samples = rows.group.shape[0]
    return tuple(m.unflatten(0, (samples, m.shape[0] // max(samples, 1))) for m in matrices)


def grouped_lowrank_linear_forward(
    x: Tensor, weight: Tensor | None, p: Tensor, q: Tensor, rows: RowGroups, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns y [M,N] and t [M,r], t_i = x_i P_g, which the backward wants."""
    y = x.new_empty(x.shape[0], q.shape[1])
    t = x.new_empty(x.shape[0], p.shape[2])
    xs, ys, ts = _by_sample(rows, x, y, t)
    for part in _panels(xs.shape[0], max(p.shape[1], q.shape[1]) * p.shape[2], _GATHERED_ELEMENTS):
        index = rows.group[part]
        torch.bmm(xs[part], _per_sample(p, index, x.dtype), out=ts[part])
        torch.bmm(ts[part], _per_sample(q, index, x.dtype).mT, out=ys[part])
    return y if weight is None else add_base_(y, x, weight.t(), bias), t


def grouped_lowrank_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    p: Tensor,
    q: Tensor,
    t: Tensor,
    rows: RowGroups,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """u_i = dy_i Q_g; dX_i = dy_i W0 + u_i P_gᵀ, dP_g = Σ x_iᵀ u_i and dQ_g = Σ dy_iᵀ t_i over the group, db = Σ dY."""
    need_x, need_p, need_q, need_bias = needs
    groups = p.shape[0]
    dx = dp = dq = None
    if need_x:
        dx = x.new_empty(x.shape)
    dp, dq = (_total(like, groups + 1, *like.shape[1:]) if need else None for like, need in ((p, need_p), (q, need_q)))
    xs, dys, ts = _by_sample(rows, x, dy, t)
    for part in _panels(xs.shape[0], max(p.shape[1], q.shape[1]) * p.shape[2], _GATHERED_ELEMENTS):
        index = rows.group[part]
        # Samples of no group are added to a group of their own, whose sum is thrown away.
        slot = torch.where((index < 0) | (index > groups), groups, index)
        if need_x or need_p:
            u = torch.bmm(dys[part], _per_sample(q, index, dy.dtype))
            if dx is not None:
                torch.bmm(u, _per_sample(p, index, dy.dtype).mT, out=_by_sample(rows, dx)[0][part])
            if dp is not None:
                dp.index_add_(0, slot, torch.bmm(xs[part].mT, u).to(dp.dtype))
        if dq is not None:
            dq.index_add_(0, slot, torch.bmm(dys[part].mT, ts[part]).to(dq.dtype))
    return (
        dx if dx is None or weight is None else add_base_(dx, dy, weight),
        None if dp is None else dp[:groups].to(p.dtype),
        None if dq is None else dq[:groups].to(q.dtype),
        dy.sum(0) if need_bias else None,
    )


# ---- h = σ(ρ drop(W0) Aᵀ + bias)


def weight_features_forward(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Returns the pre-activation z = ρ drop(W0) Aᵀ + bias [N,r], in A's dtype."""
    z = _project(weight, a.to(weight.dtype).t(), dropout, seed).to(a.dtype)
    z = z.mul_(ratio)
    return z if bias is None else z.add_(bias)


def weight_features_backward(dz: Tensor, weight: Tensor, ratio: float, dropout: float, seed: Tensor | None) -> Tensor:
    """dA = ρ dZᵀ drop(W0) [r,K] in dZ's dtype."""
    return _outer(dz.to(weight.dtype), weight, dropout, seed).to(dz.dtype).mul_(ratio)


# ---- the generated matrix T = drop(σ(H Bᵀ + row + column)) [N,K], of which only a panel of rows exists at a time


@dataclass(frozen=True)
class Generated:
    """What T is made from: H [N,r], B [K,r], row [N] or None, column [K] or None, σ, p and the seed of drop."""

    h: Tensor
    b: Tensor
    row: Tensor | None
    column: Tensor | None
    activation: str
    dropout: float
    seed: Tensor | None

    def part(self, rows: slice | None = None, columns: slice | None = None) -> Generated:
        """What a stretch of rows or columns of T is made from (but for the mask, which is that of the whole)."""
        rows, columns = rows or slice(None), columns or slice(None)
        return replace(
            self,
            h=self.h[rows],
            b=self.b[columns],
            row=None if self.row is None else self.row[rows],
            column=None if self.column is None else self.column[columns],
        )

    def with_biases_inside(self) -> Generated:
        """The same T with each bias as one more rank, [H row 1] [B 1 column]ᵀ: no pass of its own over a panel, and its
        gradient falls out of the products for H and B."""
        h, b = [self.h], [self.b]
        if self.row is not None:
            h.append(self.row[:, None])
            b.append(self.b.new_ones(self.b.shape[0], 1))
        if self.column is not None:
            h.append(self.h.new_ones(self.h.shape[0], 1))
            b.append(self.column[:, None])
        return self if len(h) == 1 else replace(self, h=torch.cat(h, 1), b=torch.cat(b, 1), row=None, column=None)

    def preactivation(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        """Z of a part of T, in the flat `memory`. The biases have to be inside."""
        h, b = self.h[rows], self.b[columns]
        return torch.mm(h, b.t(), out=memory[: h.shape[0] * b.shape[0]].view(h.shape[0], b.shape[0]))

    def value(self, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        """T of a part, in `memory`."""
        t = activation_named(self.activation).forward_(self.preactivation(rows, columns, memory))
        return self.drop_(t, rows, columns)

    def drop_(self, t: Tensor, rows: slice, columns: slice) -> Tensor:
        """drop of a part of T, in place."""
        if self.seed is not None:
            for part in _parts(t):
                here = range(rows.start + part.start, rows.start + part.stop)
                keep = keep_mask(self.seed, self.dropout, here, range(columns.start, columns.stop))
                t[part].div_(1.0 - self.dropout).masked_fill_(keep.logical_not_(), 0.0)
        return t

    def added_to(self, weight: Tensor, scale: float, rows: slice, columns: slice, memory: Tensor) -> Tensor:
        """W0 + s T of a part, in W0's dtype; in `memory` where the dtypes agree. 16 bits keep the sum's mean."""
        t, part = self.value(rows, columns, memory), weight[rows, columns]
        if narrow(weight):
            out = weight.new_empty(part.shape)
            for some in _parts(part):
                add_dithered(part[some], t[some] * scale, range(columns.start, columns.stop), out[some])
            return out
        t = t.to(weight.dtype)
        return torch.add(part, t, alpha=scale, out=t)

    def backward_(self, dt: Tensor, rows: slice, memory: Tensor) -> Tensor:
        """dL/dZ of rows of T, from dL/dT and in its place; Z passes through `memory`, as many rows as it holds."""
        columns = slice(0, dt.shape[1])
        self.drop_(dt, rows, columns)
        for part in _panels(dt.shape[0], dt.shape[1], memory.numel()):
            z = self.preactivation(slice(rows.start + part.start, rows.start + part.stop), columns, memory)
            activation_named(self.activation).backward_(dt[part], z)
        return dt


class GeneratedGradients:
    """Sums dL/dH, dL/dB, dL/drow and dL/dcolumn over panels of E = dL/dZ, which may lack a constant `scale`. `needs`
    follows that order."""

    def __init__(self, made: Generated, needs: tuple[bool, bool, bool, bool], scale: float = 1.0) -> None:
        self.inside = made.with_biases_inside()
        self.scale = scale
        self.r = made.h.shape[1]
        self.needs = (needs[0], needs[1], needs[2] and made.row is not None, needs[3] and made.column is not None)
        # Biases among the ranks. The second as [r,K]: a library makes such wide rows in half the time.
        self.h = torch.empty_like(self.inside.h) if self.needs[0] or self.needs[2] else None
        self.b_t = _total(self.inside.b, *self.inside.b.t().shape) if self.needs[1] or self.needs[3] else None

    def add(self, e: Tensor, rows: slice) -> None:
        """Takes E of a panel, in the dtype of the factors."""
        if self.h is not None:
            torch.mm(e, self.inside.b, out=self.h[rows])
        if self.b_t is not None:
            _add_product_(self.b_t, self.inside.h[rows].t(), e)

    def results(self) -> tuple[Tensor | None, ...]:
        """Of the columns, the first r are the factor's, the next is the row bias, the last the column bias."""
        b = None if self.b_t is None else self.b_t.t()
        found = (self.h, b, self.h, b)
        columns: tuple[slice | int, ...] = (slice(0, self.r), slice(0, self.r), self.r, -1)
        return tuple(
            g[:, at].mul(self.scale).to(self.inside.h.dtype) if need and g is not None else None
            for g, at, need in zip(found, columns, self.needs, strict=True)
        )


def _panel_memory(made: Generated) -> Tensor:
    """Memory for a panel of T [N,K], rows or columns: half of T at most, unless T is as small as panels elsewhere. All
    panels of an operation use it in turn: new memory costs more than what is done in it."""
    n, k = made.h.shape[0], made.b.shape[0]
    return made.h.new_empty(_panel_elements(n, k, made.h.device))


def _panel_elements(n: int, k: int, device: torch.device) -> int:
    elements = n * k
    if elements <= _PANEL_ELEMENTS:
        return elements
    if device.type != "cpu":
        return max(min(elements // 2, _GPU_PANEL_ELEMENTS // 2), n, k)
    return max(elements // _GENERATED_SHARE if elements > _LARGE else min(_GENERATED_ELEMENTS, elements // 2), n, k)


def _memory_for_z(memory: Tensor, elements: int, k: int) -> Tensor:
    """For the Z of a panel in `memory`, beside dL/dT of it: all of it, of a large T an eighth at a time."""
    return torch.empty_like(memory) if elements <= _LARGE else memory.new_empty(max(memory.numel() // 8, k))


# ---- y = x (W0 + s T)ᵀ + b


def generated_linear_forward(x: Tensor, weight: Tensor, made: Generated, bias: Tensor | None, scale: float) -> Tensor:
    """Returns y [M,N]. Nothing is kept: the backward generates the panels again."""
    n, k = weight.shape
    y = x.new_empty(x.shape[0], n)
    inside = made.with_biases_inside()
    memory = _panel_memory(inside)
    for rows in _panels(n, k, memory.numel()):
        panel = inside.added_to(weight, scale, rows, slice(0, k), memory)
        if bias is None:
            torch.mm(x, panel.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, panel.t(), out=y[:, rows])
    return y


def generated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    made: Generated,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dX = dY (W0 + s T); E = s drop(dYᵀ x)·σ'(Z); dH = E B, dB = Eᵀ H, drow = E 1, dcolumn = Eᵀ 1; db = Σ dY.

    `needs` and the result follow x, H, B, bias, row, column. dX goes by panels of columns and the factors by panels of
    rows: either way the results are disjoint, so nothing is summed in a low-precision tensor.
    """
    need_x, need_h, need_b, need_bias, need_row, need_column = needs
    n, k = weight.shape
    gradients = GeneratedGradients(made, (need_h, need_b, need_row, need_column), scale)
    inside = gradients.inside
    memory = _panel_memory(inside)
    dx = None
    if need_x:
        dx = torch.empty_like(x)
        for columns in _panels(k, n, memory.numel()):
            torch.mm(dy, inside.added_to(weight, scale, slice(0, n), columns, memory), out=dx[:, columns])
    if any(gradients.needs):
        for_z = _memory_for_z(memory, n * k, k)
        for rows in _panels(n, k, memory.numel()):
            dt = _product(dy[:, rows].t(), x, memory)
            gradients.add(inside.backward_(dt, rows, for_z), rows)
    dh, db, drow, dcolumn = gradients.results()
    return dx, dh, db, dy.sum(0) if need_bias else None, drow, dcolumn


def _product(left: Tensor, right: Tensor, memory: Tensor) -> Tensor:
    """left @ right in the dtype of `memory`, and there if the product is made in it."""
    if left.dtype != memory.dtype:
        return (left @ right).to(memory.dtype)
    return torch.mm(left, right, out=memory[: left.shape[0] * right.shape[1]].view(left.shape[0], right.shape[1]))


# ---- z = Tᵀ Aᵀ + bias: the features of a generated matrix, which the next stage starts from


def generated_features_forward(made: Generated, a: Tensor, bias: Tensor | None) -> Tensor:
    """Returns z [K,r2] from A [r2,N], reduced over N panel by panel."""
    z2_t = _total(made.b, a.shape[0], made.b.shape[0])
    if bias is not None:
        z2_t += bias[:, None]
    inside = made.with_biases_inside()
    n, k = made.h.shape[0], made.b.shape[0]
    memory = _panel_memory(inside)
    for rows in _panels(n, k, memory.numel()):
        t = inside.value(rows, slice(0, k), memory)
        _add_product_(z2_t, a[:, rows], t)
    return z2_t.t().to(made.b.dtype).contiguous()


def generated_features_backward(
    dz: Tensor, made: Generated, a: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """dT = Aᵀ dzᵀ [N,K]; dA = (T dz)ᵀ, and from E = drop(dT)·σ'(Z): dH, dB, dcolumn.

    `needs` and the result follow H, B, A, column.
    """
    need_h, need_b, need_a, need_column = needs
    da = torch.empty_like(a) if need_a else None
    gradients = GeneratedGradients(made, (need_h, need_b, False, need_column))
    inside = gradients.inside
    n, k = made.h.shape[0], made.b.shape[0]
    memory = _panel_memory(inside)
    for_z = _memory_for_z(memory, n * k, k)
    for rows in _panels(n, k, memory.numel()):
        if da is not None:
            da[:, rows] = (inside.value(rows, slice(0, k), memory) @ dz).t()
        if any(gradients.needs):
            dt = _product(a[:, rows].t(), dz.t(), memory)
            gradients.add(inside.backward_(dt, rows, for_z), rows)
    dh, db, _, dcolumn = gradients.results()
    return dh, db, da, dcolumn


# ---- y = x W0ᵀ + b, and a few of its outputs or inputs with more: y[:,I] += s x Vᵀ, or y += s x[:,J] Vᵀ


def sliced_linear_forward(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    columns: bool,
    scale: float,
) -> Tensor:
    """Returns y [M,N]; V is [k,K] for rows, [N,k] for columns. Nothing is kept: both directions gather again."""
    v_t = values.to(x.dtype).t()
    if columns:
        return add_update(x, weight.t(), x.index_select(1, indices) * scale, v_t, bias)
    return _add_some(F.linear(x, weight, bias), indices, (x @ v_t).mul_(scale), x, weight.t(), bias)


def sliced_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    indices: Tensor,
    columns: bool,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Rows: u = s dY[:,I]; dX = dY W0 + u V, dV = uᵀ x. Columns: dX = dY W0, dX[:,J] += s dY V; dV = s dYᵀ x[:,J].

    `needs` and the result follow x, V, bias.
    """
    need_x, need_values, need_bias = needs
    dx = dv = None
    v = values.to(dy.dtype)
    if columns:
        if need_x:
            dx = _add_some(dy @ weight, indices, (dy @ v).mul_(scale), dy, weight)
        if need_values:
            dv = dy.t() @ (x.index_select(1, indices) * scale)
    elif need_x or need_values:
        u = dy.index_select(1, indices) * scale
        if need_x:
            dx = add_update(dy, weight, u, v)
        if need_values:
            dv = u.t() @ x
    return dx, None if dv is None else dv.to(values.dtype), dy.sum(0) if need_bias else None


def _add_some(
    result: Tensor, indices: Tensor, update: Tensor, source: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`result` [M,N] = source @ weight + bias, with `update` [M,k] added to the columns `indices`. In 16 bits those
    columns are made once more, from the update: k/N of a product."""
    if not narrow(result):
        return result.index_add_(1, indices, update)
    part_bias = None if bias is None else bias.index_select(0, indices)
    return result.index_copy_(1, indices, add_base_(update, source, weight.index_select(1, indices), part_bias))


# ---- Σ_k G², G = dYᵀ x: how large the rows of a weight's gradient are


def squared_gradient_sums(dy: Tensor, x: Tensor) -> Tensor:
    """Sums over k of G[n,k]², G = dYᵀ x [N,K], of which only a panel of rows exists at a time; float32 or wider [N].

    A panel is summed over M in float32, with a bounded stretch of 16-bit rows made wider at a time: rounded to float16
    it could overflow.
    """
    n, k = dy.shape[1], x.shape[1]
    sums = _total(dy, n)
    for rows in _panels(n, k, _GENERATED_ELEMENTS):
        panel = _total(dy, rows.stop - rows.start, k)
        stretches = [slice(None)] if panel.dtype == dy.dtype else _panels(x.shape[0], k, _GENERATED_ELEMENTS)
        for part in stretches:
            panel.addmm_(dy[part, rows].t().to(panel.dtype), x[part].to(panel.dtype))
        sums[rows] = panel.square_().sum(1)
    return sums
