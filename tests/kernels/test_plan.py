"""Plans are values: chosen by a pure function, printed, read back, overridden, never written by hand elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import genft_kernels as gk
from genft_kernels import DeviceFacts, LaunchPlan, Problem, ProductPlan, SkinnyPlan, choose_plan
from genft_kernels import plan as plans

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


@pytest.mark.parametrize("m", [1, 16, 300, 8192, 10**6])
@pytest.mark.parametrize("r", [1, 16, 17, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_plan_bounds_the_slabs(m, r, itemsize):
    plan = choose_plan(Problem("lowrank_linear", m, 4096, 4096, r, itemsize), H200)
    if itemsize == 4 and r > 32:
        assert plan.algorithm == "reference", "without tensor cores a wide factor belongs to the library"
        return
    assert plan.algorithm == "thin"
    assert plan.skinny.groups == max(1, min(H200.processors, -(-m // plan.skinny.rows)))


@pytest.mark.parametrize("operation", plans.LOW_RANK + plans.GENERATED)
def test_past_the_widest_rank_the_library_runs(operation):
    assert choose_plan(Problem(operation, 64, 64, 64, 129, 2), H200).algorithm == "reference"


def test_a_measured_table_wins(monkeypatch, tmp_path):
    measured = LaunchPlan("fused", SkinnyPlan(rows=128), ProductPlan(n=256))
    smaller = replace(measured, algorithm="thin")
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
    assert choose_plan(problem, DeviceFacts("sm_80", 108)).algorithm == "thin"


def test_committed_tables_parse():
    folder = plans.resources.files("genft_kernels").joinpath("plans")
    for path in folder.iterdir() if folder.is_dir() else ():
        for entry in json.loads(path.read_text())["entries"]:
            LaunchPlan.parse(json.dumps(entry["plan"]))


def test_auto_on_a_cpu_is_the_reference():
    chosen = plans.resolve("auto", "lowrank_linear", 4, 4, 4, 2, torch.float32, torch.device("cpu"))
    assert chosen == LaunchPlan("reference")
    assert gk.device_facts(torch.device("cpu")) == DeviceFacts("cpu", 1)
