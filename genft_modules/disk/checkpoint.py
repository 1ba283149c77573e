"""A checkpoint of the methods' released code: what was read, and how it goes into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.base import GeneratorConfig

PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
# the tensor's key in the checkpoint, our parameter, the tensor
Piece = tuple[str, nn.Parameter, Tensor]


@dataclass
class Checkpoint:
    """Settings and tensors as the released code wrote them. `in_peft_format`: with an adapter_config.json."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    in_peft_format: bool


@dataclass
class Plan:
    """How to load a checkpoint.

    Args:
        config: our configuration of the adapter.
        pieces: the adapted base model, its adapted layers by name, and the adapter's name → all of the adapter's
            parameters with their tensors. Raises ValueError if they do not match one to one.
        others: all other tensors, such as a head, by their names in the base model.
    """

    config: GeneratorConfig
    pieces: Callable[[nn.Module, dict[str, FusedGenLinear], str], list[Piece]]
    others: dict[str, Tensor] = field(default_factory=dict)


def refuse_differences(found: Iterable[str], expected: Iterable[str], key: str = "{}") -> None:
    """Raises ValueError unless both have the same names; `key` makes the checkpoint's key of a name."""
    found, expected = set(found), set(expected)
    if found != expected:
        unmapped = sorted(key.format(name) for name in found - expected)
        missing = sorted(key.format(name) for name in expected - found)
        raise ValueError(
            "path: the checkpoint does not match the model; "
            + "; ".join(f"{what}: {names}" for what, names in (("unknown", unmapped), ("missing", missing)) if names)
        )


def refuse_shapes(pieces: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Raises ValueError for mismatched shapes. Pieces: key, ours, theirs."""
    if wrong := [
        f"{key}: got {tuple(t.shape)}, expected {tuple(p.shape)}" for key, p, t in pieces if p.shape != t.shape
    ]:
        raise ValueError(f"path: shape mismatch: {', '.join(wrong)}")
