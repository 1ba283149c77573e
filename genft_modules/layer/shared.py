"""Factors that layers of a model share: where they are kept."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

SHARED = "shared_generators"  # the attribute of the tuner or the model


class SharedGenerators(nn.Module):
    """Factors shared by layers: adapter → key → module. A child of the tuner, as in peft's own methods that share, and
    no tuner layer: peft takes every one of those for a layer that is adapted. What peft does to an adapter (train,
    freeze, delete, report) reaches the factors through the layers that use them, see `FusedGenLinear.genft_shared`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.genft_shared = nn.ModuleDict()

    def delete(self, adapter_name: str) -> None:
        """Delete the factors of an adapter, if there are any."""
        if adapter_name in self.genft_shared:
            del self.genft_shared[adapter_name]


class InjectedGenerators(SharedGenerators, BaseTunerLayer):
    """The same in a model without a tuner, such as after transformers' `add_adapter`: a child of the model, and a tuner
    layer, so that peft and transformers save and load it, and do not adapt what is in it.
    """

    adapter_layer_names = ("genft_shared",)
    weight = None  # override peft's properties, which access the base layer
    bias = None

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """The identity, because an adapted `nn.Sequential` calls all of its children."""
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Record the merged adapters; the layers do the merging."""
        names = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters = [*self.merged_adapters, *(name for name in names if name in self.genft_shared)]

    def unmerge(self) -> None:
        self.merged_adapters = []
