"""Plans with small blocks, so that small shapes have several row blocks in a group, several groups and ragged edges."""

from __future__ import annotations

import torch

from genft_kernels import ContractPlan, LaunchPlan, ProductPlan, SkinnyPlan
from genft_kernels import plan as plans

SKINNY = SkinnyPlan(rows=16, columns=32, groups=3, warps=4, stages=2)
PRODUCT = ProductPlan(m=32, n=32, k=32, group=2, warps=4, stages=2, programs=3, descriptors=True)
CONTRACT = ContractPlan(n=16, k=32, depth=16, groups=4, warps=4, stages=2, panel=1)
PLANS = {name: LaunchPlan(name, SKINNY, PRODUCT, CONTRACT) for name in plans.ALGORITHMS}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
