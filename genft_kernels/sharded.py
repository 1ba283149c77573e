"""A sharded frozen weight: W0 as a `DTensor`, sharded along one dimension of one mesh.

Convention for tensors computed from it: replicated tensors have the same values on all ranks, and their gradient is the
sum over ranks of local gradients. So operations only need the local parts of W0, x and dY, and the sum is taken once,
for the factors, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, without importing the class."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


@dataclass(frozen=True)
class Part:
    """The local shard of W0 [N, K]: the rows (`dim` 0) or columns (1) `where`, on `mesh`."""

    mesh: Any  # DeviceMesh
    dim: int
    where: slice

    def whole(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """The full matrix of `shape` on every rank, from its local rows (`dim` 0), or by summing local partial sums
        (1). In backward, the local gradients are summed and redistributed accordingly."""
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
    """The local shard of a DTensor W0 [N, K].

    Raises:
        ValueError: W0 is not sharded in contiguous pieces along one dimension of one mesh.
    """
    from torch.distributed.tensor import Shard

    placements = weight.placements
    if len(placements) != 1 or type(placements[0]) is not Shard:
        raise ValueError(
            f"weight: placements {placements}, expected [Shard(0)] or [Shard(1)]; strided shards of fused weights are "
            "not supported"
        )
    dim = placements[0].dim % weight.dim()
    size, mesh = weight.shape[dim], weight.device_mesh
    step = -(-size // mesh.size())  # as in torch.chunk and Shard: the last pieces are shorter
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
    """`genft_kernels.weight_features` of a sharded W0, replicated on all ranks: `of_part` reads the local shard, then
    [N, r] is reduced once. Dropout masks differ between ranks."""
    part = part_of(weight)
    local = weight.to_local()
    if seed is not None:
        seed = seed + part.mesh.get_local_rank()
    if part.dim == 1:
        a = a[:, part.where]
    z = part.whole(of_part(local, a, seed=seed, **options), (weight.shape[0], a.shape[0]))
    return activation(z if bias is None else z + bias)
