"""Which names stand for which layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from genft_modules.files import PREFIX
from genft_modules.methods.base import module_type


def layer_names(model: nn.Module) -> list[str]:
    """The names of the base model's modules, without what adapters have put into it."""
    names = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside = (*inside, f"{name}.")
        names.append(name.removeprefix(PREFIX))
    return names


def targets_of(adapted: Iterable[str], names: Iterable[str]) -> list[str] | str:
    """Names for `target_modules` that fit the adapted layers and no other module. peft takes a name for every module
    whose own name it ends: short ones where that is what is meant, full ones else, an expression if nothing helps."""
    adapted = set(adapted)
    taken = {end for name in names if name not in adapted for end in _ends(name)}
    targets = {name if (kind := module_type(name)) in taken else kind for name in adapted}
    if taken.isdisjoint(targets):
        return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(adapted))


def _ends(name: str) -> Iterable[str]:
    """a.b.c, b.c and c of a.b.c."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))
