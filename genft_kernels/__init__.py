"""Fused operations for adapting a frozen linear layer: tensors in, tensors out.

Invalid arguments raise ValueError or TypeError before any work is done; the message names the argument, the value it
got and what it expects.

Importing this package neither imports Triton nor initialises a GPU.
"""

from .dropout import draw_seed
from .edit import input_edit, input_edit_linear
from .features import weight_features
from .generated import generated_features, generated_linear
from .grouped import grouped_lowrank_linear, stack_factors
from .lowrank import lowrank_linear
from .plan import ContractPlan, DeviceFacts, LaunchPlan, Problem, ProductPlan, SkinnyPlan, choose_plan, device_facts
from .rescaled import rescaled_linear, row_squares
from .rows import RowGroups, group_rows
from .sliced import sliced_linear, squared_gradient_sums

__all__ = [
    "ContractPlan",
    "DeviceFacts",
    "LaunchPlan",
    "Problem",
    "ProductPlan",
    "RowGroups",
    "SkinnyPlan",
    "choose_plan",
    "device_facts",
    "draw_seed",
    "generated_features",
    "generated_linear",
    "group_rows",
    "grouped_lowrank_linear",
    "input_edit",
    "input_edit_linear",
    "lowrank_linear",
    "rescaled_linear",
    "row_squares",
    "sliced_linear",
    "squared_gradient_sums",
    "stack_factors",
    "weight_features",
]
