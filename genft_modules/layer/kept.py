"""A layer's inference cache: the forms of its update, valid until one of the source tensors changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from genft_modules.methods.forms import Form


class Kept:
    """The cached forms of one layer's update, at most N·r elements in addition to its parameters, and their sources.

    Changes are detected by tensor identity, version counter and address. In-place writes through `.data` are not
    detected: call `train()` or `eval()` afterwards, which clears the cache.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._key: list[Any] = []
        self._forms: list[Form] | None = None
        self._sources: list[tuple[dict[str, Tensor | None], str, Tensor, int, int]] = []

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """Copies and pickles start with an empty cache."""
        return (Kept, ())

    def forms(self, key: list[Any]) -> list[Form] | None:
        """The forms cached under `key`, or None if there are none or a source tensor has changed."""
        if self._forms is None or self._key != key:
            return None
        for holder, name, tensor, version, address in self._sources:
            if holder.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return None
        return self._forms

    def keep(self, key: list[Any], forms: list[Form], modules: Iterable[nn.Module]) -> None:
        """Cache forms that were computed from the tensors of `modules`."""
        self.clear()
        held = [holder for module in modules for part in module.modules() for holder in _tensors_of(part)]
        found = [(holder, name, tensor) for holder in held for name, tensor in holder.items() if tensor is not None]
        if not any(tensor.is_inference() for _, _, tensor in found):  # inference tensors have no version counter
            self._sources = [(*source, source[2]._version, source[2].data_ptr()) for source in found]
            self._key, self._forms = key, forms


def _tensors_of(module: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    return module._parameters, module._buffers  # type: ignore[return-value]
