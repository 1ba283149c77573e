"""Tuning: which plans are worth measuring, that the fastest right one wins, and the tables that keep it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

import genft_kernels
from genft_kernels import DeviceFacts, LaunchPlan, Problem, ProductPlan, SkinnyPlan, choose_plan, tuning
from genft_kernels import plan as plans
from genft_kernels.tuning import candidates, measure, merged, table_entry, write_table

H200, A100 = DeviceFacts("sm_90", 132), DeviceFacts("sm_80", 108)

# ---- candidates


@pytest.mark.parametrize("facts", [H200, A100], ids=lambda facts: facts.architecture)
@pytest.mark.parametrize("operation", plans.OPERATIONS)
def test_candidates_are_plans_without_doubles(operation, facts):
    for m, r, itemsize in itertools.product((1, 64, 8192), (16, 100), (2, 4)):
        problem = Problem(operation, m, 4096, 14336, r, itemsize)
        found = candidates(problem, facts)
        assert found == candidates(problem, facts)
        assert found[0] == plans.default_plan(problem, facts)
        assert LaunchPlan("library") in found[:2]
        assert len(set(found)) == len(found) > 5
        assert {plan.algorithm for plan in found} <= {"library", *plans.ALGORITHMS_OF[operation]}
        assert all(LaunchPlan.parse(str(plan)) == plan for plan in found)


def test_every_algorithm_is_measured_early():
    """The time for compiling may end at any plan."""
    for operation, m in (("lowrank_linear", 8192), ("input_edit_linear", 1), ("generated_linear", 8)):
        early = candidates(Problem(operation, m, 4096, 4096, 16, 2), H200)[:5]
        assert {plan.algorithm for plan in early} == {"library", *plans.ALGORITHMS_OF[operation]}


@pytest.mark.parametrize("m", [1, 64, 2048])
def test_few_rows_do_not_bound_the_programs(m):
    problem = Problem("lowrank_linear", m, 4096, 4096, 64, 2)
    for algorithm in ("seeded", "single"):
        listed = [plan for plan in candidates(problem, H200) if plan.algorithm == algorithm]
        assert any(all(one.programs >= 128 for one in plans.passes(problem, plan) if one.programs) for plan in listed)


def test_single_crosses_blocks_groups_and_descriptors():
    problem = Problem("lowrank_linear", 8192, 4096, 4096, 16, 2)
    found = {plan.product for plan in candidates(problem, H200) if plan.algorithm == "single"}
    crossed = itertools.product(found, tuning.GROUPS, (True, False))
    assert found == {replace(product, group=group, descriptors=d) for product, group, d in crossed}
    assert len(found) >= 6 * len(plans.SINGLE_DEFAULTS) // 2
    for other, facts in ((problem, A100), (replace(problem, k=4100), H200)):
        assert not any(plan.product.descriptors for plan in candidates(other, facts))


def test_no_candidate_has_more_stages_than_the_card_has_room_for():
    found = candidates(Problem("lowrank_linear", 8192, 4096, 4096, 16, 2), DeviceFacts("gfx942", 304))
    assert {stages for plan in found[2:] for stages in (plan.skinny.stages, plan.product.stages)} == {2}


def test_contract_blocks_are_crossed_with_panel_sizes():
    found = [plan.contract for plan in candidates(Problem("generated_linear", 8192, 4096, 4096, 37, 2), H200)]
    crossed = {((c.n, c.k, c.depth, c.warps, c.stages), c.panel * 2 >> 20) for c in found}
    assert crossed >= set(itertools.product(tuning.CONTRACTS, (2, 4, 8, 16)))
    small = candidates(Problem("generated_linear", 8192, 768, 768, 16, 2), H200)
    assert {plan.contract.panel * 2 >> 20 for plan in small[2:]} == {2}, "the whole of it is one panel of 2 MiB"


# ---- measuring

PROBLEM = Problem("lowrank_linear", 70, 32, 32, 4, 4)  # rows enough for a backward pass
BLOCKS = {"skinny": SkinnyPlan(64, 32, 1), "product": ProductPlan(64, 32, 32)}
PLANS = [LaunchPlan("seeded", **BLOCKS), LaunchPlan("library"), LaunchPlan("fused", **BLOCKS)]


class Priced:
    """A clock: what a step takes is told by the algorithm that it ran; None is the layer's own product."""

    def __init__(self, monkeypatch, prices, wrong=(), broken=()):
        self.prices, self.ran = prices, None
        right = genft_kernels.lowrank_linear

        def lowrank_linear(*args, plan, **kwargs):
            self.ran = plan.algorithm
            if plan.algorithm in broken:
                raise RuntimeError("out of resource: shared memory")
            return right(*args, plan=plan, **kwargs) * (1.01 if plan.algorithm in wrong else 1.0)

        monkeypatch.setattr(genft_kernels, "lowrank_linear", lowrank_linear)

    def run(self, steps, index):
        times = []
        for step in steps:
            self.ran = None
            step(index)
            times.append(self.prices[self.ran])
        return times


def tuned(clock, device, plans=PLANS):
    return measure(PROBLEM, torch.float32, device, plans, rounds=2, clock=clock)


PRICES = {None: 2.0, "seeded": 3.0, "fused": 4.0, "library": 5.0}


@pytest.mark.parametrize(
    ("changed", "wrong", "broken", "best"),
    [
        ({}, (), (), "seeded"),
        ({}, ("seeded",), (), "fused"),
        ({}, ("seeded",), ("fused",), "library"),
        ({"library": 2.5}, (), (), "library"),
    ],
)
def test_the_fastest_right_plan_wins(monkeypatch, device, changed, wrong, broken, best):
    prices = {**PRICES, **changed}
    found = tuned(Priced(monkeypatch, prices, wrong, broken), device)
    assert (found.best.plan.algorithm, found.best.ms, found.best.ratio) == (best, prices[best], prices[best] / 2.0)
    assert (found.default.ms, found.library.ms, found.floor_ms) == (prices["seeded"], prices["library"], 2.0)
    assert [plan.algorithm for plan in found.red] == list(wrong)
    assert [plan.algorithm for plan in found.failed] == list(broken)
    assert found.measured == len(PLANS) - len(broken)
    assert found.families == {name: prices[name] for name in ("seeded", "fused", "library") if name not in broken}


def test_a_library_that_fails_is_not_passed_over(monkeypatch, device):
    with pytest.raises(RuntimeError, match="out of resource"):
        tuned(Priced(monkeypatch, PRICES, broken=("library",)), device)


def test_past_its_time_nothing_but_the_default_and_the_library_is_compiled(monkeypatch, device):
    clock = Priced(monkeypatch, PRICES)
    found = measure(PROBLEM, torch.float32, device, PLANS, rounds=2, clock=clock, until=0.0)
    assert set(found.families) == {"seeded", "library"}


def test_problems_share_the_budget(monkeypatch, device):
    monkeypatch.setattr(tuning, "candidates", lambda problem, facts: [LaunchPlan("library")])
    problems = [PROBLEM, replace(PROBLEM, m=5), replace(PROBLEM, m=100)]
    clock = Priced(monkeypatch, PRICES)
    found = list(tuning.tune(problems, torch.float32, device, budget=1000.0, clock=clock))
    assert [one.problem for one in found] == problems
    assert len(list(tuning.tune(problems, torch.float32, device, budget=0.0, clock=clock))) == 1


# ---- tables


def entry(m, plan, **changed):
    return table_entry(replace(PROBLEM, m=m, **changed), plan, 1.0, {plan.algorithm: 1.0})


def test_what_was_written_is_what_runs(own_tables):
    """Without a cache in the way: a table that is written while plans are in use is followed from then on."""
    facts = DeviceFacts("sm_90", 132)
    before = choose_plan(PROBLEM, facts)
    path = own_tables / "sm_90.json"
    write_table(path, [entry(64, PLANS[0]), entry(2048, PLANS[2])], device="a card")
    assert before not in (PLANS[0], PLANS[2])
    for m, expected in ((1, PLANS[0]), (64, PLANS[0]), (65, PLANS[2]), (10**6, PLANS[2])):
        assert choose_plan(replace(PROBLEM, m=m), facts) == expected
    assert choose_plan(replace(PROBLEM, r=16), facts) == PLANS[2], "ranks that pad to the same share an entry"
    # A later measurement takes the place of an earlier one, and a larger batch speaks for the largest.
    write_table(path, [entry(64, PLANS[1], r=5), entry(4096, PLANS[1])], device="a card")
    written = json.loads(path.read_text())
    assert written["device"] == "a card"
    assert [e["measured"]["m"] for e in written["entries"]] == [64, 2048, 4096]
    for m, expected in ((64, PLANS[1]), (2048, PLANS[2]), (4096, PLANS[1]), (10**6, PLANS[1])):
        assert choose_plan(replace(PROBLEM, m=m), facts) == expected
    assert [p.name for p in own_tables.iterdir()] == ["sm_90.json"], "nothing is left beside it"


def test_other_problems_keep_their_entries():
    others = [{"n": 64}, {"k": 64}, {"r": 32}, {"itemsize": 2}, {"operation": "input_edit_linear"}]
    table = merged([entry(64, PLANS[0])], *([entry(64, PLANS[0], **other)] for other in others))
    assert len(table) == 1 + len(others)
    assert {e["m_max"] for e in table} == {2**31}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"entries": [{}]}', '{"entries": [{"operation": "lowrank_linear", "plan": {}}]}']
)
def test_a_broken_table_is_named(own_tables, text):
    path = own_tables / "sm_90.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for use in (lambda: choose_plan(PROBLEM, H200), lambda: write_table(path, [entry(64, PLANS[0])])):
        with pytest.raises(ValueError, match=str(path)):
            use()
    assert path.read_text() == text
