"""y = c ⊙ (d W0ᵀ + s (d P) Qᵀ) + (x − d) W0ᵀ + b: the low-rank layer, then one pass for c. d is stored."""

from __future__ import annotations

from torch import Tensor

from ..plan import LaunchPlan
from ..reference.common import add_base_
from .kernels.rescale import launch_column_sums, launch_rescale
from .kernels.skinny import launch_project, launch_update
from .lowrank import lowrank_linear_backward, lowrank_linear_forward


def rescaled_linear_forward(
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    save: bool,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor | None]:
    d = x if seed is None else launch_rescale(x, plan.skinny, dropout=dropout, seed=seed)
    z, t = lowrank_linear_forward(d, weight, p, q, None, scale, 0.0, None, plan)
    y = launch_rescale(z, plan.skinny, gain=gain, bias=bias, overwrite=not save)
    if seed is not None:
        add_base_(y, x - d, weight.t())
    return y, t, z if save else None


def rescaled_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    p: Tensor,
    q: Tensor,
    gain: Tensor,
    t: Tensor,
    z: Tensor,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
    plan: LaunchPlan,
) -> tuple[Tensor | None, ...]:
    need_x, need_p, need_q, need_gain = needs
    dx = dp = dq = None
    dgain = launch_column_sums(dy, z, plan.skinny, gain.dtype) if need_gain else None
    if need_x or need_p or need_q:
        dz = launch_rescale(dy, plan.skinny, gain=gain)
        d = launch_rescale(x, plan.skinny, dropout=dropout, seed=seed) if seed is not None and need_p else x
        asked = [need_x and seed is None, need_p, need_q]
        dx, dp, dq = lowrank_linear_backward(dz, d, weight, p, q, t, scale, 0.0, None, asked, plan)
        if need_x and seed is not None:
            u = launch_project(dz, q, plan.skinny, scale=scale)
            dx = add_base_(launch_update(u, p.t(), plan.skinny, like=dz), dz.sub_(dy), weight)
            launch_rescale(dx, plan.skinny, dropout=dropout, seed=seed, overwrite=True)
            add_base_(dx, dy, weight)
    return dx, dp, dq, dgain
