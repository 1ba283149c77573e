"""Launch plans: a pure function from shapes, dtype and device facts to a `LaunchPlan`.

A plan is a value: it can be printed, compared, written to a file, and passed to an operation as `plan=`. Nothing is
tuned at import or on first call. Measured tables have priority: the user's, written by `genft tune`, then the packaged
one, written by `python -m benchmarks.gpu`. For other problems, `default_plan` uses a cost model.

Algorithms ("library" means torch's matrix products, such as cuBLAS):
- "library" or "reference": library products only (genft_kernels.reference), on any device. "reference" is also the name
  of the backend.
- "seeded" (low rank, slices): one pass writes the update, and the library's product accumulates onto it in float32: one
  rounding, so that updates below the rounding of y are not lost.
- "single" (low rank): one persistent Triton product that also computes t = x P. With dropout on x, and for many rows on
  AMD GPUs, it falls back to "seeded".
- "thin" (input edit only, weight features, mixed batches): one Triton pass per skinny product.
- "fused": one Triton product; low rank and slices: its accumulator is initialised with the update; generated: the tiles
  of ΔW are generated inside it; squared gradients: its tiles are reduced instead of stored.
- "panel" (generated): W0 + ΔW in a bounded, reused workspace, then the library's product, panel by panel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

BACKENDS = ("auto", "triton", "reference")
LOW_RANK = (
    "lowrank_linear",
    "input_edit_linear",
    "input_edit",
    "weight_features",
    "sliced_linear",
    "grouped_lowrank_linear",
    "rescaled_linear",
)
GENERATED = ("generated_linear", "generated_features")
SQUARES = "squared_gradient_sums"
LIBRARY = ("library", "reference")
# The algorithms of each operation in addition to the library's.
ALGORITHMS_OF: dict[str, tuple[str, ...]] = {
    "lowrank_linear": ("seeded", "single", "fused"),
    "rescaled_linear": ("seeded", "single", "fused"),
    "input_edit_linear": ("seeded", "single", "fused"),
    "input_edit": ("thin",),
    "weight_features": ("thin",),
    "grouped_lowrank_linear": ("thin",),
    "sliced_linear": ("seeded", "fused"),
    "generated_linear": ("panel", "fused"),
    "generated_features": ("fused",),
    SQUARES: ("fused",),
}
OPERATIONS = tuple(ALGORITHMS_OF)
ALGORITHMS = (*LIBRARY, "seeded", "single", "thin", "fused", "panel")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TRITON_RANK = 128  # kernels hold the full rank of a factor in one block
FEW_ROWS = 64  # up to this number, operations are bound by reading W0, and every program computes its own t
PANEL_BYTES = 16 << 20


@dataclass(frozen=True)
class SkinnyPlan:
    """Block sizes of a pass over a tall matrix [rows, columns].

    `groups`: target number of programs. If the result has fewer blocks, the contraction is split, and a second launch
    adds the float32 partial sums (`splits`).
    """

    rows: int = 64
    columns: int = 128
    groups: int = 128
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class ProductPlan:
    """Block sizes of a Triton product [m, k] @ [k, n]; `group` rows of tiles share columns in the L2 cache.

    `programs`: number of resident programs of the persistent product (algorithm "single"), one per multiprocessor.
    `descriptors`: whether it uses tensor descriptors (bulk copies of sm_90 and later); operands whose rows are not
    16-byte aligned still use plain loads.
    """

    m: int = 128
    n: int = 128
    k: int = 64
    group: int = 8
    warps: int = 8
    stages: int = 3
    programs: int = 128
    descriptors: bool = False


@dataclass(frozen=True)
class ContractPlan:
    """Block sizes of the passes over a generated matrix [n, k] (`depth`: of the product dYᵀ x); about `groups`
    programs.

    `atomic`: sum gradients by atomic additions instead of partial sums: less memory, but not deterministic. `panel`:
    number of elements in the workspace of the panel algorithm.
    """

    n: int = 64
    k: int = 64
    depth: int = 32
    groups: int = 128
    warps: int = 4
    stages: int = 2
    atomic: bool = False
    panel: int = PANEL_BYTES // 4


@dataclass(frozen=True)
class LaunchPlan:
    """The algorithm and the block sizes of its kernels."""

    algorithm: str = "reference"
    skinny: SkinnyPlan = SkinnyPlan()
    product: ProductPlan = ProductPlan()
    contract: ContractPlan = ContractPlan()

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"plan: got algorithm {self.algorithm!r}, expected one of {ALGORITHMS}")
        for part in (self.skinny, self.product, self.contract):
            for name, value in asdict(part).items():
                block = name in ("rows", "columns", "m", "n", "k", "depth")
                if block and (value < 16 or value & (value - 1)):
                    raise ValueError(f"plan: got {name} = {value}, expected a power of two >= 16")
                if not isinstance(value, bool) and value < 1:
                    raise ValueError(f"plan: got {name} = {value}, expected at least 1")

    def __str__(self) -> str:
        """One line of JSON, the inverse of `LaunchPlan.parse`."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def parse(text: str) -> LaunchPlan:
        """Parse the output of `str(plan)`. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            return LaunchPlan(
                fields["algorithm"],
                SkinnyPlan(**fields["skinny"]),
                ProductPlan(**fields["product"]),
                ContractPlan(**fields["contract"]),
            )
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"plan: got {text!r}, expected a backend of {BACKENDS} or a printed LaunchPlan") from error


@dataclass(frozen=True)
class DeviceFacts:
    """The device properties that plans depend on. `architecture` is "cpu", "sm_90", "gfx942" etc.; `processors` is the
    number of multiprocessors."""

    architecture: str = "cpu"
    processors: int = 1

    @property
    def descriptors(self) -> bool:
        """Whether the GPU has tensor descriptors and enough shared memory for their plans (sm_120 has less than half of
        it)."""
        return self.architecture in ("sm_90", "sm_100", "sm_103")

    @property
    def flags(self) -> bool:
        """Whether programs may wait for each other. On AMD GPUs, stores of other waves may still be in flight at a
        barrier."""
        return not self.architecture.startswith("gfx")


@dataclass(frozen=True)
class Problem:
    """One call, flattened to matrices: x [m,k], weight [n,k], rank r (for slices: their number; 1 if there is none),
    element size of x in bytes."""

    operation: str
    m: int
    n: int
    k: int
    r: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation: got {self.operation!r}, expected one of {OPERATIONS}")


# ---- how a launch is divided into programs: pure functions shared by the launchers and the cost model


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def splits(programs: int, blocks: int, steps: int, result: int, moved: int) -> int:
    """The number of splits of a contraction of `steps` blocks with a result of `blocks` blocks: enough for `programs`
    programs, while the float32 partial sums (`result` elements each, written and read) stay below the `moved` bytes of
    the pass itself."""
    wanted = min(_blocks(programs, max(1, blocks)), steps, moved // max(1, 8 * result))
    return _blocks(steps, _blocks(steps, wanted)) if wanted > 1 else 1


def projection_splits(plan: SkinnyPlan, rows: int, columns: int, r: int, itemsize: int) -> int:
    """Splits of U [rows, r] = S A along the columns of S [rows, columns]."""
    moved = (rows * columns + columns * r) * itemsize
    return splits(plan.groups, _blocks(rows, plan.rows), _blocks(columns, plan.columns), rows * r, moved)


def reduction_splits(plan: SkinnyPlan, rows: int, columns: int, r: int, itemsize: int) -> int:
    """Splits of D [r, columns] = Lᵀ S along the rows of S [rows, columns]."""
    moved = (rows * columns + rows * r) * itemsize
    return splits(plan.groups, _blocks(columns, plan.columns), _blocks(rows, plan.rows), r * columns, moved)


def product_splits(plan: ProductPlan, rows: int, columns: int, depth: int, itemsize: int) -> int:
    """Splits of O [rows, columns] = A B along the depth, in the product whose programs compute their own t."""
    if rows > plan.m:
        return 1
    moved = (rows * depth + depth * columns) * itemsize
    return splits(plan.programs, _blocks(columns, plan.n), _blocks(depth, plan.k), rows * columns, moved)


def contraction_bytes(n: int, k: int, depth: int, itemsize: int) -> int:
    """Limit for the bytes of partial sums in a contraction over a generated matrix [n, k]: the minimal traffic of the
    pass itself (G = Lᵀ R of `depth` rows written and read, or its tiles recomputed, which takes longer), and at most
    those of a second workspace, written and read."""
    return min(itemsize * (2 * n * k + depth * (n + k)), 2 * PANEL_BYTES)


def contraction_grid(plan: ContractPlan, n: int, k: int, r: int, moved: int) -> tuple[int, int]:
    """(row tiles, column tiles) of a generated matrix [n, k] per program of the contraction: about `plan.groups`
    programs with regions as square as possible, which minimises partial sums; fewer if those exceed `moved` bytes."""
    tiles_n, tiles_k = _blocks(n, plan.n), _blocks(k, plan.k)
    programs = min(plan.groups, tiles_n * tiles_k)
    while True:
        side = max(1, round((tiles_n * tiles_k / programs) ** 0.5))
        groups_n = _blocks(tiles_n, min(side, tiles_n))
        groups_k = max(1, min(tiles_k, _blocks(programs, groups_n)))
        per_n, per_k = _blocks(tiles_n, groups_n), _blocks(tiles_k, groups_k)
        slabs = (_blocks(tiles_k, per_k) * n + _blocks(tiles_n, per_n) * k) * r * 8
        if plan.atomic or slabs <= moved or programs == 1:
            return per_n, per_k
        programs = max(1, programs * 3 // 4)


def stretches(length: int, other: int, elements: int) -> Iterator[slice]:
    """Slices of range(length) for panels of width `other` with at most `elements` elements (but at least 64 rows)."""
    size = max(64, elements // other // 64 * 64)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


# ---- the cost model, for problems without measurements


@dataclass(frozen=True)
class Pass:
    """One launch or library product: number of programs (0: chosen by the library), minimal bytes moved, bytes of
    partial sums (written and read), and number of operations (two per multiply-add)."""

    name: str
    programs: int
    bytes: int
    partials: int = 0
    operations: int = 0
    efficiency: float = 1.0  # relative to the library's product, or for a pass, to a large copy


# Operations per second of 16-bit library products; bytes per second of a copy, read plus written. sm_90: measured on an
# H200 by others; the rest: data sheets. Measured tables have priority over this model.
SPEEDS = {
    "sm_80": (250e12, 1.7e12),
    "sm_90": (790e12, 4.3e12),
    "sm_100": (1600e12, 7.0e12),
    "gfx942": (600e12, 4.0e12),
}
LAUNCH_SECONDS = 2e-6
# Efficiency of Triton's products relative to the library's on Hopper (triton issues 5461 and 5726).
WITH_DESCRIPTORS, WITH_LOADS = 0.94, 0.76
SKINNY_LIBRARY = 0.6  # assumed fraction of a copy's bandwidth in library products with a dimension r


def passes(problem: Problem, plan: LaunchPlan) -> tuple[Pass, ...]:
    """The launches of a low-rank operation under a plan: forward, and for more than `FEW_ROWS` rows (training) also
    backward."""
    m, n, k, r, size = problem.m, problem.n, problem.k, problem.r, problem.itemsize
    if problem.operation == "weight_features":
        return (_project(plan, n, k, r, size), _reduce(plan, n, k, r, size))
    if problem.operation == "input_edit":
        return (_project(plan, m, k, r, size), _update(plan, m, k, r, size, read=True))
    training = m > FEW_ROWS
    found: tuple[Pass, ...] = ()
    if problem.operation == "input_edit_linear":
        found += (_project(plan, n, k, r, size),) + ((_reduce(plan, n, k, r, size),) if training else ())
    sides = ((n, k), (k, n)) if training else ((n, k),)  # (columns of the result, depth) of y, then of dX
    for columns, depth in sides:
        if plan.algorithm == "single":
            found += (_single(plan, m, columns, depth, r, size),)
        else:
            found += (_project(plan, m, depth, r, size),)
            fused = plan.algorithm == "fused"
            if not fused:
                found += (_update(plan, m, columns, r, size, read=False),)
            read = 0 if fused else m * columns * size // 2  # half of reading the seed overlaps with the product
            moved = (m * depth + depth * columns + m * columns) * size
            tiles = _blocks(m, plan.product.m) * _blocks(columns, plan.product.n) if fused else 0
            efficiency = WITH_LOADS if fused else 1.0
            found += (Pass("product", tiles, moved + read, 0, 2 * m * columns * depth, efficiency),)
    if training:
        found += (_reduce(plan, m, n, r, size), _reduce(plan, m, k, r, size))
    return found


def _project(plan: LaunchPlan, rows: int, columns: int, r: int, size: int) -> Pass:
    moved = (rows * columns + columns * r + rows * r) * size
    if plan.algorithm in LIBRARY:
        return Pass("project", 0, moved, efficiency=SKINNY_LIBRARY)
    parts = projection_splits(plan.skinny, rows, columns, r, size)
    return Pass("project", _blocks(rows, plan.skinny.rows) * parts, moved, (parts > 1) * parts * rows * r * 8)


def _reduce(plan: LaunchPlan, rows: int, columns: int, r: int, size: int) -> Pass:
    moved = (rows * columns + columns * r + rows * r) * size
    if plan.algorithm in LIBRARY:
        return Pass("reduce", 0, moved, efficiency=SKINNY_LIBRARY)
    parts = reduction_splits(plan.skinny, rows, columns, r, size)
    return Pass("reduce", _blocks(columns, plan.skinny.columns) * parts, moved, (parts > 1) * parts * columns * r * 8)


def _update(plan: LaunchPlan, rows: int, columns: int, r: int, size: int, *, read: bool) -> Pass:
    moved = ((1 + read) * rows * columns + columns * r + rows * r) * size
    if plan.algorithm in LIBRARY:
        return Pass("update", 0, moved, efficiency=SKINNY_LIBRARY)
    return Pass("update", _blocks(rows, plan.skinny.rows) * _blocks(columns, plan.skinny.columns), moved)


def _single(plan: LaunchPlan, rows: int, columns: int, depth: int, r: int, size: int) -> Pass:
    blocks = plan.product
    parts = product_splits(blocks, rows, columns, depth, size)
    tiles = max(1, _blocks(rows, blocks.m)) * _blocks(columns, blocks.n) * parts
    programs = min(blocks.programs, tiles)
    moved = (rows * depth + depth * columns + rows * columns + r * (depth + columns)) * size
    rounds = tiles / (_blocks(tiles, blocks.programs) * blocks.programs)  # the last round leaves processors idle
    reuse = min(1.0, (blocks.m * blocks.n / (128 * 256)) ** 0.25)  # smaller tiles read their operands more often
    makers = 1 if rows > blocks.m else _blocks(columns, blocks.n)  # programs that compute the t of a row block
    return Pass(
        "single",
        programs,
        moved,
        (parts > 1) * parts * rows * (columns + r) * 8,
        2 * rows * depth * (columns + makers * r),
        (WITH_DESCRIPTORS if blocks.descriptors else WITH_LOADS) * rounds * reuse,
    )


def seconds(problem: Problem, plan: LaunchPlan, facts: DeviceFacts) -> float:
    """The predicted time of a plan: each pass takes the maximum of its compute and memory times, and more if it has
    fewer programs than the GPU has multiprocessors."""
    speed, bandwidth = SPEEDS.get(facts.architecture, SPEEDS["sm_80"])
    speed *= 2 / max(problem.itemsize, 2)
    total = 0.0
    for one in passes(problem, plan):
        filled = min(1.0, one.programs / facts.processors) if one.programs else 1.0
        arithmetic = one.operations / speed / one.efficiency
        moving = (one.bytes + one.partials) / bandwidth / filled / (1.0 if one.operations else one.efficiency)
        total += max(arithmetic, moving) + LAUNCH_SECONDS * (2 if one.partials else 1)
    return total


# ---- default plans

# By element size: (maximum rank, skinny blocks to choose from). Larger ranks use the library's plan; without tensor
# cores (fp32) the limit is lower. A test compiles every entry of these tables for four targets and fails on spills.
SKINNY_DEFAULTS: dict[int, tuple[tuple[int, tuple[SkinnyPlan, ...]], ...]] = {
    2: (
        (16, (SkinnyPlan(64, 128, warps=4, stages=3), SkinnyPlan(16, 128, warps=4, stages=4))),
        (64, (SkinnyPlan(64, 64, warps=4, stages=4), SkinnyPlan(16, 64, warps=4, stages=4))),
    ),
    4: (
        (16, (SkinnyPlan(32, 32, warps=4, stages=2), SkinnyPlan(16, 64, warps=4, stages=2))),
        (32, (SkinnyPlan(32, 16, warps=4, stages=2), SkinnyPlan(16, 16, warps=4, stages=2))),
    ),
}
# The single pass in 16 bits, up to `SINGLE_RANK`: with descriptors, and for few rows with plain loads. With few rows a
# program has the full batch; with many, plain loads would cost more than the saved passes.
SINGLE_RANK = 64
SINGLE_DEFAULTS = (
    ProductPlan(128, 256, 64, warps=8, stages=3, descriptors=True),
    ProductPlan(128, 128, 64, warps=8, stages=4, descriptors=True),
    ProductPlan(64, 128, 64, warps=4, stages=4, descriptors=True),
    ProductPlan(64, 64, 128, warps=4, stages=4, descriptors=True),
    ProductPlan(64, 32, 128, warps=4, stages=4, descriptors=True),
    ProductPlan(16, 64, 128, warps=4, stages=4, descriptors=True),
    ProductPlan(16, 32, 128, warps=4, stages=4, descriptors=True),
    ProductPlan(64, 32, 64, warps=4, stages=3),
    ProductPlan(16, 32, 128, warps=4, stages=3),
)
PRODUCT_DEFAULTS = {2: ProductPlan(), 4: ProductPlan(64, 64, 32, warps=4, stages=2)}
# By element size: (maximum rank, blocks of the product for few rows, of the passes over the generated matrix).
GENERATED_DEFAULTS: dict[int, tuple[tuple[int, ProductPlan, ContractPlan], ...]] = {
    2: (
        (32, ProductPlan(64, 64, 32, warps=8, stages=2), ContractPlan(64, 64, 32, warps=4)),
        (64, ProductPlan(64, 64, 32, warps=8, stages=2), ContractPlan(64, 32, 32, warps=4)),
        (128, ProductPlan(64, 64, 32, warps=8, stages=2), ContractPlan(64, 32, 32, warps=8)),
    ),
    4: (
        (16, ProductPlan(64, 32, 16, warps=8, stages=2), ContractPlan(32, 32, 16, warps=8)),
        (64, ProductPlan(32, 32, 16, warps=4, stages=2), ContractPlan(16, 16, 16, warps=4)),
    ),
}


def default_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """The plan for an unmeasured problem: the one in the tables above with the shortest predicted time. A pure
    function."""
    if problem.operation in GENERATED:
        return _generated_plan(problem, facts)
    if problem.operation == SQUARES:
        return LaunchPlan("fused", product=PRODUCT_DEFAULTS[problem.itemsize])
    listed = default_candidates(problem, facts)
    if problem.operation in ("sliced_linear", "grouped_lowrank_linear"):
        # Not in the cost model: choose as for the low-rank operation.
        listed = [plan for plan in listed if plan.algorithm in ALGORITHMS_OF[problem.operation]] or listed
        low_rank = replace(problem, operation="lowrank_linear")
        return min(listed, key=lambda plan: seconds(low_rank, plan, facts))
    return min(listed, key=lambda plan: seconds(problem, plan, facts))


def default_candidates(problem: Problem, facts: DeviceFacts) -> list[LaunchPlan]:
    """The candidates of `default_plan` for a low-rank operation; the last is always the library's plan."""
    own = ALGORITHMS_OF[problem.operation]
    groups = 2 * facts.processors
    found = []
    for widest, listed in SKINNY_DEFAULTS[problem.itemsize]:
        if problem.r <= widest:
            few = problem.m <= FEW_ROWS
            found = [LaunchPlan(own[0], replace(s, groups=groups)) for s in listed if few or s.rows > 16]
            break
    if found and "single" in own and problem.itemsize == 2 and problem.r <= SINGLE_RANK:
        descriptors = descriptors_fit(problem, facts)
        found += [
            LaunchPlan("single", found[0].skinny, replace(product, programs=facts.processors))
            for product in SINGLE_DEFAULTS
            if product.descriptors == descriptors
            and (problem.m <= product.m <= FEW_ROWS or (descriptors and FEW_ROWS <= product.m < problem.m))
        ]
    if not facts.descriptors and problem.itemsize == 2 and problem.r > 32:
        # Before sm_90, tiles are copied through registers, which wider blocks of this rank would spill.
        found = [replace(plan, skinny=replace(plan.skinny, columns=32)) for plan in found]
    return [*(with_stages(plan, facts) for plan in found), LaunchPlan("library")]


def with_stages(plan: LaunchPlan, facts: DeviceFacts) -> LaunchPlan:
    """The plan with a number of stages that fits in shared memory: two for the 64 KiB of AMD GPUs."""
    if not facts.architecture.startswith("gfx"):
        return plan
    return replace(plan, skinny=replace(plan.skinny, stages=2), product=replace(plan.product, stages=2))


def descriptors_fit(problem: Problem, facts: DeviceFacts) -> bool:
    """Whether the GPU has tensor descriptors and the rows of x, W0 and y are 16-byte aligned."""
    return facts.descriptors and not (problem.k * problem.itemsize % 16 or problem.n * problem.itemsize % 16)


def _generated_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """Panels for training; for few rows, tiles generated inside the product."""
    for widest, product, contract in GENERATED_DEFAULTS[problem.itemsize]:
        if problem.r <= widest:
            panels = problem.operation == "generated_linear" and problem.m > FEW_ROWS
            contract = replace(contract, groups=2 * facts.processors, panel=PANEL_BYTES // problem.itemsize)
            return LaunchPlan("panel" if panels else "fused", product=product, contract=contract)
    return LaunchPlan("library")


# ---- tables


def user_tables() -> Path:
    """The directory of tables written by `genft tune`: in $GENFT_CACHE, or genft/ in the user's cache directory."""
    if cache := os.environ.get("GENFT_CACHE"):
        return Path(cache) / "plans"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genft" / "plans"


def rank_bucket(r: int) -> int:
    """The rank rounded up to a power of two, as kernels pad it; ranks in a bucket share an entry."""
    return max(16, 1 << (r - 1).bit_length())


def read_table(path: Path | Traversable) -> list[dict[str, Any]]:
    """The entries of a table; empty if there is no file. Raises ValueError, naming the path, if it is invalid."""
    if not path.is_file():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            Problem(*(entry[field] for field in ("operation", "m_max", "n", "k", "r", "itemsize")))
            LaunchPlan.parse(json.dumps(entry["plan"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is not a valid table of plans ({error}); delete or regenerate it") from error
    return entries


@lru_cache(maxsize=8)
def plan_table(architecture: str) -> tuple[dict[str, Any], ...]:
    """The measured entries for an architecture, the user's before the packaged ones: dicts with the fields of
    `Problem`, `m_max` (the largest m for which the entry is valid) and `plan`. Empty if there are no measurements."""
    name = f"{architecture}.json"
    packaged = resources.files("genft_kernels").joinpath("plans", name)
    return tuple(
        {**entry, "source": source}
        for source, path in (("user", user_tables() / name), ("package", packaged))
        for entry in read_table(path)
    )


def measured_entry(problem: Problem, facts: DeviceFacts) -> dict[str, Any] | None:
    """The measured entry for `problem`: same operation, n, k, element size and rank bucket, smallest m_max >= m; the
    user's (`source` "user") before a packaged one ("package"). None if there is no measurement."""
    fitting = [
        entry
        for entry in plan_table(facts.architecture)
        if (entry["operation"], entry["n"], entry["k"], entry["itemsize"])
        == (problem.operation, problem.n, problem.k, problem.itemsize)
        and rank_bucket(entry["r"]) == rank_bucket(problem.r)
        and problem.m <= entry["m_max"]
    ]
    return min(fitting, key=lambda entry: (entry["source"] != "user", int(entry["m_max"])), default=None)


@lru_cache(maxsize=4096)
def choose_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """The measured plan for `problem` (see `measured_entry`), else the default plan.

    Args:
        problem: the call, as matrices.
        facts: the device, from `device_facts`, or of a device that is not present.
    """
    entry = measured_entry(problem, facts)
    return default_plan(problem, facts) if entry is None else LaunchPlan.parse(json.dumps(entry["plan"]))


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a present device; those of "cpu" if it is not a GPU."""
    if device.type != "cuda":
        return DeviceFacts()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return DeviceFacts(architecture, properties.multi_processor_count)


def triton_can_run(device: torch.device) -> bool:
    """Whether Triton can run: on a GPU, or on the CPU with Triton's interpreter (TRITON_INTERPRET=1)."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@lru_cache(maxsize=4096)
def resolve(
    choice: LaunchPlan | str, operation: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device
) -> LaunchPlan:
    """The plan for a call whose `plan`/`backend` argument is `choice`: a plan, possibly printed, or a backend."""
    if choice not in BACKENDS:
        plan = choice if isinstance(choice, LaunchPlan) else LaunchPlan.parse(choice)
        if plan.algorithm not in (*LIBRARY, *ALGORITHMS_OF[operation]):
            listed = ("library", *ALGORITHMS_OF[operation])
            raise ValueError(f"plan: {operation} has no algorithm {plan.algorithm!r}, expected one of {listed}")
        if device.type == "meta":
            return LaunchPlan("reference")  # shapes and dtypes only, which do not depend on the plan
        if plan.algorithm not in LIBRARY:
            _require_triton(device, dtype, r)
        return plan
    usable = device.type == "cuda" and dtype in TRITON_DTYPES
    if choice == "reference" or (choice == "auto" and not usable) or device.type == "meta":
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
        raise ValueError(f"backend: Triton kernels support {TRITON_DTYPES}, got {dtype}; use backend='reference'")
    if r > MAX_TRITON_RANK:
        raise ValueError(f"plan: Triton algorithms support ranks up to {MAX_TRITON_RANK}, got {r}")
