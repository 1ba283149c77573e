"""FusedGenExperts: the stacked experts of a layer with adapters, by an edit of the tokens instead of the weights.

With W_e [N, K] the weight of expert e, W_e (I + s φᵀψ) x = W_e x′ with x′ = x + s φᵀ ψ x: one edit of a token adapts
every expert that it is sent to, whatever multiplies it with W_e. The edit of the tokens that enter the experts adapts
gate_up_proj; that of the gated activations adapts down_proj. The router sees the unedited tokens.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genft_kernels import RowGroups, group_rows
from genft_kernels.checks import check_tensor
from genft_kernels.sharded import is_sharded
from genft_modules.layer.adapted import AdaptedLayer, refuse_quantised, with_updates
from genft_modules.layer.mixed import BASE, MixedBatch, mixed_batch
from genft_modules.methods import Generator, GeneratorConfig
from genft_modules.methods.base import without_autocast
from genft_modules.methods.checks import shown
from genft_modules.methods.forms import InputEdit, side_by_side

DOWN = "down_proj"
_UP = ("gate_up_proj", "up_proj")  # with and without a gate
_BMM = "Llama4TextExperts"  # multiplies [experts, tokens, K] with its parameters by torch.bmm


def projections(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's stacked projections, [experts, ., .]: what enters the experts first. Empty if the module
    is none of stacked experts that `FusedGenExperts` can adapt: it needs `down_proj`, `gate_up_proj` or `up_proj`, and
    a forward pass as transformers' `use_experts_implementation` makes it, or Llama 4's."""
    parameters = module._parameters
    for up in _UP:
        both = [parameters.get(name) for name in (up, DOWN)]
        if all(parameter is not None and parameter.dim() == 3 for parameter in both):
            gate = getattr(module, "has_gate", True)
            known = _is_bmm(module) or (hasattr(module, "_apply_gate") if gate else hasattr(module, "act_fn"))
            return (up, DOWN) if known and gate == (up == _UP[0]) else ()
    return ()


class Projections(Generator):
    """The adapter of one layer's experts: a generator for each adapted projection."""

    def __init__(self, parts: dict[str, Generator]) -> None:
        super().__init__()
        self.adapted = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)
            self.shared = (*self.shared, *part.shared)

    def parts(self) -> dict[str, Generator]:
        return {name: cast(Generator, getattr(self, name)) for name in self.adapted}

    def edit(self, projection: str, weight: Tensor) -> InputEdit | None:
        """The edit of what enters the projection, None if it is not adapted; on the device of `weight`."""
        part = self.parts().get(projection)
        return None if part is None else cast(InputEdit, part.form(weight))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, part in self.parts().items()
            for key, parameter in part.adapter_parameters().items()
        }


class FusedGenExperts(AdaptedLayer):
    """The stacked experts of a layer, W_e + ΔW_e for every expert e, with ΔW_e = s (W_e φᵀ) ψ applied as an edit of the
    tokens: `base_layer` runs as it is, with any implementation that transformers has for it.

    With one pair (φ, ψ) for all experts (`tied_experts`, the default) each token is edited once, before it is sent to
    its experts. With one pair per expert each pair of a token and an expert has a row of its own, sorted by expert.

    Create one with `FusedGenExperts.from_experts` for a single module, or `peft.get_peft_model` for a model.

    Args:
        base_layer: a module with stacked experts, such as those of Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V3, OLMoE,
            gpt-oss and Llama 4 in transformers 5, see `projections`.

    Raises:
        TypeError: `base_layer` is any other module.
    """

    weight = None  # override peft's properties, which access the base layer's
    bias = None

    def __init__(self, base_layer: nn.Module) -> None:
        names = () if isinstance(base_layer, AdaptedLayer) else projections(base_layer)
        if not names:
            raise TypeError(
                f"base_layer: got {type(base_layer).__name__}, expected stacked experts: parameters [experts, ., .] "
                "named gate_up_proj (or up_proj) and down_proj, and the forward pass of transformers' experts"
            )
        super().__init__(base_layer)
        self.projections = names
        up, down = (base_layer._parameters[name] for name in names)
        assert up is not None
        assert down is not None
        # Whether W_e is stored as W_eᵀ [K, N]
        self.transposed = bool(getattr(base_layer, "is_transposed", up.shape[1] == down.shape[2]))
        self.experts = up.shape[0]
        self._kept: dict[str, Tensor] = {}  # the parameters without the merged adapters, on the CPU

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        config: GeneratorConfig,
        adapter_name: str = "default",
        *,
        targets: Sequence[str] | None = None,
        name: str = "experts",
        backend: str | None = None,
    ) -> FusedGenExperts:
        """Wrap `experts` with one adapter, which owns its parameters. `experts` is frozen and not copied.

        Args:
            experts: the module.
            config: WeGeFT, or GIFT with the identity block.
            adapter_name: name of the adapter.
            targets: the projections to adapt, of "gate_up_proj" (or "up_proj") and "down_proj"; None for both.
            name: the module's name for patterns in the config (`rank_pattern`).
            backend: "auto", "triton" or "reference"; None for the config's.
        """
        layer = cls(experts)
        layer.add_adapter(adapter_name, config, targets=targets, name=name, backend=backend)
        return layer._on_its_own(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        config: GeneratorConfig,
        *,
        targets: Sequence[str] | None = None,
        name: str = "experts",
        shared: nn.ModuleDict | None = None,
        backend: str | None = None,
    ) -> None:
        """Add an adapter with the device and dtype of the experts. The first one becomes active.

        Args:
            adapter_name: a new name.
            config, targets, backend: as in `from_experts`.
            name: the module's name in its model.
            shared: the adapter's shared factors in the model; None if the layer owns its parameters.

        Raises:
            TypeError, ValueError: an argument is invalid, or the configuration cannot adapt experts.
        """
        self._check_new(adapter_name, config, backend)
        targets = self.projections if targets is None else tuple(targets)
        if not targets or not set(targets) <= set(self.projections):
            raise ValueError(f"targets: got {shown(list(targets))}, expected names of {list(self.projections)}")
        if reason := config.refuses_experts():
            raise TypeError(f"config: {type(config).__name__} cannot adapt experts, {reason}")
        if DOWN in targets:
            self._let_down_be_edited()
        parts = {
            one: config.build_experts(f"{name}.{one}", self.features(one)[0], self.experts, shared) for one in targets
        }
        self._add(adapter_name, Projections(parts), config, backend)
        for part in parts.values():
            part.backend = backend or config.backend

    def features(self, projection: str) -> tuple[int, int]:
        """K and N of a projection."""
        _, n, k = self._parameter(projection).shape
        return (n, k) if self.transposed else (k, n)

    def forward(
        self, hidden_states: Tensor, *args: Any, adapter_names: MixedBatch | Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """What `base_layer` returns for the same arguments, with the updates.

        Args:
            hidden_states: the tokens [tokens, K]; Llama 4: [experts · tokens, K].
            args, kwargs: the experts of each token and their weights, as the base layer takes them.
            adapter_names: one name per sample, of which the tokens are consecutive, "__base__" for no adapter;
                replaces the active adapters. The experts then run once for each adapter in the batch.
        """
        if adapter_names is not None:
            return self._mixed_forward(hidden_states, mixed_batch(adapter_names), args, kwargs)
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        generators = self._active_generators()
        if self._disable_adapters or self.merged_adapters or not generators:
            return cast(Tensor, self.base_layer(hidden_states, *args, **kwargs))
        return self._adapted(generators, hidden_states, args, kwargs)

    def _adapted(self, generators: list[Generator], hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
        check_tensor("hidden_states", hidden)
        base = self.base_layer
        up, down = (self._edits(generators, projection) for projection in self.projections)
        if _is_bmm(base):
            stacked = hidden.reshape(self.experts, -1, hidden.shape[-1])
            rows = self._rows(torch.arange(self.experts, device=hidden.device)) if up.grouped or down.grouped else None
            with _BeforeDown(base, lambda gated: down(gated, rows)) if down else nullcontext():
                return cast(Tensor, base(up(stacked, rows).reshape(hidden.shape), *args, **kwargs))
        if not (up.grouped or down.grouped):
            with self._gated(down, None):
                return cast(Tensor, base(up(hidden, None), *args, **kwargs))
        return self._by_expert(up, down, hidden, [*args, *kwargs.values()])

    def _by_expert(self, up: _Edits, down: _Edits, hidden: Tensor, routing: list[Tensor]) -> Tensor:
        """One row for each pair of a token and an expert, sorted by expert, so that all implementations of the experts
        gate them in that order. (Those that sort again may exchange rows of one expert, which share an edit.)"""
        index, weights = sorted(routing, key=Tensor.is_floating_point)
        tokens, each = index.shape
        expert, order = torch.sort(index.reshape(-1), stable=True)
        x = hidden[order // each]
        with self._gated(down, expert):
            y = self.base_layer(
                up(x, self._rows(expert) if up.grouped else None), expert[:, None], weights.reshape(-1)[order][:, None]
            )
        unsorted = torch.empty_like(order)
        unsorted[order] = torch.arange(len(order), device=order.device)
        return cast(Tensor, y[unsorted].unflatten(0, (tokens, each)).sum(1))

    def _mixed_forward(self, hidden: Tensor, batch: MixedBatch, args: Any, kwargs: Any) -> Tensor:
        check_tensor("hidden_states", hidden)
        self._refuse_mixed_merged()
        present = [name for name in dict.fromkeys(batch.names) if name in self.genft_generators]
        if self._disable_adapters or not present:
            return cast(Tensor, self.base_layer(hidden, *args, **kwargs))
        copies = self.experts if _is_bmm(self.base_layer) else 1  # of all tokens
        tokens, samples = hidden.shape[0] // copies, len(batch.names)
        if tokens % samples:
            raise ValueError(f"adapter_names: got {samples} names for {tokens} tokens, expected a divisor")
        found = torch.empty_like(hidden)
        place = torch.arange(hidden.shape[0], device=hidden.device).view(copies, samples, tokens // samples)
        names = [name if name in self.genft_generators else BASE for name in batch.names]
        for name in dict.fromkeys(names):
            mine = torch.tensor([at for at, one in enumerate(names) if one == name], device=hidden.device)
            places = place[:, mine]
            routing = [one[places.reshape(-1)] for one in (*args, *kwargs.values())]
            some = hidden[places.reshape(-1)]
            if name == BASE:
                found[places.reshape(-1)] = self.base_layer(some, *routing)
            else:
                found[places.reshape(-1)] = self._adapted([self._generator(name)], some, routing, {})
        return found

    def _edits(self, generators: list[Generator], projection: str) -> _Edits:
        """The edits of what enters a projection: those shared by the experts as one, and those with a pair each."""
        weight = self._parameter(projection)
        found = [cast(Projections, generator).edit(projection, weight) for generator in generators]
        edits = [edit for edit in found if edit is not None]
        tied = [edit for edit in edits if edit.psi.dim() == 2]
        grouped = [edit for edit in edits if edit.psi.dim() == 3]
        if _is_spread(self.base_layer, weight) and (
            grouped or (edits and projection == DOWN and torch.is_grad_enabled())
        ):
            raise ValueError(
                f"target_modules: got {projection} of experts that are spread over processes, expected gate_up_proj "
                "with one pair for all experts, whose gradient every process has whole"
            )
        backend = generators[0].backend
        return _Edits(cast(list[InputEdit], side_by_side(tied, weight, backend) if tied else []), grouped, backend)

    def _rows(self, expert: Tensor) -> RowGroups:
        """Rows by their experts."""
        return group_rows(expert, self.experts)

    @contextmanager
    def _gated(self, edits: _Edits, expert: Tensor | None) -> Iterator[None]:
        """Edits what the experts' gate returns, whichever implementation calls it. `expert`: that of each row, in the
        order in which the rows are gated; None if they share the edits."""
        if not edits:
            yield
            return
        base, name = self.base_layer, self._gate
        gate = getattr(base, name)
        gated = [0]

        def edited(*args: Any) -> Tensor:
            h = gate(*args)
            start = gated[0]
            gated[0] += h.shape[0]
            rows = None
            if expert is not None and edits.grouped:
                if gated[0] > expert.shape[0]:
                    raise ValueError(
                        f"experts_implementation: got {self._implementation!r}, which adds rows, expected 'grouped_mm' "
                        "or 'batched_mm' for a pair per expert"
                    )
                rows = self._rows(expert[start : gated[0]])
            return edits(h, rows)

        before = base.__dict__.get(name)
        base.__dict__[name] = edited
        try:
            yield
        finally:
            if before is None:
                del base.__dict__[name]
            else:
                base.__dict__[name] = before
        if not gated[0] and not self._calls_gate():
            raise ValueError(self._no_gate())

    @property
    def _gate(self) -> str:
        """The attribute that the experts call between the projections."""
        return "_apply_gate" if self.projections[0] == _UP[0] else "act_fn"

    @property
    def _implementation(self) -> str:
        """The name under which transformers knows what runs the experts."""
        return getattr(getattr(self.base_layer, "config", None), "_experts_implementation", None) or "eager"

    def _calls_gate(self) -> bool:
        """Whether what runs the experts calls their gate; some classes' own loops write it out."""
        outer = type(self.base_layer).forward
        forward = inspect.unwrap(outer)
        # The table of implementations from which use_experts_implementation takes the one that is set
        if (interface := inspect.getclosurevars(outer).nonlocals.get("experts_interface")) is not None:
            forward = inspect.unwrap(interface.get(self._implementation, forward))
        return self._gate in forward.__code__.co_names

    def _let_down_be_edited(self) -> None:
        """Switch from a loop that writes out the gate to an implementation that calls it, or raise ValueError."""
        base = self.base_layer
        if _is_bmm(base) or self._calls_gate():
            return
        if self._implementation != "eager" or not hasattr(getattr(base, "config", None), "_experts_implementation"):
            raise ValueError(self._no_gate())
        # transformers' grouped_mm takes no float64
        name = "batched_mm" if self._parameter(DOWN).dtype == torch.float64 else "grouped_mm"
        base.config._experts_implementation = name
        warnings.warn(
            f"The loop of {type(base).__name__} does not call its gate, after which the input of {DOWN} is edited: "
            f"experts_implementation is now {name!r}, was 'eager'.",
            stacklevel=2,
        )

    def _no_gate(self) -> str:
        return (
            f"target_modules: {DOWN} of {type(self.base_layer).__name__} cannot be adapted with experts_implementation "
            f"{self._implementation!r}, which does not call its gate; expected gate_up_proj alone, or "
            'model.set_experts_implementation("grouped_mm")'
        )

    def names_of_targets(self, name: str, adapter_name: str) -> list[str]:
        adapted = cast(Projections, self._generator(adapter_name)).adapted
        return [f"{name}.{projection}" for projection in adapted]

    def adapted(self, adapter_name: str = "default") -> tuple[str, ...]:
        """The projections that the adapter changes."""
        return cast(Projections, self._generator(adapter_name)).adapted

    def get_delta_weight(self, adapter_name: str, projection: str, expert: int) -> Tensor:
        """ΔW_e [N, K] of one expert, in the orientation of `nn.Linear`, in float32 or wider; computed from the original
        W_e, even while adapters are merged."""
        edit, weight = self._of_expert(adapter_name, projection, expert)
        with without_autocast(weight):
            return edit.delta_weight(weight)

    def low_rank_factors(self, adapter_name: str, projection: str, expert: int) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] with B A = ΔW_e of one expert; A is the same for all experts if they share a pair."""
        edit, weight = self._of_expert(adapter_name, projection, expert)
        with without_autocast(weight):
            return edit.low_rank_factors(weight)

    def frozen_weight(self, projection: str, expert: int) -> Tensor:
        """W_e [N, K] of one expert, even while adapters are merged."""
        parameter = self._parameter(projection)
        if is_sharded(parameter):
            parameter = cast(Any, parameter).full_tensor()
        weight = self._kept.get(projection, parameter)[expert].detach().to(parameter.device)
        return weight.t() if self.transposed else weight

    def _of_expert(self, adapter_name: str, projection: str, expert: int) -> tuple[InputEdit, Tensor]:
        adapted = self.adapted(adapter_name)
        if projection not in adapted:
            raise ValueError(f"projection: got {projection!r}, expected one of {list(adapted)}")
        weight = self.frozen_weight(projection, expert)
        edit = cast(Projections, self._generator(adapter_name)).edit(projection, weight)
        assert edit is not None
        return edit.of(expert), weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace every W_e by W_e + Σ ΔW_e, summed in float32 or wider, in place and one expert after the other.

        What `unmerge` restores exactly is kept on the CPU. So a device never holds two copies of the experts, but the
        CPU's memory holds one of the adapted projections while they are merged. `merge_and_unload` keeps nothing.

        Args:
            safe_merge: check that all merged weights are finite before the first is replaced, which computes them
                twice.
            adapter_names: the adapters to merge; None for the active ones.

        Raises:
            TypeError: the weights are quantised.
            ValueError: with `safe_merge`, a merged weight is not finite; the layer is unchanged.
        """
        self._merge(safe_merge, adapter_names, keep=True)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer; with `merge` with the updates, without a copy of what it was. Called by peft."""
        if merge:
            self._merge(safe_merge, adapter_names, keep=False)
        return cast(nn.Module, self.base_layer)

    @torch.no_grad()
    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, *, keep: bool) -> None:
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.genft_generators]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        changed = [one for one in self.projections if any(one in self.adapted(name) for name in names)]
        for projection in changed:
            refuse_quantised(self.base_layer, self._parameter(projection))
        every = [(projection, expert) for projection in changed for expert in range(self.experts)]
        if safe_merge and not all(torch.isfinite(self._merged(names, *one)).all() for one in every):
            raise ValueError(  # in peft's words
                f"safe_merge: NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
            )
        unchanged = [one for one in changed if one not in self._kept]
        for projection, expert in every:
            place = self._parameter(projection).data
            if keep and projection in unchanged:
                if not expert:
                    self._kept[projection] = torch.empty_like(place, device="cpu")
                self._kept[projection][expert] = place[expert]
            merged = self._merged(names, projection, expert)
            place[expert] = merged.t() if self.transposed else merged
        self.merged_adapters = names

    def _merged(self, names: list[str], projection: str, expert: int) -> Tensor:
        """W_e + Σ ΔW_e [N, K]."""
        deltas = (self.get_delta_weight(one, projection, expert) for one in names if projection in self.adapted(one))
        return with_updates(self.frozen_weight(projection, expert), deltas)

    def unmerge(self) -> None:
        """Restore every W_e exactly."""
        if self._warn_if_unmerged():
            return
        for projection, kept in self._kept.items():
            self._parameter(projection).data.copy_(kept)
        self._kept = {}
        self.merged_adapters = []

    def originals(self) -> dict[str, Tensor]:
        return self._kept

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `peft.convert_to_lora` supports the layer: it does not; see `export_lora`."""
        return False

    def extra_repr(self) -> str:
        return f"experts={self.experts}, projections={list(self.projections)}, active={self.active_adapters}"

    def _parameter(self, projection: str) -> Tensor:
        return cast(Tensor, getattr(self.base_layer, projection))


@dataclass(frozen=True)
class _Edits:
    """The edits of one projection's input: at most one that the experts share, and those with a pair per expert."""

    tied: list[InputEdit]
    grouped: list[InputEdit]
    backend: str

    def __bool__(self) -> bool:
        return bool(self.tied or self.grouped)

    def __call__(self, x: Tensor, rows: RowGroups | None) -> Tensor:
        """x' in the dtype of x, which also under autocast the experts expect. `rows`: the experts of x's rows."""
        edited = x
        for edit in self.tied:
            edited = edit.edit(edited, self.backend)
        for edit in self.grouped:
            assert rows is not None
            edited = edit.grouped_edit(edited, x, rows, self.backend)
        return edited.to(x.dtype)


class _BeforeDown(TorchFunctionMode):
    """Edits the input of the batched product with down_proj."""

    def __init__(self, base: nn.Module, edit: Any) -> None:
        super().__init__()
        self.base, self.edit = base, edit

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.bmm and args[1] is self.base.down_proj:
            args = (self.edit(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def _is_spread(module: nn.Module, weight: Tensor) -> bool:
    """Whether each process multiplies with a part of the weight. (FSDP gathers it within the module's call.)"""
    if not is_sharded(weight):
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(module, FSDPModule)


def _is_bmm(module: nn.Module) -> bool:
    return any(kind.__name__ == _BMM for kind in type(module).__mro__)
