"""Plans are values: chosen by a pure function, printed, read back, overridden, never written by hand elsewhere."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

import genft_kernels as gk
from genft_kernels import DeviceFacts, LaunchPlan, Problem, ProductPlan, SkinnyPlan, choose_plan
from genft_kernels import plan as plans
from genft_kernels.plan import resolve

H200 = DeviceFacts("sm_90", 132)


@pytest.fixture(autouse=True)
def _fresh():
    for cached in (plans.choose_plan, plans.plan_table, plans.resolve):
        cached.cache_clear()
    yield
    for cached in (plans.choose_plan, plans.plan_table, plans.resolve):
        cached.cache_clear()


def test_a_printed_plan_reads_back():
    plan = LaunchPlan("fused", SkinnyPlan(rows=32, groups=7), ProductPlan(m=256, stages=4))
    assert LaunchPlan.parse(str(plan)) == plan


@pytest.mark.parametrize("text", ["", "fastest", "{}", '{"algorithm":"thin"}', "[1]"])
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="plan:"):
        LaunchPlan.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LaunchPlan("quick"),
        lambda: LaunchPlan("thin", SkinnyPlan(rows=24)),
        lambda: LaunchPlan("thin", SkinnyPlan(columns=8)),
        lambda: LaunchPlan("fused", SkinnyPlan(), ProductPlan(m=100)),
        lambda: LaunchPlan("fused", SkinnyPlan(groups=0)),
        lambda: Problem("matmul", 1, 1, 1, 1, 2),
    ],
)
def test_bad_fields_are_refused(make):
    with pytest.raises(ValueError, match=r"plan:|operation:"):
        make()


# The weights of the goals (docs/benchmarks.md) and batches from one token to two long sequences.
WEIGHTS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (768, 768), (3072, 768), (768, 3072)]
ROWS = (1, 8, 64, 512, 2048, 8192, 12608, 16384)


@pytest.mark.parametrize("facts", [H200, DeviceFacts("sm_80", 108)], ids=lambda facts: facts.architecture)
@pytest.mark.parametrize("operation", ["lowrank_linear", "input_edit_linear", "input_edit", "weight_features"])
def test_default_plans_fill_the_card(operation, facts):
    """A launch has as many programs as the card has processors unless its work cannot be cut further: tile by tile for
    the result, block by block for the contraction, and no partial sums beyond the bytes of the pass."""
    for (n, k), m, r in itertools.product(WEIGHTS, ROWS, (8, 16, 64)):
        problem = Problem(operation, m, n, k, r, 2)
        plan = choose_plan(problem, facts)
        for one in plans.passes(problem, plan):
            where = (problem, plan.algorithm, one)
            assert one.partials <= one.bytes, where
            if one.programs and one.programs < facts.processors:
                # Library products are no business of the plan. Else the smallest blocks are in use, or the model finds
                # that larger ones with fewer programs take less time.
                smaller = [p for p in plans.default_candidates(problem, facts) if p.algorithm == plan.algorithm]
                fastest = min(plans.seconds(problem, p, facts) for p in smaller)
                assert plans.seconds(problem, plan, facts) <= fastest, where


def test_the_headline_shape_has_large_blocks_and_many_programs():
    """8192 × 4096 × 4096 once had 16-row blocks, and 2048 rows of rank 64 32 programs."""
    plan = choose_plan(Problem("lowrank_linear", 8192, 4096, 4096, 16, 2), H200)
    assert (plan.algorithm, plan.product.m, plan.product.n) == ("single", 128, 256)
    assert plan.product.descriptors
    assert plan.skinny.rows * plan.skinny.columns >= 64 * 64
    for problem in (
        Problem("lowrank_linear", 2048, 4096, 4096, 64, 2),
        Problem("lowrank_linear", 1, 4096, 4096, 16, 2),
    ):
        assert all(one.programs >= 128 for one in plans.passes(problem, choose_plan(problem, H200)) if one.programs)


@pytest.mark.parametrize("facts", [H200, DeviceFacts("sm_80", 108)], ids=lambda facts: facts.architecture)
@pytest.mark.parametrize("operation", plans.OPERATIONS)
def test_no_rows_have_a_plan(operation, facts):
    for itemsize in (2, 4):
        assert plans.default_plan(Problem(operation, 0, 4096, 4096, 16, itemsize), facts)


def test_the_library_runs_where_the_model_says_so():
    for m, n, k, r in itertools.product((1, 512, 8192), (768, 4096), (768, 4096), (16, 64)):
        problem = Problem("lowrank_linear", m, n, k, r, 2)
        chosen = plans.seconds(problem, choose_plan(problem, H200), H200)
        assert chosen <= plans.seconds(problem, LaunchPlan("library"), H200)
    # Without tensor cores a wide factor belongs to the library.
    assert choose_plan(Problem("lowrank_linear", 8192, 4096, 4096, 64, 4), H200).algorithm == "library"


def test_descriptors_want_aligned_rows_and_a_card_that_has_them():
    problem = Problem("lowrank_linear", 8192, 4096, 4096, 16, 2)
    others = ("sm_80", "sm_120", "gfx942")  # sm_120 has them, and too little shared memory for these blocks
    for other, facts in ((replace(problem, k=4100), H200), *((problem, DeviceFacts(name, 108)) for name in others)):
        assert not any(plan.product.descriptors for plan in plans.default_candidates(other, facts))
    assert any(plan.product.descriptors for plan in plans.default_candidates(problem, DeviceFacts("sm_100", 148)))


@pytest.mark.parametrize(
    ("m", "r", "expected"), [(1, 16, "fused"), (64, 16, "fused"), (65, 16, "panel"), (8192, 37, "panel")]
)
def test_generated_tiles_are_made_inside_the_product_for_few_rows(m, r, expected):
    plan = choose_plan(Problem("generated_linear", m, 4096, 4096, r, 2), H200)
    assert plan.algorithm == expected
    assert plan.contract.panel * 2 == 16 << 20


@pytest.mark.parametrize("r", [8, 16, 37, 64])
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_sums_over_a_generated_matrix_move_less_than_its_passes(n, k, r):
    m = 8192
    contract = choose_plan(Problem("generated_linear", m, n, k, r, 2), H200).contract
    for rows in plans.stretches(n, k, contract.panel):
        height = rows.stop - rows.start
        moved = plans.contraction_bytes(height, k, m, 2)
        per_n, per_k = plans.contraction_grid(contract, height, k, r, moved)
        tiles_n, tiles_k = -(-height // contract.n), -(-k // contract.k)
        groups_n, groups_k = -(-tiles_n // per_n), -(-tiles_k // per_k)
        assert (groups_k * height + groups_n * k) * r * 8 <= moved or groups_n * groups_k == 1
        if r <= 37:  # beyond, the workspace of the sums has no room for as many
            assert groups_n * groups_k >= min(H200.processors, tiles_n * tiles_k), (groups_n, groups_k)


@pytest.mark.parametrize("operation", plans.LOW_RANK + plans.GENERATED)
def test_past_the_widest_rank_the_library_runs(operation):
    assert choose_plan(Problem(operation, 64, 64, 64, 129, 2), H200).algorithm == "library"


def test_a_measured_table_wins(monkeypatch, tmp_path):
    measured = LaunchPlan("fused", SkinnyPlan(rows=128), ProductPlan(n=256))
    smaller = replace(measured, algorithm="seeded")
    common = {"operation": "lowrank_linear", "n": 4096, "k": 4096, "r": 16, "itemsize": 2}
    entries = [
        {**common, "m_max": 65536, "plan": json.loads(str(measured))},
        {**common, "m_max": 4096, "plan": json.loads(str(smaller))},
    ]
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "sm_90.json").write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(plans.resources, "files", lambda package: tmp_path)
    problem = Problem("lowrank_linear", 8192, 4096, 4096, 16, 2)
    assert choose_plan(problem, H200) == measured
    assert choose_plan(replace(problem, m=2048), H200) == smaller
    assert choose_plan(replace(problem, r=12), H200) == measured, "ranks that pad to 16 share an entry"
    for other in (replace(problem, n=1024), replace(problem, itemsize=4), replace(problem, m=10**6)):
        assert choose_plan(other, H200) == plans.default_plan(other, H200)
    assert choose_plan(problem, DeviceFacts("sm_80", 108)).algorithm == "seeded"


def test_the_users_own_table_comes_before_the_packaged_one(monkeypatch, tmp_path):
    entry = {"operation": "lowrank_linear", "n": 4096, "k": 4096, "r": 16, "itemsize": 2, "m_max": 2**31}
    for folder, algorithm in (("package", "fused"), ("own", "seeded")):
        (tmp_path / folder / "plans").mkdir(parents=True)
        text = {"entries": [{**entry, "plan": json.loads(str(LaunchPlan(algorithm)))}]}
        (tmp_path / folder / "plans" / "sm_90.json").write_text(json.dumps(text))
    monkeypatch.setattr(plans.resources, "files", lambda package: tmp_path / "package")
    problem = Problem("lowrank_linear", 8192, 4096, 4096, 16, 2)
    monkeypatch.setenv("GENFT_CACHE", str(tmp_path / "nowhere"))
    assert choose_plan(problem, H200).algorithm == "fused"
    monkeypatch.setenv("GENFT_CACHE", str(tmp_path / "own"))
    for cached in (plans.choose_plan, plans.plan_table):
        cached.cache_clear()
    assert choose_plan(problem, H200).algorithm == "seeded"


def test_committed_tables_parse():
    folder = plans.resources.files("genft_kernels").joinpath("plans")
    for path in folder.iterdir() if folder.is_dir() else ():
        for entry in json.loads(path.read_text())["entries"]:
            LaunchPlan.parse(json.dumps(entry["plan"]))


def test_auto_on_a_cpu_is_the_reference():
    chosen = plans.resolve("auto", "lowrank_linear", 4, 4, 4, 2, torch.float32, torch.device("cpu"))
    assert chosen == LaunchPlan("reference")
    assert gk.device_facts(torch.device("cpu")) == DeviceFacts("cpu", 1)


def test_the_wider_rank_of_generated_features_decides(device, monkeypatch):
    h, b, a = torch.randn(9, 2, device=device), torch.randn(7, 2, device=device), torch.randn(200, 9, device=device)
    with pytest.raises(ValueError, match="ranks up to 128, got 200"):
        gk.generated_features(h, b, a, plan=LaunchPlan("fused"))
    seen = []

    def choose(problem: Problem, facts: DeviceFacts) -> LaunchPlan:
        seen.append(choose_plan(problem, facts))
        return seen[-1]

    monkeypatch.setattr("genft_kernels.plan.choose_plan", choose)
    resolve.cache_clear()
    torch.testing.assert_close(gk.generated_features(h, b, a, backend="triton"), b @ h.t() @ a.t())
    resolve.cache_clear()
    assert [plan.algorithm for plan in seen] == ["library"]
