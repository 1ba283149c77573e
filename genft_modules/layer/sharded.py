"""The forward pass of a layer whose W0 is a `DTensor`: sharded by tensor parallelism, or by FSDP of the base layer
only.

The base layer is called with its hooks or custom forward, which redistribute x, W0 and the output. Inside that call,
our operation replaces the product. With tensor parallelism it runs on the local shard of W0 and the matching parts of
the factors: y has the layout of the base layer's product, so the base layer's communication completes it. The factors
are replicated; their gradients are summed over the processes, once per backward pass and parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from genft_kernels.sharded import Part, is_sharded, part_of
from genft_modules.methods import Generator
from genft_modules.methods.forms import InputEdit, apply, side_by_side


def sharded_forward(base: Any, x: Tensor, generators: Sequence[Generator], transposed: bool) -> Tensor:
    """y [..., N] with the updates, in the layout of the base layer's output. `transposed`: the layer stores W0ᵀ."""
    whole = base.weight.t() if transposed else base.weight
    backend = generators[0].backend

    def product(x: Any, weight: Any, bias: Any) -> Tensor:
        weight = weight.t() if transposed else weight
        if not is_sharded(weight) and weight.shape == whole.shape:
            forms = side_by_side([generator.form(weight) for generator in generators], weight, backend)
            return apply(forms, x, weight, bias, backend)
        # In inference, transformers passes local tensors; `whole` still has the placement.
        return _on_part(x, weight, bias, weight if is_sharded(weight) else whole, generators, backend)

    with _InThePlaceOfTheProduct(base, product) as mode:
        y: Tensor = base(x)
    if not mode.done:
        raise TypeError("base_layer: its forward computed no product with its weight, so the adapter had no effect")
    return y


class _InThePlaceOfTheProduct(TorchFunctionMode):
    """Replaces the base layer's product with its weight by `product(x, weight, bias)`."""

    def __init__(self, base: nn.Module, product: Callable[[Any, Any, Any], Tensor]) -> None:
        super().__init__()
        self.base, self.product, self.done = base, product, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and args[1] is self.base.weight:  # nn.Linear
            self.done = True
            return self.product(*args)
        if function is torch.addmm and args[2] is self.base.weight:  # Conv1D
            self.done = True
            return self.product(args[1], args[2], args[0])
        return function(*args, **(kwargs or {}))


def _on_part(x: Any, weight: Any, bias: Any, whole: Any, generators: Sequence[Generator], backend: str) -> Tensor:
    """The product with the local shard of W0 + ΔW, in the layout of F.linear's output."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    part = part_of(whole)
    if torch.is_grad_enabled():
        for generator in generators:
            sum_gradients(generator, part)
    forms: list[Any] = side_by_side([generator.form(whole) for generator in generators], whole, backend)
    if part.dim == 1:
        forms = [form.low_rank(whole, backend) if isinstance(form, InputEdit) else form for form in forms]
    forms = [form.part(part.dim, part.where) for form in forms]
    if not is_sharded(weight):  # x is local too
        return apply(forms, x, weight, bias, backend)

    mesh, n = part.mesh, whole.shape[0]
    local = x.to_local(grad_placements=[Partial() if part.dim == 0 else Shard(x.dim() - 1)])
    if part.dim == 0:
        y = apply(forms, local, weight.to_local(), None if bias is None else bias.to_local(), backend)
        shape = torch.Size((*y.shape[:-1], n))
        stride = torch.empty(shape, device="meta").stride()
        placed: Tensor = DTensor.from_local(y, mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride)
        return placed
    placed = DTensor.from_local(apply(forms, local, weight.to_local(), None, backend), mesh, [Partial()])
    return placed if bias is None else placed + bias


def frozen_view(weight: Tensor) -> Tensor:
    """W0 inside a call of FSDP1, where it is a view of a flat parameter, which requires a gradient if one of its parts
    does: detached if the layer's own parameter is frozen. Any other tensor is returned as it is.

    Raises:
        ValueError: FSDP1 was told `use_orig_params=False`, and has no parameter of the layer.
    """
    from torch.distributed.fsdp import FlatParameter

    flat: Any = weight._base
    if not isinstance(flat, FlatParameter):
        return weight
    if flat._params is None or flat._tensors is None:
        raise ValueError(
            "use_orig_params: got False, expected True: a flat parameter of FSDP is frozen or trained as a whole"
        )
    own = zip(flat._tensors, flat._params, strict=True)
    frozen = any(view is weight and not parameter.requires_grad for view, parameter in own)
    return weight.detach() if frozen else weight


@dataclass(frozen=True)
class _Sum:
    """A gradient hook that sums over the processes of a mesh."""

    mesh: Any

    def __call__(self, gradient: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_reduce, wait_tensor

        total: Tensor = wait_tensor(all_reduce(gradient.contiguous(), "sum", self.mesh))
        return total


def sum_gradients(generator: Generator, part: Part) -> None:
    """Register hooks that sum the gradients of the adapter's parameters over the mesh, once per parameter even if
    layers share it."""
    for module in generator.modules_with_shared():
        for parameter in module.parameters():
            hooks = (parameter._backward_hooks or {}).values()
            if parameter.requires_grad and not any(isinstance(hook, _Sum) for hook in hooks):
                parameter.register_hook(_Sum(part.mesh))
