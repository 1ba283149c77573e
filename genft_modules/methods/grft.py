"""GRFT: a few rows or columns of each weight train, those with the largest gradients (arXiv 2507.00016). No code is
released; where the publication leaves a choice, the docstrings say that it is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.utils.other import match_target_against_key
from torch import Tensor, nn

from genft_modules.methods.base import (
    Generator,
    GeneratorConfig,
    beside,
    check_choice,
    check_number,
    check_patterns,
    check_rank,
    module_names,
    pattern_value,
)
from genft_modules.methods.forms import Slices


@dataclass
class GRFTConfig(GeneratorConfig):
    """GRFT: ΔW[I] = V, or ΔW[:, I] = V, for k rows or columns I of each weight that are chosen once, before training.

    Choose them with `genft_modules.select_slices(model, batches)`: those with the largest sum of squared gradients over
    the batches. Until then the adapter refuses to be applied and to be saved. V = 0 at the start. The file of the
    adapter has V and the indices.

    Args:
        k: how many rows or columns of each weight train.
        orientation: "row" (outputs, ΔW[I] = V [k, K]) or "column" (inputs, ΔW[:, I] = V [N, k]), for all layers.
        selection: "gradient": as above; "random": drawn when the adapter is made, to compare with.
        k_pattern: from layer name or regular expression to another k.
        penalty: λ of the term λ·‖ΔW‖² (squared Frobenius norm), which `genft_modules.grft_penalty` computes and
            `genft_modules.PenaltyMixin` adds to the loss of a `Trainer`. Its published value is not known; 0 (the
            default, ours) is no penalty.
        penalty_modules: names of the modules that the penalty sums over, in the way of target_modules; None for all
            adapted layers. A module of modules_to_save whose name fits, such as a head, counts with the distance from
            the weights that it started from. The publication stresses the last layers and the head.

    Source: the choice by squared gradients and the penalty are the publication's; one orientation for all layers, ties
    and the number of batches are ours.
    """

    method: ClassVar[str] = "grft"

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
            raise ValueError(f"penalty: got {self.penalty}, expected a number >= 0")
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
        """Whether `penalty_modules` names the module, by peft's matching of target_modules."""
        if isinstance(self.penalty_modules, str):
            return bool(match_target_against_key(self.penalty_modules, name))
        return any(name == part or name.endswith(f".{part}") for part in self.penalty_modules or ())


class GRFTGenerator(Generator):
    """V = values, [k, K] for rows and [N, k] for columns, and `indices` int64 [k], −1 until they are selected."""

    indices: Tensor

    def __init__(self, in_features: int, out_features: int, k: int, orientation: str, penalty: float) -> None:
        super().__init__()
        columns = orientation == "column"
        self.orientation = orientation
        self.size = in_features if columns else out_features
        self.penalty = penalty
        self.values = nn.Parameter(torch.zeros((out_features, k) if columns else (k, in_features)))
        self.register_buffer("indices", torch.full((k,), -1, dtype=torch.int64))
        # What the indices say: known once, so that no call looks at them, which would wait for a GPU.
        self.selected = False

    def select(self, indices: Tensor | Sequence[int]) -> None:
        """Fixes which rows or columns train.

        Args:
            indices: k different integers from 0 to N−1 (rows) or K−1 (columns).

        Raises:
            ValueError: they are others, or V is not zero any more.
        """
        found = torch.as_tensor(indices, dtype=torch.int64).cpu()
        if problem := self._problem(found):
            raise ValueError(f"indices: {problem}")
        if torch.count_nonzero(self.values):
            raise ValueError("indices: V is not zero any more, expected to fix them before training")
        self.indices.copy_(found.sort().values)
        self.selected = True

    def _problem(self, indices: Tensor) -> str:
        k = len(self.indices)
        if indices.shape != (k,) or len(indices.unique()) != k or indices.min() < 0 or indices.max() >= self.size:
            return f"got {indices.tolist()}, expected {k} different ones from 0 to {self.size - 1}"
        return ""

    def check_ready(self) -> None:
        if self.selected or self.indices.is_meta:
            return
        # Not every way to load an adapter ends in load_state_dict.
        if self._problem(self.indices.cpu()):
            raise ValueError(
                f"GRFT: no {self.orientation}s are selected yet; call genft_modules.select_slices(model, batches) "
                'before training, or take GRFTConfig(selection="random")'
            )
        self.selected = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        key = f"{prefix}indices"
        if key in state_dict and state_dict[key].shape == self.indices.shape and not self.indices.is_meta:
            found = self.indices.cpu()
            problem = self._problem(found)
            self.selected = not problem
            if problem and not bool((found == -1).all()):
                args[-1].append(f"{key}: {problem}")  # load_state_dict raises these

    def form(self, weight: Tensor, *, dropout: bool = True) -> Slices:
        if not self.selected:
            self.check_ready()
        values, indices = beside(weight, self.values, self.indices)
        return Slices(values, indices, self.orientation, self.size)

    def extra_repr(self) -> str:
        return f"k={len(self.indices)}, orientation={self.orientation}, selected={self.selected}"
