"""The harness: what runs when, what the numbers mean, and that nothing wrong is timed."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from benchmarks.measure import memory, results
from benchmarks.measure.shapes import Case, Shape
from benchmarks.measure.timing import ceilings
from benchmarks.subjects import contenders, operations
from benchmarks.suites import answers, comparison
from benchmarks.suites.comparison import Settings, compare
from genft_kernels import gate, timing
from genft_kernels.plan import LaunchPlan
from tests.support import truth

CPU = torch.device("cpu")
CASE = Case(Shape(48, (40,), 24), 4, torch.float32, CPU)
QUICK = Settings(seconds=0.0, min_rounds=2, warmup=1, memory=False)


class Ticking:
    """A clock for steps that say how long they take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: list[list[object]] = []

    def run(self, steps, index):
        self.rounds.append([step(index) for step in steps])
        times = [value[1] for value in self.rounds[-1]]
        self.now += sum(times) / 1e3
        return times


def test_every_round_runs_every_step_once_in_changing_order():
    clock = Ticking()
    steps = {name: (lambda i, name=name: (name, 1.0, i)) for name in "abcde"}
    samples = timing.interleave(steps, clock, seconds=0.0, min_rounds=6, warmup=2)
    assert [len(samples[name]) for name in "abcde"] == [6] * 5
    assert all(sorted(value[0] for value in ran) == list("abcde") for ran in clock.rounds)
    assert len({tuple(value[0] for value in ran) for ran in clock.rounds[2:]}) > 1
    assert [ran[0][2] for ran in clock.rounds] == list(range(8)), "the input changes from round to round"


def test_rounds_end_with_the_time_that_is_given():
    clock = Ticking()
    samples = timing.interleave(
        {"a": lambda i: ("a", 100.0)}, clock, seconds=0.95, min_rounds=2, max_rounds=50, warmup=0, now=lambda: clock.now
    )
    assert len(samples["a"]) == 10


def test_rounds_that_are_complete_are_told_when_a_run_is_cut_off():
    clock, told = Ticking(), []

    def slow(index):
        if index == 3:
            raise KeyboardInterrupt
        return "b", 900.0

    limits = {"seconds": 60.0, "warmup": 0, "now": lambda: clock.now, "pause": 1.0}
    with pytest.raises(KeyboardInterrupt):
        timing.interleave({"a": lambda i: ("a", 100.0), "b": slow}, clock, each=told.append, **limits)
    assert [len(ms["b"]) for ms in told] == [1, 2, 3, 3]


def test_ratios_are_taken_within_a_round():
    drifting = [1.0, 2.0, 4.0, 8.0]
    found = timing.ratio([1.1 * value for value in drifting], drifting)
    assert (found.q1, found.q3) == pytest.approx((1.1, 1.1))
    assert timing.Stats.of([3.0, 1.0, 2.0]) == timing.Stats(2.0, 1.5, 2.5, 3)


def test_wall_clock_divides_by_calls():
    ticks = iter([0.0, 1.0, 1.0, 4.0])
    clock = timing.WallClock(calls=2, now=lambda: next(ticks))
    seen = []
    assert clock.run([seen.append, seen.append], 5) == [500.0, 1500.0]
    assert seen == [5, 6, 5, 6]


def test_ceilings_name_a_rate_for_each_dtype():
    found = ceilings(CPU, (torch.float32,), tiny=True)
    assert found["copy_gb_per_s"] > 0
    assert set(found["product_tflops"]) == {"float32"}


# ---- the gate


class Wrong(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) * 1.001


def _register(monkeypatch, name, build, **more):
    twin = contenders.Contender(
        name, "peer", "test", "frozen", build, lambda layer, linear, case: copy.deepcopy(linear), **more
    )
    monkeypatch.setitem(comparison.CONTENDERS, name, twin)


def test_a_wrong_contender_has_no_time(monkeypatch):
    def broken(linear, case):
        raise RuntimeError("cannot be built")

    _register(monkeypatch, "wrong", lambda linear, case: Wrong(linear))
    _register(monkeypatch, "broken", broken)
    _register(monkeypatch, "absent", broken, needs="a_package_that_does_not_exist")
    found = {r["contender"]: r for r in compare(CASE, ["wrong", "broken", "absent"], settings=QUICK)}
    assert found["frozen"]["gate"]["ok"]
    assert found["frozen"]["ratio"]["median"] == 1.0
    assert not found["wrong"]["gate"]["ok"]
    assert found["wrong"]["withheld"].startswith("gate: ")
    assert found["broken"]["withheld"] == "RuntimeError: cannot be built"
    assert found["absent"]["withheld"].endswith("is not installed")
    assert not any("ms" in found[name] for name in ("wrong", "broken", "absent"))


def test_a_contender_is_in_the_file_when_it_is_measured(tmp_path, monkeypatch):
    """Each set-up, and the rounds before a cut-off."""
    run, seen = results.Run(CPU, tmp_path), []

    def build(linear, case):
        seen.append([(r["contender"], r["gate"]["ok"]) for r in results.load(run.path)["records"]])
        return linear

    _register(monkeypatch, "late", build)

    def cut_off(steps, clock, *, each, **limits):
        each({name: [1.0, 2.0] for name in steps})
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "interleave", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compare(CASE, ["genft-lora", "late"], settings=QUICK, run=run)
    assert seen == [[("frozen", True), ("genft-lora", True)]]
    assert [r["ms"]["median"] for r in results.load(run.path)["records"]] == [1.5, 1.5, 1.5]


def test_every_contender_passes_and_is_measured():
    names = [n for n in contenders.names(compiled=False) if contenders.CONTENDERS[n].algorithm == ""]
    found = {r["contender"]: r for r in compare(CASE, names, settings=dataclasses.replace(QUICK, memory=True))}
    withheld = {name: r["withheld"] for name, r in found.items() if "withheld" in r}
    assert all(reason.endswith("is not installed") for reason in withheld.values()), withheld
    for name in ("genft-lora", "genft-wegeft", "genft-gift"):
        record = found[name]
        assert record["memory"]["saved"] == 48 * 4 * 4, "t [M, r] in float32 and nothing else"
        assert record["floor_operations"] == 4 * 48 * 40 * 24
        assert LaunchPlan.parse(record["plan"]).algorithm == record["algorithm"]
    assert found["trainable"]["floor_operations"] == 6 * 48 * 40 * 24
    lora = found["peft-lora"]["memory"]
    assert lora["parameters"] == lora["gradients"] == 4 * 4 * (40 + 24)
    assert lora["optimiser"] == 2 * lora["parameters"]
    assert found["naive-wegeft"]["memory"]["saved"] >= 40 * 24 * 4, "a materialised update keeps N·K elements"


@pytest.mark.parametrize("mode", ["forward", "decode", "call", "call-eval"])
def test_modes_and_groups_of_layers(mode):
    case = dataclasses.replace(CASE, shape=Shape(8, (16, 8), 24))
    found = compare(case, ["genft-wegeft"], mode, settings=QUICK)
    assert all("ms" in record and record["n"] == [16, 8] for record in found)


def test_the_rule():
    exact = {"y": torch.ones(10, dtype=torch.float64)}
    near = {"y": torch.full((10,), 1.0 + 1e-3)}
    assert gate.judge(near, exact, near, torch.float32).ok, "as wrong as torch is allowed"
    assert not gate.judge(near, exact, exact, torch.float32).ok
    assert not gate.judge({"y": torch.full((10,), float("nan"))}, exact, near, torch.float32).ok
    assert not gate.judge({"y": torch.ones(9)}, exact, near, torch.float32).ok
    assert not gate.judge({}, exact, near, torch.float32).ok
    two = {"y": exact["y"], "z": exact["y"]}
    assert gate.judge(
        {"y": near["y"], "z": exact["y"]}, two, {"y": exact["y"], "z": near["y"]}, torch.float32, pooled=True
    )


def test_the_hardware_gate_sees_what_is_wrong(monkeypatch):
    check = operations.Check("input_edit", 17, 33, 35, 5, "fp32")
    assert operations.run_check(check, CPU)["ok"]
    right, calls = operations.genft_kernels.input_edit, itertools.count()

    def another_each_time(*args, **kwargs):
        return right(*args, **kwargs) * (1 + 2**-20 * next(calls))

    monkeypatch.setattr(operations.genft_kernels, "input_edit", another_each_time)
    assert operations.run_check(check, CPU)["error"].startswith("not bit-equal in two runs: y")
    monkeypatch.setattr(operations.genft_kernels, "input_edit", lambda x, psi, phi, **_: x + 0 * (x @ psi.t()) @ phi)
    assert not operations.run_check(check, CPU)["ok"]


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_the_gate_draws_odd_layouts(name, layout):
    check = operations.Check(name, 17, 9, 12, 3, "fp32", layout=layout)
    assert operations.run_check(check, CPU)["ok"]


def test_the_gate_lists_every_operation_of_the_kernels():
    assert {check.operation for check in operations.checks(("bf16",))} == set(operations.OPERATIONS)
    assert set(truth.OPERATIONS) <= set(operations.OPERATIONS)


# ---- small updates


class Exact(nn.Module):
    """y and dX of W0 + ΔW with one rounding."""

    def __init__(self, linear, case):
        super().__init__()
        self.linear, self.delta = linear, nn.Parameter(torch.randn_like(linear.weight))

    def forward(self, x):
        return (x.double() @ (self.linear.weight.double() + self.delta.double()).t()).to(x.dtype)


def test_the_gain_is_one_where_there_is_one_rounding(monkeypatch):
    exact = contenders.Contender("exact", "peer", "test", "frozen", Exact)
    monkeypatch.setitem(answers.CONTENDERS, "exact", exact)
    case = dataclasses.replace(CASE, shape=Shape(512, (512,), 256), dtype=torch.bfloat16)
    right, lora = answers.answers(case, ["exact", "peft-lora"], results.Run(CPU, None))
    for ratio, within, lost in (("0.001", 0.02, 0.6), ("0.0001", 0.05, 0.1)):
        for side in ("y", "dx"):
            assert abs(right["gains"][ratio][side] - 1.0) < within
            assert lora["gains"][ratio][side] < lost


# ---- memory


def test_peak_and_saved_bytes():
    x = torch.randn(64, 64, requires_grad=True)

    def step():
        first = x.exp()  # kept
        second = first * 2.0  # not kept
        return second.sum()

    assert memory.saved_bytes(step, [x]) == 64 * 64 * 4
    assert 2 * 64 * 64 * 4 <= memory.peak_bytes(step, CPU) < 3 * 64 * 64 * 4
