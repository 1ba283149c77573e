"""How an operation is executed: a pure function from shapes, dtype and device facts to a `LaunchPlan`.

A plan is a value: print it, compare it, write it to a file, hand it back to an operation as `plan=`. Nothing is tuned
at import or on first call. A measured table (the user's own, written by `genft tune`, or the packaged one, written by
`python -m benchmarks.gpu`) comes first; where neither has the problem, `default_plan` follows a model of the card.

Algorithms:
- "library", or "reference": library products only (genft_kernels.reference), on any device. The second name is the
  backend's.
- "seeded" (low rank, slices): a pass writes the update, and the library's product is added to it in its own float32
  accumulator: one rounding, so that an update below the rounding of y is not lost.
- "single" (low rank): one persistent Triton product that makes t = x P on the way. With dropout on x, and with many
  rows on AMD's cards, it is "seeded".
- "thin" (an edit alone, features of a weight, mixed batches): one Triton pass for each stretch of skinny work.
- "fused": one Triton product; low rank and slices: its accumulator starts from the update; generated: the tiles of ΔW
  are made inside it; squared gradients: its tiles are reduced, not stored.
- "panel" (generated): W0 + ΔW for a bounded panel in a reused workspace, then the library's product, panel by panel.
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
)
GENERATED = ("generated_linear", "generated_features")
SQUARES = "squared_gradient_sums"
LIBRARY = ("library", "reference")
# Which algorithms an operation has beside the library's.
ALGORITHMS_OF: dict[str, tuple[str, ...]] = {
    "lowrank_linear": ("seeded", "single", "fused"),
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
MAX_TRITON_RANK = 128  # a kernel holds a factor's whole rank in one block
FEW_ROWS = 64  # up to here an operation is bound by reading W0, and every program makes its own t
PANEL_BYTES = 16 << 20


@dataclass(frozen=True)
class SkinnyPlan:
    """Blocks of a pass over a tall matrix [rows, columns].

    `groups`: as many programs as a pass should have. Where its result has fewer blocks, the contraction is split, and
    the float32 partial sums are added by a second launch (`splits`).
    """

    rows: int = 64
    columns: int = 128
    groups: int = 128
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class ProductPlan:
    """Blocks of a Triton product [m, k] @ [k, n]; `group` rows of tiles share columns in the L2.

    `programs`: how many programs of the persistent product (algorithm "single") are resident, one for each processor.
    `descriptors`: it reads and writes through tensor descriptors (bulk copies of sm_90 and later); operands whose rows
    do not begin at multiples of 16 bytes are read by plain loads all the same.
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
    """Blocks of the passes over a generated matrix [n, k] (`depth` of the product dYᵀ x), about `groups` programs.

    `atomic`: sum gradients by atomic additions instead of slabs of partial sums: less memory, another rounding in every
    run. `panel`: elements of the workspace of the panel algorithm.
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
                if not isinstance(value, bool) and value < 1:
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

    @property
    def descriptors(self) -> bool:
        """Whether the card copies tiles by tensor descriptors, into the shared memory that their plans are made for
        (sm_120 has less than half of it)."""
        return self.architecture in ("sm_90", "sm_100", "sm_103")

    @property
    def flags(self) -> bool:
        """Whether programs may wait for each other. Before AMD's barrier, stores of other waves may still be on their
        way."""
        return not self.architecture.startswith("gfx")


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


# ---- how a launch is cut into programs: pure functions that the launchers and the model of the card share


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def splits(programs: int, blocks: int, steps: int, result: int, moved: int) -> int:
    """Into how many parts a contraction of `steps` blocks is split, for a result of `blocks` blocks: as many as make
    `programs` programs, while the float32 partial sums (`result` elements each, written and read) stay below the
    `moved` bytes of the pass itself."""
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
    """Splits of O [rows, columns] = A B along the depth, in the product whose programs make their own t."""
    if rows > plan.m:
        return 1
    moved = (rows * depth + depth * columns) * itemsize
    return splits(plan.programs, _blocks(columns, plan.n), _blocks(depth, plan.k), rows * columns, moved)


def contraction_bytes(n: int, k: int, depth: int, itemsize: int) -> int:
    """What the partial sums of a contraction over a generated matrix [n, k] may move: what the pass itself cannot but
    move (G = Lᵀ R of `depth` rows made and read, or its tiles made anew, which takes longer), and never more than a
    second workspace holds, written and read."""
    return min(itemsize * (2 * n * k + depth * (n + k)), 2 * PANEL_BYTES)


def contraction_grid(plan: ContractPlan, n: int, k: int, r: int, moved: int) -> tuple[int, int]:
    """(row tiles, column tiles) of a generated matrix [n, k] that one program of the contraction owns: about
    `plan.groups` programs, as square as the tiles allow, which makes the partial sums smallest; fewer where those would
    move more than `moved` bytes."""
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
    """Stretches of an index of `length` whose panels, `other` wide, hold at most `elements` (but at least 64 of it)."""
    size = max(64, elements // other // 64 * 64)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


# ---- the model of the card, by which plans are chosen where nothing was measured


@dataclass(frozen=True)
class Pass:
    """One launch, or one library product: how many programs it has (0: the library's own business), the bytes that it
    cannot but move, those of its partial sums (written and read), and its multiply-adds, times two."""

    name: str
    programs: int
    bytes: int
    partials: int = 0
    operations: int = 0
    efficiency: float = 1.0  # of a product: against the library's; of a pass: against a large copy


# 16-bit products of a library, operations per second; bytes per second of a copy, read plus written. Of sm_90 they were
# measured on an H200 by others, the rest are from data sheets. A table that was measured comes before all of this.
SPEEDS = {
    "sm_80": (250e12, 1.7e12),
    "sm_90": (790e12, 4.3e12),
    "sm_100": (1600e12, 7.0e12),
    "gfx942": (600e12, 4.0e12),
}
LAUNCH_SECONDS = 2e-6
# Triton's products against the library's on Hopper (triton issues 5461 and 5726): with descriptors, with plain loads.
WITH_DESCRIPTORS, WITH_LOADS = 0.94, 0.76
SKINNY_LIBRARY = 0.6  # assumed: library products with a side of r reach this part of a copy's bandwidth


def passes(problem: Problem, plan: LaunchPlan) -> tuple[Pass, ...]:
    """What a low-rank operation launches under a plan: the forward pass, and with more than `FEW_ROWS` rows (training)
    the backward pass too."""
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
            read = 0 if fused else m * columns * size // 2  # half of the seed's reading hides behind the product
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
    reuse = min(1.0, (blocks.m * blocks.n / (128 * 256)) ** 0.25)  # a smaller tile reads its operands more often
    makers = 1 if rows > blocks.m else _blocks(columns, blocks.n)  # programs that make a row block's t
    return Pass(
        "single",
        programs,
        moved,
        (parts > 1) * parts * rows * (columns + r) * 8,
        2 * rows * depth * (columns + makers * r),
        (WITH_DESCRIPTORS if blocks.descriptors else WITH_LOADS) * rounds * reuse,
    )


def seconds(problem: Problem, plan: LaunchPlan, facts: DeviceFacts) -> float:
    """What the model expects of a plan: each pass takes the longer of its arithmetic and its bytes, longer still where
    it has fewer programs than the card has processors."""
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

# By element size: (widest rank served, skinny blocks to choose from). Past the last rank a "skinny" product is an
# ordinary one, and without tensor cores (fp32) that comes earlier; there the plan is the library's. A test compiles
# every entry of these tables for four targets and refuses spills.
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
# program has the whole batch; with many, plain loads would lose more to the library than the passes that they save.
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
# By element size: (widest rank served, blocks of the product on few rows, of the passes over the generated matrix).
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
    """The plan of an unmeasured problem: of the plans in the tables above, the one that the model expects to be
    fastest. A pure function."""
    if problem.operation in GENERATED:
        return _generated_plan(problem, facts)
    if problem.operation == SQUARES:
        return LaunchPlan("fused", product=PRODUCT_DEFAULTS[problem.itemsize])
    listed = default_candidates(problem, facts)
    if problem.operation in ("sliced_linear", "grouped_lowrank_linear"):
        # Passes of their own: what fills the card for the low-rank operation fills it for them.
        listed = [plan for plan in listed if plan.algorithm in ALGORITHMS_OF[problem.operation]] or listed
        low_rank = replace(problem, operation="lowrank_linear")
        return min(listed, key=lambda plan: seconds(low_rank, plan, facts))
    return min(listed, key=lambda plan: seconds(problem, plan, facts))


def default_candidates(problem: Problem, facts: DeviceFacts) -> list[LaunchPlan]:
    """What `default_plan` chooses from for a low-rank operation; the library's plan is always the last."""
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
        # Cards before sm_90 copy tiles by registers, which a wider block of this rank would spill.
        found = [replace(plan, skinny=replace(plan.skinny, columns=32)) for plan in found]
    return [*(with_stages(plan, facts) for plan in found), LaunchPlan("library")]


def with_stages(plan: LaunchPlan, facts: DeviceFacts) -> LaunchPlan:
    """The plan with stages that the card has room for: AMD's have 64 KiB of shared memory, which is two."""
    if not facts.architecture.startswith("gfx"):
        return plan
    return replace(plan, skinny=replace(plan.skinny, stages=2), product=replace(plan.product, stages=2))


def descriptors_fit(problem: Problem, facts: DeviceFacts) -> bool:
    """Whether rows of x, W0 and y begin at multiples of 16 bytes on a card that has tensor descriptors."""
    return facts.descriptors and not (problem.k * problem.itemsize % 16 or problem.n * problem.itemsize % 16)


def _generated_plan(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
    """Panels for training; tiles made inside the product where few rows would not pay for a panel."""
    for widest, product, contract in GENERATED_DEFAULTS[problem.itemsize]:
        if problem.r <= widest:
            panels = problem.operation == "generated_linear" and problem.m > FEW_ROWS
            contract = replace(contract, groups=2 * facts.processors, panel=PANEL_BYTES // problem.itemsize)
            return LaunchPlan("panel" if panels else "fused", product=product, contract=contract)
    return LaunchPlan("library")


# ---- tables


def user_tables() -> Path:
    """Where `genft tune` writes tables: GENFT_CACHE, else genft/ in the user's cache directory."""
    if cache := os.environ.get("GENFT_CACHE"):
        return Path(cache) / "plans"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genft" / "plans"


def rank_bucket(r: int) -> int:
    """Ranks that share an entry: kernels pad a rank to a power of two."""
    return max(16, 1 << (r - 1).bit_length())


def read_table(path: Path | Traversable) -> list[dict[str, Any]]:
    """The entries of a table, none where there is no file. Raises ValueError, naming the path, if it is no table."""
    if not path.is_file():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            Problem(*(entry[field] for field in ("operation", "m_max", "n", "k", "r", "itemsize")))
            LaunchPlan.parse(json.dumps(entry["plan"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is no table of plans ({error}); delete it, or write it anew") from error
    return entries


@lru_cache(maxsize=8)
def plan_table(architecture: str) -> tuple[dict[str, Any], ...]:
    """The measured entries for an architecture, the user's own before the packaged ones: dicts with the fields of
    `Problem`, `m_max` for the largest m that the entry speaks for, and `plan`. Empty where nothing was measured."""
    name = f"{architecture}.json"
    packaged = resources.files("genft_kernels").joinpath("plans", name)
    return tuple(
        {**entry, "source": source}
        for source, path in (("user", user_tables() / name), ("package", packaged))
        for entry in read_table(path)
    )


def measured_entry(problem: Problem, facts: DeviceFacts) -> dict[str, Any] | None:
    """The measured entry that fits `problem`: same operation, n, k, element size and rank bucket, smallest m_max that
    covers m; the user's own (`source` "user") before a packaged one ("package"). None where nothing was measured."""
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
    """The measured plan that fits `problem` (see `measured_entry`), else the default plan.

    Args:
        problem: the call, as matrices.
        facts: the device, from `device_facts`, or of one that is not there.
    """
    entry = measured_entry(problem, facts)
    return default_plan(problem, facts) if entry is None else LaunchPlan.parse(json.dumps(entry["plan"]))


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
    choice: LaunchPlan | str, operation: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device
) -> LaunchPlan:
    """The plan for a call whose `plan`/`backend` argument is `choice`: a plan, maybe a printed one, or a backend."""
    if choice not in BACKENDS:
        plan = choice if isinstance(choice, LaunchPlan) else LaunchPlan.parse(choice)
        if plan.algorithm not in (*LIBRARY, *ALGORITHMS_OF[operation]):
            listed = ("library", *ALGORITHMS_OF[operation])
            raise ValueError(f"plan: {operation} has no algorithm {plan.algorithm!r}, expected one of {listed}")
        if plan.algorithm not in LIBRARY:
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
