"""A frozen weight of which every process holds a part: W0 as a `DTensor`, cut along one dimension over one mesh.

The convention of everything made from such a weight: a tensor that all processes hold whole has the same values on all
of them, and as its gradient each process has its own contribution; the gradient is the sum of the contributions. So no
operation needs more than its own part of W0, x and dY, and the sum is taken once, of factors, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. (Importing its class is left to those who have one.)"""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


@dataclass(frozen=True)
class Part:
    """What this process holds of W0 [N, K]: the rows (`dim` 0) or the columns (1) `where`; the rest is on `mesh`."""

    mesh: Any  # DeviceMesh
    dim: int
    where: slice

    def whole(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """The matrix of `shape` on every process: from its rows here, or, where W0 is cut along the columns that the
        matrix was summed over, from the addends here. Backward, the contributions are summed, each to where its part
        came from."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        placed = DTensor.from_local(
            tensor.contiguous(),
            self.mesh,
            [Shard(0) if self.dim == 0 else Partial()],
            run_check=False,
            shape=torch.Size(shape),
            stride=(shape[1], 1),
        )
        replicated = placed.redistribute(placements=[Replicate()])
        return replicated.to_local(grad_placements=[Partial()])


def part_of(weight: Any) -> Part:
    """The part of a sharded W0 [N, K] that is here.

    Raises:
        ValueError: it is not cut in contiguous pieces along one dimension of one mesh.
    """
    from torch.distributed.tensor import Shard

    placements = weight.placements
    if len(placements) != 1 or type(placements[0]) is not Shard:
        raise ValueError(
            f"weight: placements {placements}, expected [Shard(0)] or [Shard(1)]; rows of W0 that lie side by side in "
            "one weight cannot be told apart once it is cut"
        )
    dim = placements[0].dim % weight.dim()
    size, mesh = weight.shape[dim], weight.device_mesh
    step = -(-size // mesh.size())  # as torch.chunk, and Shard with it: the last pieces are the short ones
    start = min(mesh.get_local_rank() * step, size)
    return Part(mesh, dim, slice(start, min(start + step, size)))


def features_of_parts(
    of_part: Callable[..., Tensor],
    weight: Any,
    a: Tensor,
    bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    seed: Tensor | None,
    **options: Any,
) -> Tensor:
    """`genft_kernels.weight_features` of a sharded W0, whole on every process: a pass over the part of W0 that is here
    by `of_part`, and one reduction of [N, r]. Elements are dropped by another mask on each process."""
    part = part_of(weight)
    local = weight.to_local()
    if seed is not None:
        seed = seed + part.mesh.get_local_rank()
    if part.dim == 1:
        a = a[:, part.where]
    z = part.whole(of_part(local, a, seed=seed, **options), (weight.shape[0], a.shape[0]))
    return activation(z if bias is None else z + bias)
