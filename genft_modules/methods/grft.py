"""GRFT: train a few rows or columns of each weight, those with the largest gradients (arXiv 2507.00016). There is no
released code; the docstrings mark choices that the paper leaves open as ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils.other import match_target_against_key
from torch import Tensor, nn

from genft_modules.methods.base import Generator, GeneratorConfig, beside
from genft_modules.methods.checks import check_choice, check_number, check_patterns, check_rank, module_names, shown
from genft_modules.methods.forms import Slices
from genft_modules.methods.patterns import pattern_value


@dataclass
class GRFTConfig(GeneratorConfig):
    """Configuration of GRFT: ΔW[I] = V or ΔW[:, I] = V for k rows or columns I of each weight, selected once before
    training.

    Select them with `genft_modules.select_slices(model, batches)`: those with the largest sum of squared gradients over
    the batches. Before that, the adapter can be neither applied nor saved. V is initialised to 0. A checkpoint contains
    V and the indices.

    Args:
        k: number of trained rows or columns per weight.
        orientation: "row" (outputs, ΔW[I] = V [k, K]) or "column" (inputs, ΔW[:, I] = V [N, k]), for all layers.
        selection: "gradient": as above; "random": drawn when the adapter is created, as a baseline.
        k_pattern: layer name or regular expression → k of these layers.
        penalty: λ of the term λ·‖ΔW‖² (squared Frobenius norm), which `genft_modules.grft_penalty` computes and
            `genft_modules.PenaltyMixin` adds to the loss of a `Trainer`. The published value is not known; the default
            0 (ours) disables the penalty.
        penalty_modules: names of the modules to penalise, in the format of target_modules; None for all adapted layers.
            For a matching module of modules_to_save, such as a head, the distance from its initial weights is
            penalised. The paper emphasises the last layers and the head.

    Source: selection by squared gradients and the penalty are from the paper; one orientation for all layers, ties and
    the number of batches are ours.
    """

    method: ClassVar[str] = "grft"
    ranks: ClassVar[Mapping[str, str]] = {"k": "k_pattern"}
    free: ClassVar[tuple[str, ...]] = ("selection", "penalty", "penalty_modules")

    k: int = 16
    orientation: str = "row"
    selection: str = "gradient"
    k_pattern: dict[str, int] = field(default_factory=dict)
    penalty: float = 0.0
    penalty_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("k", self.k)
        check_choice("orientation", self.orientation, ("row", "column"))
        check_choice("selection", self.selection, ("gradient", "random"))
        check_patterns("k_pattern", self.k_pattern, check_rank)
        check_number("penalty", self.penalty)
        if not self.penalty >= 0:
            raise ValueError(f"penalty: got {shown(self.penalty)}, expected a number >= 0")
        self.penalty_modules = module_names("penalty_modules", self.penalty_modules)

    def build(self, name: str, in_features: int, out_features: int, shared: nn.ModuleDict | None) -> GRFTGenerator:
        k = pattern_value(self.k_pattern, name, self.k)
        size = in_features if self.orientation == "column" else out_features
        if k > size:
            raise ValueError(
                f"k: got {k} for {name or 'the layer'}, expected at most its {size} {self.orientation}s; see k_pattern"
            )
        penalty = self.penalty if self.penalty_modules is None or self.penalises(name) else 0.0
        generator = GRFTGenerator(in_features, out_features, k, self.orientation, penalty)
        if self.selection == "random":
            generator.indices = torch.randperm(size)[:k].sort().values
            generator.selected = True
        return generator

    def penalises(self, name: str) -> bool:
        """Whether `penalty_modules` matches the module, as peft matches target_modules."""
        if isinstance(self.penalty_modules, str):
            return bool(match_target_against_key(self.penalty_modules, name))
        return any(name == part or name.endswith(f".{part}") for part in self.penalty_modules or ())


class GRFTGenerator(Generator):
    """V = values, [k, K] for rows or [N, k] for columns, and `indices` int64 [k], −1 before selection."""

    indices: Tensor

    def __init__(self, in_features: int, out_features: int, k: int, orientation: str, penalty: float) -> None:
        super().__init__()
        columns = orientation == "column"
        self.orientation = orientation
        self.size = in_features if columns else out_features
        self.penalty = penalty
        self.values = nn.Parameter(torch.zeros((out_features, k) if columns else (k, in_features)))
        self.register_buffer("indices", torch.full((k,), -1, dtype=torch.int64))
        # Cached, because reading the indices would synchronise with the GPU in every call.
        self.selected = False

    def select(self, indices: Tensor | Sequence[int]) -> None:
        """Set the trained rows or columns.

        Args:
            indices: k unique integers from 0 to N−1 (rows) or K−1 (columns).

        Raises:
            ValueError: the indices are invalid, or V is no longer zero.
        """
        found = torch.as_tensor(indices, dtype=torch.int64).cpu()
        if problem := self._problem(found):
            raise ValueError(f"indices: {problem}")
        if torch.count_nonzero(self.values):
            raise ValueError("indices: V is no longer zero, expected to be set before training")
        self.indices.copy_(found.sort().values)
        self.selected = True

    def _problem(self, indices: Tensor) -> str:
        k = len(self.indices)
        if indices.shape != (k,) or len(indices.unique()) != k or indices.min() < 0 or indices.max() >= self.size:
            return f"got {indices.tolist()}, expected {k} unique integers from 0 to {self.size - 1}"
        return ""

    def check_ready(self) -> None:
        if self.selected or self.indices.is_meta:
            return
        # Some ways of loading an adapter do not call load_state_dict.
        if self._problem(self.indices.cpu()):
            raise ValueError(
                f"GRFT: no {self.orientation}s are selected yet; call genft_modules.select_slices(model, batches) "
                'before training, or use GRFTConfig(selection="random")'
            )
        self.selected = True

    def values_for(self, other: Any, gain: float) -> dict[str, Tensor]:
        """The rows or columns of `other` and, to have k of them, the first others with V = 0."""
        values = super().values_for(other, gain)
        if other is None:
            return values
        other.check_ready()
        unused = torch.ones(self.size, dtype=torch.bool, device=other.indices.device)
        unused[other.indices] = False
        more = unused.nonzero().flatten()[: len(self.indices) - len(other.indices)]
        indices, order = torch.cat([other.indices, more]).sort()
        return {"values": values["values"].index_select(int(self.orientation == "column"), order), "indices": indices}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        key = f"{prefix}indices"
        if key in state_dict and state_dict[key].shape == self.indices.shape and not self.indices.is_meta:
            found = self.indices.cpu()
            problem = self._problem(found)
            self.selected = not problem
            if problem and not bool((found == -1).all()):
                args[-1].append(f"{key}: {problem}")  # raised by load_state_dict

    def form(self, weight: Tensor, *, dropout: bool = True) -> Slices:
        if not self.selected:
            self.check_ready()
        values, indices = beside(weight, self.values, self.indices)
        return Slices(values, indices, self.orientation, self.size)

    def extra_repr(self) -> str:
        return f"k={len(self.indices)}, orientation={self.orientation}, selected={self.selected}"
