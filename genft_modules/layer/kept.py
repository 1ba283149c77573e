"""What a layer keeps in inference: the forms that its generators made from weights alone, until one of them changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from genft_modules.methods.forms import Form


class Kept:
    """The forms of one layer's update, N·r elements at most beside its parameters, and what they were made from.

    A change is seen by a tensor's version counter, by its address, and by another tensor in its place. Writing through
    `.data` changes none of them: call `train()` or `eval()` after that, which lets the forms go.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._key: list[Any] = []
        self._forms: list[Form] | None = None
        self._sources: list[tuple[dict[str, Tensor | None], str, Tensor, int, int]] = []

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """A copy of the layer, and its pickle, begin without."""
        return (Kept, ())

    def forms(self, key: list[Any]) -> list[Form] | None:
        """What was kept under `key`, unless one of the tensors that it was made from has changed."""
        if self._forms is None or self._key != key:
            return None
        for holder, name, tensor, version, address in self._sources:
            if holder.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return None
        return self._forms

    def keep(self, key: list[Any], forms: list[Form], modules: Iterable[nn.Module]) -> None:
        """Keeps forms that were made from tensors of `modules`."""
        self.clear()
        held = [holder for module in modules for part in module.modules() for holder in _tensors_of(part)]
        found = [(holder, name, tensor) for holder in held for name, tensor in holder.items() if tensor is not None]
        if not any(tensor.is_inference() for _, _, tensor in found):  # they count no versions
            self._sources = [(*source, source[2]._version, source[2].data_ptr()) for source in found]
            self._key, self._forms = key, forms


def _tensors_of(module: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    return module._parameters, module._buffers  # type: ignore[return-value]
