"""Fused operations that adapt a frozen linear layer: tensors in, tensors out.

Importing this package imports no Triton and touches no GPU.
"""

from .dropout import draw_seed
from .ops import input_edit, input_edit_linear, lowrank_linear, weight_features
from .plan import DeviceFacts, LaunchPlan, Problem, ProductPlan, SkinnyPlan, choose_plan, device_facts

__all__ = [
    "DeviceFacts",
    "LaunchPlan",
    "Problem",
    "ProductPlan",
    "SkinnyPlan",
    "choose_plan",
    "device_facts",
    "draw_seed",
    "input_edit",
    "input_edit_linear",
    "lowrank_linear",
    "weight_features",
]
