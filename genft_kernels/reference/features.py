"""z = ρ drop(W0) Aᵀ + bias: the features of a weight, before their activation."""

from __future__ import annotations

from torch import Tensor

from .common import outer, project


def weight_features_forward(
    weight: Tensor,
    a: Tensor,
    bias: Tensor | None,
    ratio: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor]:
    """z [N,r], in A's dtype."""
    z = project(weight, a.to(weight.dtype).t(), dropout, seed).to(a.dtype).mul_(ratio)
    return (z if bias is None else z.add_(bias),)


def weight_features_backward(
    dz: Tensor, weight: Tensor, ratio: float, dropout: float, seed: Tensor | None, needs: list[bool]
) -> tuple[Tensor | None]:
    """dA = ρ dZᵀ drop(W0) [r,K]."""
    if not needs[0]:
        return (None,)
    return (outer(dz.to(weight.dtype), weight, dropout, seed).to(dz.dtype).mul_(ratio),)
