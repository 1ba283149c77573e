"""How an operation is executed: a pure function from shapes, dtype and device facts to a `LaunchPlan`.

A plan is a value: print it, compare it, write it to a file, hand it back to an operation as `plan=`. Nothing is tuned
at import or on first call. A device with a measured table (`genft_kernels/plans/<architecture>.json`, written by
`python -m benchmarks.gpu`) follows the table; any other device follows `DEFAULTS`.

Algorithms:
- "reference": library products only (genft_kernels.reference), on any device.
- "thin" (low rank, slices): the library's product with W0, and one Triton pass for each stretch of skinny work around
  it.
- "fused": one Triton product; low rank and slices: its accumulator starts from the update's term; generated: the tiles
  of ΔW are made inside it; squared gradients: its tiles are reduced, not stored.
- "panel" (generated): W0 + ΔW for a bounded panel in a reused workspace, then the library's product, panel by panel.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any

import torch

BACKENDS = ("auto", "triton", "reference")
LOW_RANK = (
    "lowrank_linear",
    "input_edit_linear",
    "input_edit",
    "weight_features",
    "sliced_linear",
    "grouped_lowrank_linear",
)
GENERATED = ("generated_linear", "generated_features")
SQUARES = "squared_gradient_sums"
OPERATIONS = (*LOW_RANK, *GENERATED, SQUARES)
ALGORITHMS = ("reference", "thin", "fused", "panel")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_RANK = 128  # a kernel holds a factor's whole rank in one block


@dataclass(frozen=True)
class SkinnyPlan:
    """Blocks of the pass over a tall matrix [rows, columns]; `groups` bounds the programs along the rows, and with them
    the fp32 partial sums of a reduction ([groups, r, columns])."""

    rows: int = 64
    columns: int = 128
    groups: int = 128
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class ProductPlan:
    """Blocks of a fused product [m, k] @ [k, n]; `group` rows of tiles share columns in the L2."""

    m: int = 128
    n: int = 128
    k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class ContractPlan:
    """Blocks of the passes over a generated matrix [n, k] (`depth` of the product dYᵀ x), about `groups` programs.

    `atomic`: sum gradients by atomic additions instead of slabs of partial sums: less memory, another rounding in every
    run. `panel`: elements of the workspace of the panel algorithm.
    """

    n: int = 64
    k: int = 64
    depth: int = 32
    groups: int = 128
    warps: int = 8
    stages: int = 2
    atomic: bool = False
    panel: int = 1 << 20


@dataclass(frozen=True)
class LaunchPlan:
    """What runs: the algorithm and the block sizes of its kernels."""

    algorithm: str = "reference"
    skinny: SkinnyPlan = SkinnyPlan()
    product: ProductPlan = ProductPlan()
    contract: ContractPlan = ContractPlan()

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"plan: algorithm {self.algorithm!r} is unknown, expected one of {ALGORITHMS}")
        for part in (self.skinny, self.product, self.contract):
            for name, value in asdict(part).items():
                block = name in ("rows", "columns", "m", "n", "k", "depth")
                if block and (value < 16 or value & (value - 1)):
                    raise ValueError(f"plan: {name} is {value}, expected a power of two of at least 16")
                if name != "atomic" and value < 1:
                    raise ValueError(f"plan: {name} is {value}, expected at least 1")

    def __str__(self) -> str:
        """One line of JSON; `LaunchPlan.parse` reads it back."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> LaunchPlan:
        """The plan written by `str(plan)`. Raises ValueError on anything else."""
        try:
            fields = json.loads(text)
            return LaunchPlan(
                fields["algorithm"],
                SkinnyPlan(**fields["skinny"]),
                ProductPlan(**fields["product"]),
                ContractPlan(**fields["contract"]),
            )
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"plan: {text!r} is neither a backend of {BACKENDS} nor a printed LaunchPlan") from error


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan may depend on. `architecture` is "cpu", "sm_90", "gfx942" and so on."""

    architecture: str = "cpu"
    processors: int = 1


@dataclass(frozen=True)
class Problem:
    """One call, flattened to matrices: x [m,k], weight [n,k], rank r (of slices: their number; 1 where there is none),
    the element size of x in bytes."""

    operation: str
    m: int
    n: int
    k: int
    r: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation: got {self.operation!r}, expected one of {OPERATIONS}")


# By element size: (widest rank served, skinny blocks for many rows, for few rows). Past the last rank a "skinny"
# product is an ordinary one, and without tensor cores (fp32) that comes earlier; there the plan is the library's.
# A test compiles every entry for four targets and refuses spills.
LOW_RANK_DEFAULTS: dict[int, tuple[tuple[int, SkinnyPlan, SkinnyPlan], ...]] = {
    2: (
        (16, SkinnyPlan(64, 128, warps=4, stages=3), SkinnyPlan(16, 64, warps=4, stages=3)),
        (64, SkinnyPlan(64, 32, warps=8, stages=3), SkinnyPlan(64, 32, warps=8, stages=3)),
    ),
    4: (
        (16, SkinnyPlan(32, 32, warps=8, stages=2), SkinnyPlan(16, 64, warps=4, stages=2)),
        (32, SkinnyPlan(32, 16, warps=8, stages=2), SkinnyPlan(16, 16, warps=4, stages=2)),
    ),
}
PRODUCT_DEFAULTS = {2: ProductPlan(), 4: ProductPlan(64, 64, 32, warps=4, stages=2)}
# By element size: (widest rank served, blocks of the generated product, of the passes over the generated matrix).
GENERATED_DEFAULTS: dict[int, tuple[tuple[int, ProductPlan, ContractPlan], ...]] = {
    2: (
        (64, ProductPlan(128, 128, 32, warps=8, stages=2), ContractPlan(64, 32, 32, warps=8)),
        (128, ProductPlan(128, 64, 32, warps=8, stages=2), ContractPlan(64, 32, 32, warps=8)),
    ),
    4: ((64, ProductPlan(64, 32, 16, warps=8, stages=2), ContractPlan(32, 32, 16, warps=8)),),
}


def default_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """The plan of an unmeasured device: safe blocks; the library's product around them where there is a choice."""
    if problem.operation in GENERATED:
        for widest, product, contract in GENERATED_DEFAULTS[problem.itemsize]:
            if problem.r <= widest:
                algorithm = "panel" if problem.operation == "generated_linear" else "fused"
                contract = replace(contract, groups=max(1, facts.processors))
                return LaunchPlan(algorithm, product=product, contract=contract)
        return LaunchPlan("reference")
    if problem.operation == SQUARES:
        return LaunchPlan("fused", product=PRODUCT_DEFAULTS[problem.itemsize])
    for widest, many, few in LOW_RANK_DEFAULTS[problem.itemsize]:
        if problem.r <= widest:
            # Fill the card, and never hold more partial sums than the rows need. (A grouped operation holds none that
            # grow with its programs.)
            skinny = many if problem.m >= many.rows * facts.processors else few
            groups = max(1, facts.processors)
            if problem.operation != "grouped_lowrank_linear":
                groups = min(groups, max(1, -(-problem.m // skinny.rows)))
            return LaunchPlan("thin", replace(skinny, groups=groups), PRODUCT_DEFAULTS[problem.itemsize])
    return LaunchPlan("reference")


@lru_cache(maxsize=8)
def plan_table(architecture: str) -> tuple[dict[str, Any], ...]:
    """The measured entries for an architecture: dicts with the fields of `Problem`, `m_max` for the largest m that the
    entry speaks for, and `plan`. Empty where nothing was measured."""
    path = resources.files("genft_kernels").joinpath("plans", f"{architecture}.json")
    if not path.is_file():
        return ()
    return tuple(json.loads(path.read_text())["entries"])


@lru_cache(maxsize=4096)
def choose_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """The measured plan that fits `problem` (same operation, n, k, element size and rank bucket, smallest m_max that
    covers m), else the default plan.

    Args:
        problem: the call, as matrices.
        facts: the device, from `device_facts`, or of one that is not there.
    """
    bucket = max(16, 1 << (problem.r - 1).bit_length())
    fitting = [
        entry
        for entry in plan_table(facts.architecture)
        if (entry["operation"], entry["n"], entry["k"], entry["itemsize"])
        == (problem.operation, problem.n, problem.k, problem.itemsize)
        and max(16, 1 << (entry["r"] - 1).bit_length()) == bucket
        and problem.m <= entry["m_max"]
    ]
    if fitting:
        return LaunchPlan.parse(json.dumps(min(fitting, key=lambda entry: int(entry["m_max"]))["plan"]))
    return default_plan(problem, facts)


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device that is present; of any that is no GPU, those of "cpu"."""
    if device.type != "cuda":
        return DeviceFacts()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return DeviceFacts(architecture, properties.multi_processor_count)


def triton_can_run(device: torch.device) -> bool:
    """True on a GPU, and for CPU tensors while Triton interprets kernels (TRITON_INTERPRET=1)."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@lru_cache(maxsize=4096)
def resolve(
    choice: str, operation: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device
) -> LaunchPlan:
    """The plan for a call whose `plan`/`backend` argument is `choice`: a backend name or a printed plan."""
    if choice not in BACKENDS:
        plan = LaunchPlan.parse(choice)
        if plan.algorithm != "reference":
            _require_triton(device, dtype, r)
        strangers = ("panel",) if operation in LOW_RANK else ("thin",) if operation in GENERATED else ("thin", "panel")
        if plan.algorithm in strangers:
            raise ValueError(f"plan: {operation} has no algorithm {plan.algorithm!r}")
        return plan
    usable = device.type == "cuda" and dtype in TRITON_DTYPES
    if choice == "reference" or (choice == "auto" and not usable):
        return LaunchPlan("reference")
    if choice == "triton":
        _require_triton(device, dtype, min(r, MAX_TRITON_RANK))
    return choose_plan(Problem(operation, m, n, k, r, dtype.itemsize), device_facts(device))


def _require_triton(device: torch.device, dtype: torch.dtype, r: int) -> None:
    if not triton_can_run(device):
        raise ValueError(
            f"backend: Triton kernels need tensors on a GPU (or TRITON_INTERPRET=1 set before Python starts), "
            f"got tensors on {device}; use backend='auto' or 'reference'"
        )
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"backend: Triton kernels take {TRITON_DTYPES}, got {dtype}; use backend='reference'")
    if r > MAX_TRITON_RANK:
        raise ValueError(f"plan: a Triton algorithm takes ranks up to {MAX_TRITON_RANK}, got {r}")
