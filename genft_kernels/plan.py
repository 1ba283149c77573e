"""How an operation is executed: a pure function from shapes, dtype and device facts to a `LaunchPlan`.

A plan is a value: print it, compare it, write it to a file, hand it back to an operation as `plan=`. Nothing is tuned
at import or on first call. A device with a measured table (`genft_kernels/plans/<architecture>.json`, written by
`python -m benchmarks.gpu`) follows the table; any other device follows `DEFAULTS`.

Algorithms of the low-rank operations:
- "reference": library products only (genft_kernels.reference), on any device.
- "thin": the library's product with W0, and one Triton pass for each stretch of skinny work before or after it.
- "fused": one Triton product whose accumulator starts from the low-rank term, fed by the same skinny passes.
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
ALGORITHMS = ("reference", "thin", "fused")
OPERATIONS = ("lowrank_linear", "input_edit_linear", "input_edit", "weight_features")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_RANK = 128  # above it a "skinny" product is an ordinary one and the library's is the better kernel


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
    """Blocks of the fused product [m, k] @ [k, n] + [m, r] @ [r, n]; `group` rows of tiles share columns in the L2."""

    m: int = 128
    n: int = 128
    k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class LaunchPlan:
    """What runs: the algorithm and the block sizes of its kernels."""

    algorithm: str = "reference"
    skinny: SkinnyPlan = SkinnyPlan()
    product: ProductPlan = ProductPlan()

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"plan: algorithm {self.algorithm!r} is unknown, expected one of {ALGORITHMS}")
        for part in (self.skinny, self.product):
            for name, value in asdict(part).items():
                if name in ("rows", "columns", "m", "n", "k") and (value < 16 or value & (value - 1)):
                    raise ValueError(f"plan: {name} is {value}, expected a power of two of at least 16")
                if value < 1:
                    raise ValueError(f"plan: {name} is {value}, expected at least 1")

    def __str__(self) -> str:
        """One line of JSON; `LaunchPlan.parse` reads it back."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> LaunchPlan:
        """The plan written by `str(plan)`. Raises ValueError on anything else."""
        try:
            fields = json.loads(text)
            return LaunchPlan(fields["algorithm"], SkinnyPlan(**fields["skinny"]), ProductPlan(**fields["product"]))
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"plan: {text!r} is neither a backend of {BACKENDS} nor a printed LaunchPlan") from error


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan may depend on. `architecture` is "cpu", "sm_90", "gfx942" and so on."""

    architecture: str = "cpu"
    processors: int = 1


@dataclass(frozen=True)
class Problem:
    """One call, flattened to matrices: x [m,k], weight [n,k], rank r, the element size of x in bytes."""

    operation: str
    m: int
    n: int
    k: int
    r: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation: got {self.operation!r}, expected one of {OPERATIONS}")


# The widest rank that an entry serves, and its blocks; a test compiles each for every target and refuses spills.
DEFAULTS: tuple[tuple[int, SkinnyPlan, ProductPlan], ...] = (
    (16, SkinnyPlan(rows=64, columns=128, warps=4), ProductPlan()),
    (64, SkinnyPlan(rows=64, columns=64, warps=4), ProductPlan()),
    (128, SkinnyPlan(rows=32, columns=64, warps=4), ProductPlan(stages=2)),
)


def _narrowed(skinny: SkinnyPlan, product: ProductPlan, itemsize: int) -> tuple[SkinnyPlan, ProductPlan]:
    """fp32 tiles take twice the room: halve the tile's depth and the stages in flight."""
    if itemsize < 4:
        return skinny, product
    return (
        replace(skinny, rows=max(16, skinny.rows // 2), columns=max(32, skinny.columns // 2), stages=2),
        replace(product, m=64, n=64, k=32, warps=4, stages=2),
    )


def default_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """The plan of an unmeasured device: the library's product, skinny passes around it, safe block sizes."""
    if problem.r > MAX_TRITON_RANK:
        return LaunchPlan("reference")
    blocks = next((skinny, product) for widest, skinny, product in DEFAULTS if problem.r <= widest)
    skinny, product = _narrowed(*blocks, problem.itemsize)
    # Enough programs to fill the card, never more partial sums than the rows need.
    rows = skinny.rows
    while rows > 16 and problem.m < rows * facts.processors:
        rows //= 2
    groups = max(1, min(facts.processors, -(-problem.m // rows)))
    return LaunchPlan("thin", replace(skinny, rows=rows, groups=groups), product)


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
    covers m), else the default plan."""
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
    """The facts of a device that is present."""
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
