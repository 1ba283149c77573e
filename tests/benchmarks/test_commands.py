"""The commands: a run with a budget, result files, reports, comparison; and that they work before a GPU is at hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, memcheck, runner
from benchmarks.measure import results
from benchmarks.measure.part import Part, add, line
from benchmarks.measure.shapes import Case, Shape
from benchmarks.report import goals, sections
from benchmarks.report.__main__ import main as report
from benchmarks.subjects import models
from benchmarks.suites import mixed, model_limits, model_step, parts, profiles, sweep
from benchmarks.suites.comparison import Settings
from genft_kernels import plan as plans
from genft_kernels.gate import EPSILON
from genft_kernels.plan import DeviceFacts, LaunchPlan, Problem

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def record(contender, ratio, kind="genft", method="lora", **more):
    stats = {"median": ratio, "q1": 0.99 * ratio, "q3": 1.01 * ratio, "rounds": 9}
    own = {
        "suite": "layer",
        "mode": "step",
        "contender": contender,
        "kind": kind,
        "method": method,
        "form": "lowrank",
        "m": 2048,
        "n": [1024],
        "k": 1024,
        "r": 16,
        "dtype": "fp32",
        "ms": {**stats},
        "ratio": {**stats},
        "floor_operations": 10**9,
        "floor_bytes": 10**7,
        "tflops": 0.1,
        "percent_of_product": 80.0,
        "memory": {"saved": 2048 * 16 * 4, "peak": 2**24, "parameters": 8, "gradients": 8, "optimiser": 16},
    }
    return {**own, **more}


def result(records, date="2026-01-02T03:04:05Z", device_type="cpu"):
    device = {"type": device_type, "name": "Test <Device>", "threads": 2, "driver": "1", "processors": 4}
    run = {"date": date, "commit": "abc", "command": "python -m benchmarks.cpu", "device": device, "tiny": False}
    run |= dict.fromkeys(("torch", "triton", "peft", "python", "cuda"), "1")
    ceilings = {"copy_gb_per_s": 10.0, "product_side": 64, "product_tflops": {"float32": 0.2}}
    gate = {"listed": 2, "checks": 2, "failed": []}
    return {"schema": 1, "run": run, "ceilings": ceilings, "gate": gate, "records": records, "sweep": []}


LAYER = [
    record("frozen", 1.0, "floor", "none", form="frozen"),
    record("peft-lora", 2.0, "peer"),
    record("genft-lora", 1.05),
    record("genft-wegeft", 1.2, method="wegeft"),
    record("absent", 1.0, "peer", withheld="not here") | {"ms": None},
]
del LAYER[-1]["ms"], LAYER[-1]["ratio"]


# ---- goals and reports


def test_goals_are_read_from_records():
    by_id = {goal.id: findings for goal, findings in goals.table(LAYER, "cpu")}
    found = {finding.what: finding for finding in by_id["P8"]}
    assert found["genft-lora against frozen"].met
    assert found["genft-lora against peft-lora"].value == pytest.approx(0.525)
    assert not found["genft-wegeft against frozen"].met
    # LoRA is given its factors; WeGeFT may keep those that it makes, here as large as t.
    assert {finding.what.split(",")[0]: finding.value for finding in by_id["P5"]} == {
        "genft-lora": 1.0,
        "genft-wegeft": 0.5,
    }
    assert by_id["P1"] == []
    assert [goal.id for goal in goals.GOALS] == [*(f"P{i}" for i in range(1, 12)), "N1"]


def test_gpu_goals_name_the_worst_shape():
    big = {"dtype": "bf16", "m": 8192, "k": 4096}
    records = [record("genft-lora", 1.05, n=[4096], **big), record("genft-lora", 1.09, n=[14336], **big)]
    records += [record("genft-lora", 1.14, n=[14336], **big) | {"r": 64}]
    found = {finding.what: finding for goal, f in goals.table(records, "gpu") if goal.id == "P1" for finding in f}
    assert found["genft-lora, N, K ≥ 4096 and M ≥ 8192"].value == 1.09
    assert "14336" in found["genft-lora, N, K ≥ 4096 and M ≥ 8192"].note
    assert found["genft-lora, r = 64 over r = 16"].value == pytest.approx(0.05)


def _findings(goal_id, records, device_type):
    (found,) = (found for goal, found in goals.table(records, device_type) if goal.id == goal_id)
    return {finding.what: finding for finding in found}


def test_the_generated_form_is_held_to_each_batch_size():
    def at(m, own, trainable, released):
        case = {"suite": "generated", "m": m, "n": [4096], "k": 4096, "dtype": "bf16"}
        names = {"frozen": 1.0, "trainable": trainable, "released-genft-gelu": released, "genft-genft-gelu": own}
        found = [record(name, ratio, method="genft-gelu", **case) for name, ratio in names.items()]
        found[0]["memory"]["peak"] -= 2**23  # the frozen layer's is 8 MiB less, and ours keeps 128 KiB
        return found

    records = [*at(8192, 1.5, 1.5, 2.0), *at(2048, 1.6, 1.25, 2.0)]
    found = goals._p3(records)
    assert [(f.limit, round(f.value, 3)) for f in found] == [(1.15, 1.0), (1.5, 1.28), (0.9, 0.75), (0.6, 0.8)]
    (memory,) = _findings("P4", records, "gpu").values()
    assert memory.value == pytest.approx(8 - (2048 * 16 * 4 + 8) / 2**20)


def test_a_call_on_a_cpu_is_counted_in_microseconds():
    small = {"m": 16, "n": [16], "k": 16, "mode": "call-eval"}
    records = [record("frozen", 0.004, "floor", "none", **small), record("genft-lora", 0.020, **small)]
    (found,) = _findings("P9", records, "cpu").values()
    assert (found.value, found.limit, found.met) == (pytest.approx(16.0), 20.0, True)


def test_a_gain_is_held_to_one_both_ways():
    def answer(contender, gain, kind="genft"):
        gains = {"0.001": {"y": 1.0, "dx": 1.01}, "0.0001": {"y": gain, "dx": 1.0}}
        own = record(contender, 1.0, kind, suite="numerics", mode="answer", gains=gains)
        return {field: value for field, value in own.items() if field not in ("ms", "ratio", "memory")}

    records = [answer("genft-lora", 0.96), answer("genft-wegeft", 1.02), answer("peft-lora", 0.06, "peer")]
    found = _findings("N1", records, "cpu")
    assert {name: finding.met for name, finding in found.items()} == {"genft-lora": False, "genft-wegeft": True}
    assert "y 0.960" in line(records[0])
    assert "| peft-lora | 1.000 | 1.010 | 0.060 | 1.000 |" in sections._answers(records)


def test_what_missed_its_goal_is_looked_at_again_the_furthest_first():
    big = {"m": 8192, "n": [4096], "k": 4096, "dtype": "bf16", "operation": "lowrank_linear"}
    records = [record("genft-lora", 1.07, **big), record("genft-lora", 1.30, **{**big, "n": [1024]})]
    records += [record("genft-lora", 1.05, **{**big, "m": 16384}), record("peft-lora", 9.0, "peer", **big)]
    assert parts.missed(records) == [
        Problem("lowrank_linear", 8192, 1024, 4096, 16, 2),
        Problem("lowrank_linear", 8192, 4096, 4096, 16, 2),
    ]


def test_a_kernel_is_slow_beside_its_bytes():
    shape, size = Shape(8192, (4096,), 4096), 2
    sides = size * 8192 * (4096 + 4096)  # x and dY
    rows = [
        {"kernel": "_project_kernel", "us": 2 * sides / 4e6, "calls": 2.0},
        {"kernel": "_reduce_kernel", "us": 1.4 * sides / 4e6, "calls": 2.0},
        {"kernel": "nvjet_hsh", "us": 1e6, "calls": 2.0},
    ]
    (slow,) = profiles.slow_kernels(rows, "genft-lora", shape, 16, size, copied=4000.0)
    assert (slow["kernel"], slow["times"], slow["bytes"]) == ("_project_kernel", 2.0, sides)
    three = profiles.moved("_project_kernel", shape, 16, 3.0, size)
    assert three == sides + size * 4096 * 4096, "a third call goes over W0"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results" / "test").mkdir(parents=True)
    (tmp_path / "results" / "test" / "one.json").write_text(json.dumps(result(LAYER)))
    return tmp_path


def _report(folder):
    arguments = ["--results", str(folder / "results"), "--docs", str(folder / "docs")]
    assert report([*arguments, "--readme", str(folder / "README.md")]) == 0
    return (folder / "docs" / "benchmarks.md").read_text()


def test_the_report_is_made_from_the_files(folder):
    readme = folder / "README.md"
    memory, methods = (tuple(f"<!-- {name}:{end} -->" for end in ("start", "end")) for name in ("memory", "methods"))
    old = "\nold\n"
    readme.write_text(f"before\n{old.join(memory)}\nbetween\n{old.join(methods)}\nafter\n")
    text = _report(folder)
    assert "| **P1** |" in text
    assert "not measured (needs a GPU)" in text
    assert "**missed**" in text, "a goal that was not met stays, with its number"
    assert "- absent: not here" in text
    charts = sorted(path.name for path in (folder / "docs" / "charts").iterdir())
    assert charts == ["memory.svg", "test-memory.svg", "test-ratio.svg", "test-roofline.svg"]
    assert all(f"(charts/{name})" in text for name in charts[1:]), "the first one is the README's"
    shown = readme.read_text()
    assert shown.startswith("before\n")
    assert f"{memory[1]}\nbetween\n{methods[0]}\n" in shown
    assert shown.endswith(f"{methods[1]}\nafter\n")
    assert "old" not in shown
    assert "| genft-lora | 1.05 [1.04, 1.06] | 1.05 [1.04, 1.06] | 0.53 |" in text
    assert "| 28.3 M | 1.05× | 128 KiB |" in shown
    assert "LoRA: 128 KiB, against 128 KiB in peft." in shown
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    _report(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}, "made twice, equal"


def test_the_newest_run_of_a_comparison_counts(folder):
    later = result([record("frozen", 1.0, "floor", "none"), record("genft-lora", 1.01)], "2026-02-02T00:00:00Z")
    (folder / "results" / "test" / "a-later.json").write_text(json.dumps(later))
    text = _report(folder)
    assert "| genft-lora | 1.01 [0.9999, 1.02] |" in text
    assert "peft-lora" not in text.split("### Runs")[0].split("## Test")[1]


def test_a_run_that_was_cut_off_does_not_hide_an_older_one(folder):
    whole, cut = result(LAYER), copy.deepcopy(LAYER)
    for own in cut:
        own.pop("ms", None)
    found = results.newest([whole, result(cut)])
    assert [r["contender"] for r in found] == [r["contender"] for r in LAYER]
    (folder / "results" / "test" / "plans-sm_90.json").write_text("{}")
    assert len(list(results.load_folder(folder / "results"))) == 1


def test_a_readme_without_markers_is_left_alone(folder):
    (folder / "README.md").write_text("nothing")
    _report(folder)
    assert (folder / "README.md").read_text() == "nothing"


def test_compare_exits_by_threshold(folder, capsys):
    old = folder / "results" / "test" / "one.json"
    slower = copy.deepcopy(LAYER)
    for field in ("median", "q1", "q3"):
        slower[2]["ratio"][field] *= 1.2
    slower[3]["memory"]["saved"] *= 2
    new = folder / "new.json"
    new.write_text(json.dumps(result(slower)))
    assert report(["--compare", str(old), str(old)]) == 0
    assert report(["--compare", str(old), str(new)]) == 1
    assert capsys.readouterr().out.count("WORSE") == 2
    assert report(["--compare", str(old), str(new), "--threshold", "1.5"]) == 0
    assert report(["--compare", str(new), str(old)]) == 0
    new.write_text(json.dumps(result([])))
    assert report(["--compare", str(old), str(new)]) == 2
    new.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        report(["--compare", str(old), str(new)])


# ---- runs


def test_a_run_keeps_what_it_has(tmp_path):
    run = results.Run(CPU, tmp_path, minutes=1)

    def first(run):
        add(run, LAYER)

    def slow(run):
        add(run, [record("genft-lora", 1.0, m=7)])
        time.sleep(30)

    def broken(run):
        raise RuntimeError("no")

    start = time.monotonic()
    runner.execute(
        run,
        [
            Part("first", "", first, 5),
            Part("slow", "", slow, 0.2),
            Part("broken", "", broken, 5),
            Part("long", "", first, 6000),
        ],
    )
    assert time.monotonic() - start < 10
    data = results.load(run.path)
    assert len(data["records"]) == len(LAYER) + 1
    assert [part["name"] for part in data["run"]["parts"]] == ["first", "slow", "broken"]
    assert data["run"]["left_out"].keys() == {"slow", "broken", "long"}
    assert "genft-lora" in runner.summary(run)
    add(run, LAYER)
    assert len(run.records) == len(LAYER) + 1, "a comparison that is made again takes the place of the first"


def test_what_cannot_end_is_not_begun(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(results.time, "monotonic", lambda: clock[0])
    run = results.Run(CPU, tmp_path, minutes=1)
    begun = []
    for seconds in run.paced([20, 25, 10, 5], reserve=8):
        begun.append(seconds)
        clock[0] += seconds
    assert begun == [20, 25]
    assert set(run.data["run"]["left_out"]) == {": 10 and 1 more"}


def _git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_plans_that_are_not_committed_make_a_run_dirty(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFT_CACHE", str(tmp_path / "cache"))
    for folder in ("benchmarks/results", "genft_kernels/plans", "genft_modules"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results" / "new.json").touch()
    assert not results.commit().endswith("-dirty")
    for untracked in ("genft_kernels/plans/sm_90.json", "cache/plans/sm_90.json"):
        path = tmp_path / untracked
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert results.commit().endswith("-dirty")
        path.unlink()


def test_a_result_file_tells_no_secrets(tmp_path):
    run = results.Run(CPU, tmp_path)
    run.flush()
    text = run.path.read_text()
    for secret in (os.uname().nodename, str(ROOT), str(tmp_path)):
        assert len(secret) < 3 or secret not in text
    described = {"type": "cpu", "name": "A (Fast) CPU @ 2.50GHz", "threads": 2}
    assert results.slug(described) == "a-fast-cpu-2.50ghz-2-threads"


def test_the_plan_table_is_what_the_kernels_read(tmp_path, monkeypatch):
    run = results.Run(CPU, tmp_path)
    best = LaunchPlan("fused")
    problem = {"operation": "lowrank_linear", "n": 4096, "k": 4096, "r": 16, "dtype": "bf16"}
    for m in (64, 8192):
        run.data["sweep"].append(
            {
                **problem,
                "m": m,
                "best": {"plan": json.loads(str(best)), "ms": 1.0},
                "families": {"fused": 1.0, "seeded": 1.1},
            }
        )
    sweep.write_plans(run)
    entries = [{**entry, "source": "package"} for entry in plans.read_table(tmp_path / "plans-cpu.json")]
    monkeypatch.setattr(plans, "plan_table", lambda architecture: tuple(entries))
    for m, n, expected in ((64, 4096, best), (500, 4096, best), (99999, 4096, best), (64, 1024, None)):
        problem = Problem("lowrank_linear", m, n, 4096, 16, 2)
        facts = DeviceFacts(f"test{m}{n}", 132)
        assert plans.choose_plan(problem, facts) == (expected or plans.default_plan(problem, facts))


def test_the_model_step_measures_itself():
    found = {
        r["contender"]: r
        for r in model_step.compare_models(
            models.TINY, torch.float32, CPU, ["peft-lora-r4", "genft-wegeft"], settings=Settings(0.0, 2, warmup=1)
        )
    }
    gate = found["genft-wegeft"]["gate"]
    assert gate["ok"]
    assert gate["budget"] == pytest.approx(2 * gate["own"] + EPSILON[torch.float32])
    for contender in ("frozen", "peft-lora-r4", "genft-wegeft"):
        assert found[contender]["tokens_per_s"] > 0
        assert found[contender]["memory"]["peak"] > found[contender]["memory"]["step"]
    assert found["frozen"]["memory"]["optimiser"] == 0 < found["genft-wegeft"]["memory"]["optimiser"]


def test_a_model_that_is_further_off_than_torch_is_not_timed(monkeypatch):
    plain = models.Trainee.outcome

    def outcome(self, backend):
        found = plain(self, backend)
        return {name: t * (1 + 1e-3 * (backend == "auto")) for name, t in found.items()}

    monkeypatch.setattr(models.Trainee, "outcome", outcome)
    settings = Settings(0.0, 2, warmup=1, memory=False)
    frozen, own = model_step.compare_models(models.TINY, torch.float32, CPU, ["genft-lora"], settings=settings)
    assert "ms" in frozen
    assert own["withheld"].startswith("gate: ")


def test_swapping_is_measured_on_hollow_weights():
    found = {r["contender"]: r for r in model_step.swap(models.TINY, repeats=1)}
    assert found["genft-wegeft"]["save_ms"]["median"] > 0
    assert found["genft-wegeft"]["layers"] == 14


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("plans", "memcheck,ceilings,gate,sweep"),
        ("goals", "ceilings,p6core,p1,p7,p9,n1,profiles"),
        ("rest", "p3,p2,again"),  # its whole models have tests of their own
    ],
)
def test_a_stage_of_the_gpu_command_goes_through_without_a_gpu(stage, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # the command adds to it
    parts = ["--parts", expected] if stage == "rest" else []
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.main([stage, "--dry-run", "--out", str(tmp_path), *parts]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)  # the command listens
    out = capsys.readouterr().out
    (path,) = (p for p in tmp_path.glob("*.json") if not p.name.startswith("plans-"))
    data = results.load(path)
    assert data["run"]["left_out"] == {}
    assert [part["name"] for part in data["run"]["parts"]] == expected.split(",")
    withheld = {r["withheld"] for r in data["records"] if "withheld" in r}
    assert all(reason.endswith("is not installed") or "no blocks" in reason for reason in withheld), withheld
    if stage == "plans":
        assert data["gate"]["checks"] == data["gate"]["listed"] > 5
        assert {entry["operation"] for entry in data["sweep"]} >= {"lowrank_linear"}
        assert f"cp {tmp_path}/plans-cpu.json genft_kernels/plans/cpu.json" in out.splitlines()[-3]
    else:
        assert data["records"]


def test_the_gpu_command_wants_to_know_its_stage(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert all(words in told for words in gpu.STAGES.values())


def test_a_kernel_that_never_returns_does_not_keep_the_run(tmp_path):
    code = """
import pathlib, sys, time, torch
from benchmarks import runner
from benchmarks.measure import results
run = results.Run(torch.device("cpu"), pathlib.Path(sys.argv[1]))
run.part = "stuck"
with runner.ended_after(0.2, run):
    time.sleep(60)
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 124, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert "stuck" in results.load(path)["run"]["left_out"]
    assert f"results: {path.name}" in done.stdout


@pytest.mark.parametrize(
    ("said", "seconds", "expected"),
    [
        ("checked one\n========= ERROR SUMMARY: 2 errors\n", 9, "2 errors in 1 set-ups"),
        ("checked one\nchecked two\n", 9, "0 errors in 2 set-ups"),
        (
            "checked one\n========= Invalid __global__ read\n",
            0,
            "1 errors in 1 set-ups, stopped when its time was over",
        ),
    ],
)
def test_memcheck_reads_what_the_sanitizer_says(said, seconds, expected, tmp_path, monkeypatch):
    script = tmp_path / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\nprintf '{said}'\n" + "sleep 60\n" * (not seconds))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = results.Run(CPU, None, minutes=seconds, tiny=True)
    memcheck.memcheck(run)
    assert run.data["memcheck"]["result"] == expected
    assert run.data["memcheck"]["errors"] == int(expected[0])


def test_without_a_gpu_the_gpu_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--parts", "p9"])
    assert stopped.value.code == 3


def test_pytest_benchmarks_measures(tmp_path, forks):
    words = ("benchmarks/suites/test_layer.py", "-q", "-k", "call and frozen", "--assert", "plain")
    done = forks.run("pytest", *words, "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "1.000 x frozen" in done.stdout
    (path,) = tmp_path.glob("*.json")
    assert [r["contender"] for r in results.load(path)["records"]] == ["frozen"]


# ---- what fits, and who shares


@pytest.mark.parametrize(("edge", "grain"), [(0, 1), (1, 1), (7, 1), (64, 1), (48, 16), (63, 16), (1000, 16)])
def test_the_largest_that_fits_is_found_by_bisection(edge, grain):
    tried = []

    def fits(value):
        tried.append(value)
        return value <= edge

    found = model_limits.largest(fits, start=8 * grain, most=64 * grain, grain=grain)
    assert found == min(edge, 64 * grain) // grain * grain
    assert len(tried) == len(set(tried)) <= 12
    assert all(value % grain == 0 for value in tried)


def test_what_fits_is_measured_against_a_budget():
    names = ["frozen", "genft-wegeft"]
    limits = {"most": 64, "grain": 16, "budget": 1 << 18}
    frozen, wegeft = model_limits.what_fits(models.TINY, torch.float32, CPU, names, "sequence", **limits)
    assert 16 <= wegeft["largest"] <= frozen["largest"] <= 64
    assert (
        model_limits.what_fits(models.TINY, torch.float32, CPU, ["frozen"], "batch", most=4, grain=1, budget=1)[0][
            "largest"
        ]
        == 0
    )


def test_adapters_mixed_in_one_batch_are_measured_behind_a_check():
    size = dataclasses.replace(models.TINY, batch=4, sequence=1)
    settings = Settings(seconds=0.0, min_rounds=2, warmup=1)
    records = {r["contender"]: r for r in mixed.next_token(size, torch.float32, CPU, (1, 3), 4, settings)}
    for name in mixed.ENTRANTS:
        assert records[f"{name}, one active"]["ms"]["median"] > 0
        assert all(records[f"{name}, {count} in a batch"]["gate"]["ok"] for count in (1, 3))
    assert "".join(sections._models(list(records.values()))).count("in a batch") == 8


def test_mixed_batches_are_measured_beside_pefts_loop():
    settings = Settings(seconds=0.0, min_rounds=2, warmup=1)
    case = Case(Shape(4, (40,), 24), 4, torch.bfloat16, CPU)
    records = mixed.layers(case, (1, 3), settings, replicas=1)
    assert len(records) == 2 * 2 * (1 + len(mixed.ENTRANTS))
    assert all(r["ms"]["median"] > 0 for r in records), [r.get("withheld") for r in records]
    generated = mixed.generating(models.TINY, torch.float32, CPU, [(4, 3)], 4, settings)
    assert {r["contender"] for r in generated} == {"frozen", *mixed.ENTRANTS}
    (finding, *_) = goals._p11([*records, *generated])
    assert finding.value == max(r["over_peer"]["median"] for r in records if r["contender"] == "genft-lora")
    assert "| 4 | " in "".join(sections._mixed(records))


@pytest.mark.parametrize("mode", ["step-graph", "decode"])
def test_modes_of_a_whole_model(mode):
    size = dataclasses.replace(models.TINY, sequence=1) if mode == "decode" else models.TINY
    settings = Settings(seconds=0.0, min_rounds=2, warmup=1)
    records = model_step.compare_models(size, torch.float32, CPU, ["genft-lora"], mode, settings=settings)
    assert all(r["ms"]["median"] > 0 for r in records)
    assert records[1]["gate"]["ok"]
