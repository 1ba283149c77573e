"""Mixed batches, with a different adapter per sample: peft's `adapter_names`, as grouped operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genft_kernels import RowGroups, group_rows, grouped_lowrank_linear, stack_factors
from genft_kernels.operation import eager
from genft_modules.methods.forms import InputEdit, LowRank, Slices

BASE = "__base__"  # peft's name for no adapter
_WORTH_STACKING = 4  # adapters: for fewer, a product of each takes as long as one of their stack


@dataclass
class Updates:
    """Low-rank updates by adapter: P [K, r], Q [N, r] and the scale of each. On a CPU, they are stacked when they are
    used again, as in the steps of decoding; in a single call it would take longer to copy than to use them."""

    adapters: tuple[str, ...]
    p: list[Tensor]
    q: list[Tensor]
    scale: list[float]
    used: bool = False
    stack: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, forms: Mapping[str, LowRank]) -> Updates:
        each = forms.values()
        return cls(tuple(forms), [f.p for f in each], [f.q for f in each], [f.scale for f in each])

    def stacked(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The stack, if there should be one for x and further calls without gradients."""
        on_cpu = x.device.type == "cpu"
        worth = not on_cpu or len(self.p) >= _WORTH_STACKING
        if worth and self.stack is None and not torch.is_grad_enabled() and eager(x):
            if self.used or not on_cpu:
                self.stack = stack_factors(self.p, self.q, self.scale)
            self.used = True
        return self.stack


@dataclass
class Made:
    """The updates of one layer for a batch: input edits, low-rank updates of the output, and others (of full rank, or
    with dropout on x), which are applied per adapter to its samples."""

    edits: Updates | None
    low_rank: Updates | None
    others: dict[str, Any]


@dataclass
class MixedBatch:
    """The adapter of each sample in one call of a model.

    The samples are sorted once per call, and without gradients the updates are computed once per layer and call.
    `generate` is one call, so decoding steps reuse both.

    Args:
        names: adapter names, one per sample, "__base__" for none.
        copies: how often samples may be repeated consecutively, as in beam search.
        seeds: adapter → the seed of its dropout in this call; missing ones are drawn from torch's generator.
    """

    names: tuple[str, ...]
    copies: int = 1
    seeds: dict[str, int] = field(default_factory=dict)
    _numbers: dict[str, dict[int, int]] = field(default_factory=dict, repr=False)  # the layers of each adapter
    _rows: dict[Any, RowGroups] = field(default_factory=dict, repr=False)
    _made: dict[int, Made] = field(default_factory=dict, repr=False)
    _updates: dict[Any, Updates] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # Each adapter once, those of most samples first: on a CPU, neighbours with equally many share a product.
        counts = dict.fromkeys(self.names, 0)
        counts.pop(BASE, None)
        self.adapters = list(counts)
        if len(counts) > 1:
            for name in self.names:
                if name != BASE:
                    counts[name] += 1
            self.adapters.sort(key=counts.__getitem__, reverse=True)
        self.single = len(counts) == 1 and BASE not in self.names  # all samples have the same adapter

    def __iter__(self) -> Iterator[str]:
        """The names: peft reads them."""
        return iter(self.names)

    def names_of(self, samples: int) -> list[str]:
        """The adapter names of a batch of `samples`, repeated if needed. Raises ValueError if the number is wrong."""
        for copies in (1, self.copies):
            if samples == len(self.names) * copies:
                return list(self.names) if copies == 1 else [name for name in self.names for _ in range(copies)]
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {samples} respectively."
        )

    def rows(self, adapters: tuple[str, ...], x: Tensor) -> RowGroups:
        """The index of each sample's adapter in `adapters`, on the device of x [S, ...]."""
        key = (adapters, x.shape[0], x.device)
        if key not in self._rows:
            self._rows[key] = group_rows(self.groups(adapters, x), len(adapters), x.device)
        return self._rows[key]

    def groups(self, adapters: tuple[str, ...], x: Tensor) -> list[int]:
        """The index of each sample's adapter in `adapters`, -1 for none."""
        group = {name: index for index, name in enumerate(adapters)}
        return [group.get(name, -1) for name in self.names_of(x.shape[0])]

    def samples(self, adapter: str, x: Tensor) -> Tensor:
        """The indices of the adapter's samples in x [S, ...]."""
        places = [place for place, name in enumerate(self.names_of(x.shape[0])) if name == adapter]
        return torch.tensor(places, dtype=torch.int64, device=x.device)

    def draw_seeds(self) -> None:
        """Draw the seeds of dropout that are not given."""
        for name in dict.fromkeys(self.names):
            if name not in self.seeds:
                self.seeds[name] = int(torch.randint(2**62, ()))

    @contextmanager
    def dropout_of(self, adapter: str, layer: Any, device: torch.device, draw: int = 0) -> Iterator[None]:
        """In training, what is drawn inside depends only on the adapter's seed, the layer and the number `draw`: not on
        other adapters in the batch, and it is the same when gradient checkpointing computes the layer again."""
        if not layer.training or torch.compiler.is_compiling():
            yield
            return
        self.draw_seeds()
        numbers = self._numbers.setdefault(adapter, {})
        number = numbers.setdefault(id(layer), len(numbers))
        # The generator that torch draws from by default. `torch.random.fork_rng` would seed those of other devices.
        if device.type == "cpu":
            generator = torch.default_generator
        else:
            generators = torch.get_device_module(device).default_generators
            generator = generators[device.index or 0]
        state = generator.get_state()
        generator.manual_seed((self.seeds[adapter] + (2 * number + draw + 1) * 0x9E3779B97F4A7C15) % 2**63)
        try:
            yield
        finally:
            generator.set_state(state)

    def made(self, layer: Any, weight: Tensor) -> Made:
        """The updates of `layer` with W0 `weight`, with dropout in training."""
        if id(layer) in self._made:
            return self._made[id(layer)]
        edits: dict[str, LowRank] = {}
        low_rank: dict[str, LowRank] = {}
        others: dict[str, Any] = {}
        generators = layer._modules["genft_generators"]._modules
        for name in self.adapters:
            if name not in generators:
                continue
            if layer.training:
                with self.dropout_of(name, layer, weight.device):
                    form = generators[name].form(weight)
            else:
                form = generators[name].form(weight, dropout=False)
            form = form.low_rank() if isinstance(form, Slices) else form
            if isinstance(form, InputEdit):
                edits[name] = LowRank(form.psi.t(), form.phi.t(), form.scale)
            elif isinstance(form, LowRank) and not form.dropout:
                low_rank[name] = form
            else:
                others[name] = form
        updates = self._shared if layer.genft_shared else Updates.of
        made = Made(updates(edits) if edits else None, updates(low_rank) if low_rank else None, others)
        # Not in training: reentrant checkpointing computes a block first without gradients, then with them.
        if not (torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling()):
            self._made[id(layer)] = made
        return made

    def _shared(self, forms: Mapping[str, LowRank]) -> Updates:
        """The updates of layers that share factors are the same."""
        sources = [tensor for form in forms.values() for tensor in (form.p, form.q)]
        if torch.is_grad_enabled() or not eager(*sources):
            return Updates.of(forms)  # fake tensors have no address
        # The updates hold references to the sources, so that their addresses stay unique.
        key = (
            tuple((name, form.scale) for name, form in forms.items()),
            tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in sources),
        )
        return self._updates.setdefault(key, Updates.of(forms))

    def linear(self, updates: Updates, x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
        """x_i (W0 + s Q_g P_gᵀ)ᵀ + b [S, ..., N] for each sample i with adapter g, and x_i W0ᵀ + b for samples without
        one of these; weight None for only the updates."""
        stack = updates.stacked(x)
        rows: RowGroups | list[int]
        if stack is not None or x.device.type != "cpu":
            rows = self.rows(updates.adapters, x)
        else:
            rows = self.groups(updates.adapters, x)
        p, q = (updates.p, updates.q) if stack is None else stack
        return grouped_lowrank_linear(
            x, weight, p, q, rows, bias, scale=updates.scale if stack is None else None, backend=backend
        )


def mixed_batch(adapter_names: MixedBatch | Sequence[str], copies: int = 1) -> MixedBatch:
    """Create a MixedBatch from peft's argument. Raises TypeError unless it is a list or tuple of str."""
    if isinstance(adapter_names, MixedBatch):
        return adapter_names
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: got {adapter_names!r}, expected a list with one adapter name per sample")
    return MixedBatch(tuple(adapter_names), copies)
