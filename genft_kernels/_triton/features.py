"""z = ρ drop(W0) Aᵀ + bias: the features of a weight, before their activation."""

from __future__ import annotations

from torch import Tensor

from ..plan import LaunchPlan
from .kernels.skinny import launch_project, launch_reduce


def weight_features_forward(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
    plan: LaunchPlan,
) -> tuple[Tensor]:
    drop = {"dropout": dropout, "seed": seed}
    return (launch_project(weight, a.t(), plan.skinny, bias=bias, scale=ratio, dtype=a.dtype, **drop),)


def weight_features_backward(
    dz: Tensor,
    weight: Tensor,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    plan: LaunchPlan,
) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    drop = {"dropout": dropout, "seed": seed}
    return (launch_reduce(weight, dz, plan.skinny, dz.dtype, transposed=True, scale=ratio, **drop),)
