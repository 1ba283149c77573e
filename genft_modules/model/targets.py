"""Module names and target_modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from genft_modules.files import PREFIX
from genft_modules.layer.experts import FusedGenExperts, projections
from genft_modules.methods.base import module_type


def layer_names(model: nn.Module) -> list[str]:
    """The names of the base model's modules, without modules added by adapters."""
    names = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = (*inside, f"{name}.")
        names.append(name.removeprefix(PREFIX))
    return names


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """The stacked projections of a module of experts, adapted or not."""
    return module.projections if isinstance(module, FusedGenExperts) else projections(module)


def target_names(model: nn.Module) -> list[str]:
    """What target_modules and other patterns are matched with: the names of modules and of stacked projections."""
    return [
        target
        for name, module in model.named_modules()
        for target in (name, *(f"{name}.{one}" for one in projections_of(module)))
    ]


def targets_of(adapted: Iterable[str], names: Iterable[str]) -> list[str] | str:
    """A `target_modules` that matches the adapted layers and no other module. peft matches a name with every module
    whose name ends in it: so short names if they are unambiguous, else full names, else a regular expression."""
    adapted = set(adapted)
    taken = {end for name in names if name not in adapted for end in _ends(name)}
    targets = {name if (kind := module_type(name)) in taken else kind for name in adapted}
    if taken.isdisjoint(targets):
        return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(adapted))


def _ends(name: str) -> Iterable[str]:
    """a.b.c, b.c and c for a.b.c."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))
