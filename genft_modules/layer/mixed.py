"""Mixed batches, with a different adapter per sample: peft's `adapter_names`, as grouped operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from genft_kernels import RowGroups, group_rows, grouped_lowrank_linear
from genft_kernels.operation import eager
from genft_modules.methods.forms import InputEdit, LowRank, Slices

BASE = "__base__"  # peft's name for no adapter


class Stack(NamedTuple):
    """Stacked low-rank updates of G adapters: P [G, K, r] and Q [G, N, r], zero-padded to a common rank."""

    adapters: tuple[str, ...]
    p: Tensor
    q: Tensor


@dataclass
class Made:
    """The updates of one layer for a batch: input edits, low-rank updates of the output, and others (of full rank, or
    with dropout on x), which are applied per adapter to its samples."""

    edits: Stack | None
    low_rank: Stack | None
    others: dict[str, Any]


@dataclass
class MixedBatch:
    """The adapter of each sample in one call of a model.

    The samples are sorted once per call, and without gradients the updates are computed and stacked once per layer and
    call. `generate` is one call, so decoding steps reuse both.

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
    _stacks: dict[Any, tuple[list[Tensor], Stack]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[str]:
        """The names: peft reads them."""
        return iter(self.names)

    def names_of(self, samples: int) -> list[str]:
        """The adapter names of a batch of `samples`, repeated if needed. Raises ValueError if the number is wrong."""
        for copies in (1, self.copies):
            if samples == len(self.names) * copies:
                return [name for name in self.names for _ in range(copies)]
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {samples} respectively."
        )

    def rows(self, adapters: tuple[str, ...], x: Tensor) -> RowGroups:
        """The index of each sample's adapter in `adapters`, on the device of x [S, ...]."""
        key = (adapters, x.shape[0], x.device)
        if key not in self._rows:
            group = {name: index for index, name in enumerate(adapters)}
            index = torch.tensor([group.get(name, -1) for name in self.names_of(x.shape[0])], dtype=torch.int64)
            self._rows[key] = RowGroups(*(part.to(x.device) for part in group_rows(index, len(adapters))))
        return self._rows[key]

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
        forms = {}
        for name in dict.fromkeys(self.names):
            if name in layer.genft_generators:
                with self.dropout_of(name, layer, weight.device):
                    forms[name] = layer.genft_generators[name].form(weight, dropout=layer.training)
        forms = {name: form.low_rank() if isinstance(form, Slices) else form for name, form in forms.items()}
        edits = {name: form for name, form in forms.items() if isinstance(form, InputEdit)}
        low_rank = {name: form for name, form in forms.items() if isinstance(form, LowRank) and not form.dropout}
        others = {name: form for name, form in forms.items() if name not in edits and name not in low_rank}
        made = Made(
            self.stacked({name: LowRank(form.psi.t(), form.phi.t(), form.scale) for name, form in edits.items()}),
            self.stacked(low_rank),
            others,
        )
        # Not in training: reentrant checkpointing computes a block first without gradients, then with them.
        if not (torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling()):
            self._made[id(layer)] = made
        return made

    def stacked(self, forms: Mapping[str, LowRank]) -> Stack | None:
        """The updates by adapter in one stack; None if there are none."""
        if not forms:
            return None
        sources = [tensor for form in forms.values() for tensor in (form.p, form.q)]
        if torch.is_grad_enabled() or not eager(*sources):
            return _stack(forms)  # fake tensors have no address
        # Layers that share factors share the stack. It holds references to the sources, so that their addresses stay
        # unique.
        key = (
            tuple((name, form.scale) for name, form in forms.items()),
            tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in sources),
        )
        if key not in self._stacks:
            self._stacks[key] = (sources, _stack(forms))
        return self._stacks[key][1]

    def updates(self, stack: Stack, x: Tensor, backend: str) -> Tensor:
        """x_i P_g Q_gᵀ [S, ..., N] for each sample i with adapter g; 0 for samples without an adapter in the stack."""
        return grouped_lowrank_linear(x, None, stack.p, stack.q, self.rows(stack.adapters, x), backend=backend)


def mixed_batch(adapter_names: MixedBatch | Sequence[str], copies: int = 1) -> MixedBatch:
    """Create a MixedBatch from peft's argument. Raises TypeError unless it is a list or tuple of str."""
    if isinstance(adapter_names, MixedBatch):
        return adapter_names
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: got {adapter_names!r}, expected a list with one adapter name per sample")
    return MixedBatch(tuple(adapter_names), copies)


def _stack(forms: Mapping[str, LowRank]) -> Stack:
    r = max(form.p.shape[1] for form in forms.values())
    dtype = next(iter(forms.values())).p.dtype
    for form in forms.values():
        dtype = torch.promote_types(dtype, torch.promote_types(form.p.dtype, form.q.dtype))

    def filled(factor: Tensor) -> Tensor:
        return F.pad(factor.to(dtype), (0, r - factor.shape[1]))

    p = torch.stack([filled(form.p) for form in forms.values()])
    q = torch.stack([filled(form.q.to(dtype) * form.scale) for form in forms.values()])
    return Stack(tuple(forms), p, q)
