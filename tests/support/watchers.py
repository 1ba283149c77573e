"""Dispatch modes that note what happens inside of a call, and layers to be watched."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genft_kernels import edit, features, generated, grouped, lowrank, rescaled, sliced
from genft_kernels.operation import Operation


class Inside(TorchDispatchMode):
    """Sees every call of aten, those within our operators too: a mode is off while an operator's body runs, so the
    body is called here, with the mode on."""

    BODIES: ClassVar = {
        overload: body
        for module in (lowrank, rescaled, edit, features, generated, grouped, sliced)
        for value in vars(module).values()
        if isinstance(value, Operation)
        for overload, body in value.operators.items()
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.BODIES:
            with self:
                return self.BODIES[function](*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        self.see(function, out)
        return out


class Products(Inside):
    """The shapes of the products made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def see(self, function, out) -> None:
        aten = torch.ops.aten
        if function.overloadpacket in (aten.mm, aten.matmul, aten.addmm, aten.addmm_):
            self.shapes.append(tuple(out.shape))


class Allocations(Inside):
    """The largest new storage, in bytes."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def see(self, function, out) -> None:
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
            self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return out


class Doubling(nn.Linear):
    """A base layer whose forward is not only its weight, as a quantised one's."""

    def forward(self, x):
        return 2 * super().forward(x)


class Int8Linear(nn.Module):
    """Rows of bytes with a scale each: what many packages do. Not an nn.Linear, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.reads = 0

    def dequantize(self) -> Tensor:
        self.reads += 1
        return self.qweight * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype), self.bias)
