"""Access to W0, also if it is quantised: rows are dequantised temporarily. Generators read W0 only through
`weight_features`, and forms through `by_rows`.

bitsandbytes and torchao layers are dequantised in row panels; HQQ, GPTQ and other layers with a `dequantize` method as
a whole. The dequantised weight is freed after use and recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genft_kernels import weight_features as _weight_features
from genft_kernels.activations import activation as activation_named
from genft_kernels.checks import FLOATS

PANEL = 2**22  # number of elements of W0 dequantised at a time


def stored(layer: nn.Module) -> Tensor:
    """The tensor in which a linear layer stores W0, possibly packed."""
    for name in ("weight", "W_q", "qweight"):  # W_q: HQQ; qweight: GPTQ and similar
        if isinstance(tensor := getattr(layer, name, None), Tensor):
            return tensor
    return next(chain(layer.parameters(), layer.buffers()))


def is_quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is quantised."""
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__name__ == "Params4bit":  # may be stored as float; not yet quantised before it is moved to a GPU
        return weight.quant_state is not None
    return not isinstance(weight, Tensor) or weight.dtype not in FLOATS or _of_torchao(weight)


def can_be_base(layer: nn.Module) -> bool:
    """Whether a layer other than `nn.Linear` is a supported quantised layer: it has sizes and a packed weight."""
    packed = any(isinstance(getattr(layer, name, None), Tensor) for name in ("W_q", "qweight"))
    return (packed or callable(getattr(layer, "dequantize", None))) and None not in features_of(layer)


def features_of(layer: nn.Module) -> tuple[int | None, int | None]:
    """K and N, under the attribute names used by the quantisation packages."""
    k, n = (getattr(layer, f"{side}_features", getattr(layer, f"{side}features", None)) for side in ("in", "out"))
    return (k, n) if isinstance(k, int) and isinstance(n, int) else (None, None)


def weight_features(
    weight: Tensor | QuantisedWeight,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    ratio: float = 1.0,
    activation: str = "none",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """σ(ratio·drop(W0) Aᵀ + bias) [N, r] as in `genft_kernels.weight_features`; panel by panel for a quantised W0."""
    if isinstance(weight, QuantisedWeight):
        return weight.features(a, bias, ratio, activation, dropout, seed, backend)
    return _weight_features(
        weight, a, bias, ratio=ratio, activation=activation, dropout=dropout, seed=seed, backend=backend
    )


def by_rows(weight: Tensor | QuantisedWeight, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """function(W0, slice of all rows) [..., N]; for a quantised W0 the same of its dequantised panels, concatenated.

    In the backward pass the panels are dequantised, and `function` is called, again: it must not draw random numbers.
    """
    if isinstance(weight, QuantisedWeight):
        return weight.by_rows(function)
    return function(weight, slice(0, weight.shape[0]))


class QuantisedWeight:
    """A stand-in for W0 [N, K] with shape, device, slicing into row blocks and transposition; dequantised only when
    `weight_features` or `by_rows` reads it.

    Args:
        layer: the quantised base layer.
    """

    def __init__(self, layer: nn.Module, start: int = 0, stop: int | None = None, transposed: bool = False) -> None:
        self.columns, rows = cast(tuple[int, int], features_of(layer))
        self.layer, self.start, self.transposed = layer, start, transposed
        self.stop = rows if stop is None else stop

    @property
    def shape(self) -> torch.Size:
        size = torch.Size((self.stop - self.start, self.columns))
        return torch.Size((size[1], size[0])) if self.transposed else size

    @property
    def device(self) -> torch.device:
        return stored(self.layer).device

    def __getitem__(self, rows: slice) -> QuantisedWeight:
        assert not self.transposed, "row blocks are cut before the transposition"
        start, stop, _ = rows.indices(self.stop - self.start)
        return self._with(start=self.start + start, stop=self.start + stop)

    def t(self) -> QuantisedWeight:
        return self._with(transposed=not self.transposed)

    def _with(self, **changed: int) -> QuantisedWeight:
        other = copy(self)
        for name, value in changed.items():
            setattr(other, name, value)
        return other

    def dequantised(self) -> Tensor:
        """W0, or the part of it that this represents, in floating point."""
        rows = _rows(self.layer, self.start, self.stop)
        return rows.t() if self.transposed else rows

    def features(
        self,
        a: Tensor,
        bias: Tensor | None,
        ratio: float,
        activation: str,
        dropout: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        """See `weight_features`. W0 is not saved for the backward pass but dequantised again, panel by panel."""
        panels = self._panels()
        sigma = activation_named(activation)

        def read(start: int, stop: int, a: Tensor, bias: Tensor | None, seed: Tensor | None) -> Tensor:
            panel = _rows(self.layer, start, stop)
            if a.dtype not in (panel.dtype, torch.float32):
                panel = panel.to(a.dtype)
            return _weight_features(
                panel.t() if self.transposed else panel,
                a,
                bias,
                ratio=ratio,
                dropout=dropout,
                seed=seed,
                backend=backend,
            )

        if not self.transposed:
            seeds = [None if seed is None else seed + index for index in range(len(panels))]
            parts = [_once(read, *panel, a, bias, seed) for panel, seed in zip(panels, seeds, strict=True)]
            return sigma.forward(parts[0] if len(parts) == 1 else torch.cat(parts))
        assert seed is None, "elements of W0ᵀ are never dropped"
        z = sum(_once(read, i, j, a[:, i - self.start : j - self.start], None, None) for i, j in panels)
        return sigma.forward(z if bias is None else z + bias)

    def by_rows(self, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """See the function of this name."""
        assert not self.transposed, "the rows are those of W0"

        def read(start: int, stop: int) -> Tensor:
            return function(_rows(self.layer, start, stop), slice(start - self.start, stop - self.start))

        parts = [_once(read, *panel) for panel in self._panels()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _panels(self) -> list[tuple[int, int]]:
        """The rows that are dequantised at a time."""
        height = max(1, PANEL // self.columns) if _gives_rows(self.layer) else self.stop - self.start
        return [(i, min(i + height, self.stop)) for i in range(self.start, self.stop, height)]


_once = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _of_torchao(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _gives_rows(layer: Any) -> bool:
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__name__ == "Params4bit":
        return bool(layer.in_features % weight.quant_state.blocksize == 0)  # no quantisation block spans two rows
    return isinstance(weight, Tensor) and (_of_torchao(weight) or type(weight).__name__ == "Int8Params")


@torch.no_grad()
def _rows(layer: Any, start: int, stop: int) -> Tensor:
    """Rows of W0 in floating point. Raises TypeError if the layer cannot be dequantised."""
    if not _gives_rows(layer):
        return _whole(layer)[start:stop]
    weight = layer.weight
    if _of_torchao(weight):
        return cast(Tensor, weight[start:stop].dequantize())
    if type(weight).__name__ == "Params4bit":
        return _rows_of_4bit(weight, start, stop)
    from bitsandbytes.functional import int8_vectorwise_dequant

    scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
    return cast(Tensor, int8_vectorwise_dequant(weight.data[start:stop], scales[start:stop].to(weight.device)))


def _rows_of_4bit(weight: Any, start: int, stop: int) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state, columns = weight.quant_state, weight.quant_state.shape[1]
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    part = QuantState(
        absmax=absmax[start * columns // state.blocksize : stop * columns // state.blocksize].float(),
        shape=torch.Size((stop - start, columns)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    packed = weight.data.reshape(-1).view(torch.uint8)  # two 4-bit values per byte
    return cast(Tensor, dequantize_4bit(packed[start * columns // 2 : stop * columns // 2], part))


def _whole(layer: Any) -> Tensor:
    if callable(make := getattr(layer, "dequantize_weight", None)):  # GPTQ: [K, N]
        weight = make().t()
    elif callable(make := getattr(layer, "dequantize", None)):  # HQQ and others
        weight = make()
    else:
        weight = dequantize_module_weight(layer) if isinstance(getattr(layer, "weight", None), Tensor) else None
    columns, rows = features_of(layer)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or weight.shape != (rows, columns):
        raise TypeError(
            f"base_layer: {type(layer).__name__} cannot be dequantised to a weight [{rows}, {columns}], which the "
            "method needs; use a method that edits the input, such as WeGeFT"
        )
    return weight
