"""`genft tune`, and what `genft doctor` says of its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genft_cli import doctor, methods, tune
from genft_kernels import LaunchPlan, Problem, choose_plan, device_facts, tuning
from tests.cli.conftest import Genft


def test_without_a_gpu(genft: Genft, llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = genft("tune", "--model", llama)
    assert (done.code, done.out, done.err) == (2, "", "genft: error: tune: needs a GPU\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "nowhere"), ("--model nowhere", "no such directory")),
        (("--rows", "8,many"), ("--rows 8,many", "integers")),
        (("--rows", "8,0"), ("--rows 8,0", "at least 1")),
        (("--dtype", "float8"), ("--dtype float8", "bfloat16")),
        (("--minutes", "0"), ("--minutes 0", "above 0")),
        (("--method", "lorra"), ("--method lorra", "wegeft")),
        (("--method", "peft-lora"), ("--method peft-lora", "none of genft's operations")),
        (("--r", "0"), ("--r 0",)),
        (("--target-modules", "w_proj"), ("--target_modules w_proj", "q_proj")),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes(genft: Genft, llama: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    model = () if "--model" in options else ("--model", llama)
    done = genft("tune", *model, *options)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert all(word in done.err for word in words), done.err


FEATURES = [("weight_features", 32, 32, 32), ("weight_features", 48, 48, 32)]


@pytest.mark.parametrize(
    ("method", "operation", "r", "beside"),
    [
        ("wegeft", "input_edit_linear", 6, []),
        ("gift", "input_edit_linear", 6, []),
        ("lora", "lowrank_linear", 6, []),
        ("sas", "lowrank_linear", 6, []),
        ("grft", "sliced_linear", 6, []),
        ("genft", "lowrank_linear", 7, FEATURES),  # a bias is one more column
        ("genft-gelu", "generated_linear", 6, [*FEATURES, *(("generated_features", 0, n, 32) for n in (32, 48))]),
        ("peanut", "lowrank_linear", 6, [("weight_features", 32, 32, 32), ("weight_features", 32, 32, 48)]),
    ],
)
def test_problems_are_those_of_the_adapted_layers(
    llama: Path, method: str, operation: str, r: int, beside: list[tuple[Any, ...]]
) -> None:
    config = methods.peft_config(method, r=6, target_modules=["q_proj", "v_proj", "up_proj"])
    found = tune.problems_of(tune._adapted(str(llama), config, method), (1, 64), 2)
    assert len(set(found)) == len(found)
    applied = {(p.m, p.n, p.k) for p in found if p.operation == operation}
    assert applied == {(m, n, 32) for m in (1, 64) for n in (32, 48)}
    assert {p.r for p in found if p.operation == operation} == {r}
    others = [p for p in found if p.operation != operation]
    assert {(p.operation, p.m, p.n, p.k) for p in others} == set(beside)
    # Factors are float32 beside weights of 16 bits, and what is made from factors alone is so, too.
    assert all(p.itemsize == (4 if p.operation == "generated_features" else 2) for p in found)


def test_what_is_measured_is_kept_and_shown(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    library = LaunchPlan("library")
    monkeypatch.setattr(tuning, "candidates", lambda problem, facts: [library])
    problems = [Problem("lowrank_linear", 70, 32, 32, 4, 4), Problem("weight_features", 32, 32, 32, 4, 4)]
    shown = tune._measured(problems, torch.float32, here, 60.0)
    path = own_tables / f"{device_facts(here).architecture}.json"
    assert shown.endswith(f"saved      {path}")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if "×32" in line]
    assert [row[:3] for row in rows] == [
        ["lowrank_linear 32×32 r 4", "70", "library"],
        ["weight_features 32×32 r 4", "", "library"],
    ]
    assert [(row[4] != "", row[5]) for row in rows] == [(True, "1.00"), (False, "1.00")]
    assert [choose_plan(problem, device_facts(here)) for problem in problems] == [library, library]
    path.write_text("{}")
    with pytest.raises(tune.UserError, match=str(path)):
        tune._measured(problems, torch.float32, here, 60.0)


def test_doctor_says_where_its_plan_comes_from(genft: Genft, own_tables: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the plan is that of the GPU here")
    assert "sm_90, from the cost model, not measured:" in doctor.plan()
    problem = Problem("lowrank_linear", **doctor._SHAPE, itemsize=2)
    path = own_tables / "sm_90.json"
    tuning.write_table(path, [tuning.table_entry(problem, LaunchPlan("library"), 1.0, {"library": 1.0})])
    assert 'sm_90, measured by genft tune: {"algorithm":"library"' in doctor.plan()
    entries = json.loads(path.read_text())["entries"]
    path.write_text(json.dumps({"entries": [{**entries[0], "plan": {}}]}))
    tuning.plan_table.cache_clear()
    tuning.choose_plan.cache_clear()
    done = genft("doctor", "--seconds", 0)
    assert done.code == 2
    assert str(path) in done.err
