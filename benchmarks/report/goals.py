"""The goals P1 to P11 and N1, and what records say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.measure.results import Record, key
from benchmarks.measure.shapes import CPU_CALL, CPU_GOAL


@dataclass(frozen=True)
class Finding:
    """One number of a goal: met while value ≤ limit (≥ where `least`)."""

    what: str
    value: float
    limit: float
    note: str = ""
    least: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit


@dataclass(frozen=True)
class Goal:
    """A goal in words, the command that measures it, and how findings are read from one device's records."""

    id: str
    what: str
    target: str
    needs: tuple[str, ...]  # the kinds of device that it can be measured on
    command: str
    read: Callable[[list[Record]], list[Finding]]


# ---- picking records


def _pick(records: Iterable[Record], **wanted: Any) -> list[Record]:
    return [r for r in records if "ms" in r and all(r.get(field) == value for field, value in wanted.items())]


def _ours(records: Iterable[Record], *forms: str, **wanted: Any) -> dict[str, list[Record]]:
    """Records of the module-level contenders of ours, by name."""
    found: dict[str, list[Record]] = {}
    for record in _pick(records, kind="genft", **wanted):
        if record.get("form") in forms and record["contender"] == f"genft-{record['method']}":
            found.setdefault(record["contender"], []).append(record)
    return found


def _geomean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _against(records: list[Record], own: Iterable[Record], peer: str) -> list[tuple[float, Record]]:
    """Time of each of `own` over that of `peer` in the same comparison."""
    peers = {key(r): r for r in _pick(records, contender=peer)}
    return [(r["ms"]["median"] / peers[key(r)]["ms"]["median"], r) for r in own if key(r) in peers]


def _where(record: Record) -> str:
    return f"{record['m']}×{'+'.join(map(str, record['n']))}×{record['k']}"


def _worst(pairs: list[tuple[float, Record]]) -> tuple[float, str]:
    value, record = max(pairs, key=lambda pair: pair[0])
    return value, f"worst at {_where(record)}"


# ---- reading goals


P1_METHODS = ("genft-wegeft", "genft-lora", "genft-gift", "genft-genft-linear")


def _p1(records: list[Record]) -> list[Finding]:
    found = []
    layer = {"suite": "layer", "mode": "step", "dtype": "bf16"}
    for name, own in _ours(records, "lowrank", **layer).items():
        if name not in P1_METHODS:
            continue
        single = {(r["m"], tuple(r["n"]), r["k"], r["r"]): r for r in own if len(r["n"]) == 1}
        at_16 = [(r["ratio"]["median"], r) for r in single.values() if r["r"] == 16]
        big = [(v, r) for v, r in at_16 if min(r["n"][0], r["k"]) >= 4096 and r["m"] >= 8192]
        if big:
            found.append(Finding(f"{name}, N, K ≥ 4096 and M ≥ 8192", _worst(big)[0], 1.06, _worst(big)[1]))
        if at_16:
            found.append(
                Finding(f"{name}, geometric mean", _geomean(v for v, _ in at_16), 1.12, f"{len(at_16)} shapes")
            )
        more = [
            (r["ratio"]["median"] - single[(*shape[:3], 16)]["ratio"]["median"], r)
            for shape, r in single.items()
            if shape[3] == 64 and (*shape[:3], 16) in single
        ]
        if more:
            found.append(Finding(f"{name}, r = 64 over r = 16", _worst(more)[0], 0.04, _worst(more)[1], unit=" more"))
    return found


def _p2(records: list[Record]) -> list[Finding]:
    found = []
    for name in P1_METHODS:
        # Compiled peers run in a comparison of their own.
        own = [
            r
            for suite in ("layer", "peers")
            for r in _pick(records, contender=name, suite=suite, mode="step", dtype="bf16", r=16)
        ]
        for peer, limit in (("peft-lora", 0.75), ("peft-lora-compiled", 0.85)):
            pairs = _against(records, own, peer)
            if pairs:
                value, where = _worst(pairs)
                mean = _geomean(v for v, _ in pairs)
                found.append(Finding(f"{name} against {peer}", value, limit, f"{where}, geometric mean {mean:.2f}"))
    return found


GENERATED = (
    ("genft-gelu", 16, 1.15),
    ("genft-leakyrelu", 37, 1.30),
    ("hira", 16, 1.15),
)  # method, rank, goal P3 where M is large


def _p3(records: list[Record]) -> list[Finding]:
    found = []
    for method, r, limit in GENERATED:
        own = _pick(records, suite="generated", contender=f"genft-{method}", mode="step", dtype="bf16", r=r)
        for peer, rows, most in (
            ("trainable", lambda m: m >= 8192, limit),
            ("trainable", lambda m: m == 2048, 1.50),
            (f"released-{method}", lambda m: m == 8192, 0.90),
            (f"released-{method}", lambda m: m == 2048, 0.60),
        ):
            pairs = _against(records, [record for record in own if rows(record["m"])], peer)
            if pairs:
                value, where = _worst(pairs)
                found.append(Finding(f"{method} r = {r} against {peer}", value, most, where))
    return found


def _p4(records: list[Record]) -> list[Finding]:
    """The peak beyond the frozen layer's, less the factors: their gradients, and what is kept for backward."""
    found = []
    floors = {key(r): r for r in _pick(records, suite="generated", contender="frozen") if "memory" in r}
    for method, r, _ in GENERATED:
        pairs = []
        for record in _pick(records, suite="generated", contender=f"genft-{method}", mode="step", dtype="bf16", r=r):
            floor = floors.get(key(record))
            if floor is not None and "memory" in record:
                own = record["memory"]
                beyond = own["peak"] - floor["memory"]["peak"] - own["gradients"] - own["saved"]
                pairs.append((beyond / 2**20, record))
        if pairs:
            found.append(Finding(f"{method}, workspace", *_swap(_worst(pairs), 16.0), unit=" MiB"))
    return found


def _swap(pair: tuple[float, str], limit: float) -> tuple[float, float, str]:
    return pair[0], limit, pair[1]


def _p5(records: list[Record]) -> list[Finding]:
    """LoRA is given its factors, the other methods make theirs: from W0, from the parameters of several layers."""
    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    found = []
    for name, own in _ours(records, "lowrank", suite="layer", mode="step").items():
        makes = name != "genft-lora"
        pairs = []
        for r in own:
            if "memory" in r and r["dtype"] in sizes:
                elements = sum(r["m"] * r["r"] + makes * r["r"] * (n + r["k"]) for n in r["n"])
                pairs.append((r["memory"]["saved"] / (elements * sizes[r["dtype"]]), r))
        if pairs:
            unit = " of t [M, r] and r·(N + K)" if makes else " of t [M, r]"
            found.append(Finding(f"{name}, saved beyond x", *_swap(_worst(pairs), 1.0), unit=unit))
    return found


def _p6(records: list[Record]) -> list[Finding]:
    own = {r["contender"]: r for r in _pick(records, suite="model", mode="step") if r["model"]["name"] == "llama-3-8b"}
    if "genft-wegeft" not in own:
        return []
    mine = own["genft-wegeft"]
    found = [Finding("step against frozen", mine["ratio"]["median"], 1.05)]
    for peer in ("peft-lora-r64", "peft-lora-r16"):
        if peer in own:
            speed = mine["tokens_per_s"] / own[peer]["tokens_per_s"]
            found.append(Finding(f"tokens per second against {peer}", speed, 1.10, least=True))
            if "memory" in mine and "memory" in own[peer]:
                found.append(
                    Finding(f"peak memory against {peer}", mine["memory"]["peak"] / own[peer]["memory"]["peak"], 1.0)
                )
    return found


def _p7(records: list[Record]) -> list[Finding]:
    found = []
    for name, own in _ours(records, "lowrank", suite="layer", mode="decode", dtype="bf16").items():
        pairs = [(r["ratio"]["median"], r) for r in own if r["m"] in (1, 8, 64)]
        if pairs:
            found.append(Finding(name, *_swap(_worst(pairs), 1.10)))
    return found


# Stock LoRA on our operations: contender, peer, goal P8.
FUSED = (
    ("fused-lora", "peft-lora", 0.85),
    ("fused-lora-dropout", "peft-lora-dropout", 1.0),
    ("fused-dora", "peft-dora", 0.75),
)


def _p8(records: list[Record]) -> list[Finding]:
    found = []
    shape = {"m": CPU_GOAL.m, "n": list(CPU_GOAL.n), "k": CPU_GOAL.k, "r": 16}
    layer = {"suite": "layer", "mode": "step", "dtype": "fp32", **shape}
    for name in ("genft-wegeft", "genft-lora"):
        for record in _pick(records, contender=name, **layer):
            found.append(Finding(f"{name} against frozen", record["ratio"]["median"], 1.12))
            for value, _ in _against(records, [record], "peft-lora"):
                found.append(Finding(f"{name} against peft-lora", value, 0.85))
    for name, peer, limit in FUSED:
        for value, _ in _against(records, _pick(records, contender=name, **layer), peer):
            found.append(Finding(f"{name} against {peer}", value, limit))
    for value, _ in _against(records, _pick(records, contender="genft-peanut", **layer), "peft-peanut"):
        found.append(Finding("genft-peanut against peft-peanut", value, 0.5))
    for value, _ in _against(records, _pick(records, contender="genft-hira", **layer), "peft-hira"):
        found.append(Finding("genft-hira against peft-hira", value, 0.7))
    for record in _pick(records, contender="genft-genft-gelu", **layer):
        found.append(Finding("genft-gelu against frozen", record["ratio"]["median"], 1.75))
        for value, _ in _against(records, [record], "released-genft-gelu"):
            found.append(Finding("genft-gelu against the released formulation", value, 0.6))
    return found


def _p9(records: list[Record]) -> list[Finding]:
    found = []
    small = {"m": CPU_CALL.m, "n": list(CPU_CALL.n), "k": CPU_CALL.k, "dtype": "fp32"}
    for mode, words, limit in (("call-eval", "without gradient", 20.0), ("call", "with", 40.0)):
        found += [
            Finding(f"{r['contender']}, {words}", r["ratio"]["median"], 2.0)
            for r in _pick(records, kind="genft", mode=mode, m=1, dtype="bf16")
            if r["contender"] == f"genft-{r['method']}"
        ]
        floor = _pick(records, contender="frozen", mode=mode, **small)
        for r in _pick(records, kind="genft", mode=mode, **small) if floor else ():
            above = 1e3 * (r["ms"]["median"] - floor[-1]["ms"]["median"])
            found.append(Finding(f"{r['contender']}, {words}", above, limit, unit=" µs more"))
    return found


def _p10(records: list[Record]) -> list[Finding]:
    found = []
    for record in _pick(records, suite="swap", kind="genft"):
        if record["layers"] != 224:
            continue
        name = record["contender"]
        found.append(Finding(f"{name}, swap", record["ms"]["median"] / 1e3, 2.0, unit=" s"))
        found.append(Finding(f"{name}, save", record["save_ms"]["median"] / 1e3, 1.0, unit=" s"))
    return found


def _p11(records: list[Record]) -> list[Finding]:
    found = []
    mixed = [r for r in _pick(records, suite="mixed", kind="genft") if "over_peer" in r]
    for name in dict.fromkeys(r["contender"] for r in mixed):
        for words, where in (("a layer", "m"), ("generate", "model")):
            own = [r for r in mixed if r["contender"] == name and where in r]
            if own:
                worst = max(own, key=lambda r: r["over_peer"]["median"])
                samples = worst["m"] if "m" in worst else worst["model"]["batch"]
                note = f"worst: {samples} samples, {worst['mode'].partition(', ')[2]}, {worst['dtype']}"
                found.append(Finding(f"{name}, {words}", worst["over_peer"]["median"], 1.0, note))
    return found


def _n1(records: list[Record]) -> list[Finding]:
    found = []
    for record in records:
        if record["kind"] == "genft" and "gains" in record:
            gains = [gain for both in record["gains"].values() for gain in both.values()]
            furthest = max(gains, key=lambda gain: abs(gain - 1.0))
            found.append(Finding(record["contender"], abs(furthest - 1.0), 0.03, f"gain {furthest:.3f}", unit=" off 1"))
    return found


GPU = "python -m benchmarks.gpu"
CPU = "python -m benchmarks.cpu"
GOALS = (
    Goal(
        "P1",
        "low rank (WeGeFT, GIFT, GenFT-linear, LoRA), r = 16, forward + backward against a frozen nn.Linear, bf16",
        "≤ 1.06 where N, K ≥ 4096 and M ≥ 8192; geometric mean of all shapes ≤ 1.12; r = 64 adds at most 0.04",
        ("gpu",),
        f"{GPU} goals",
        _p1,
    ),
    Goal("P2", "the same against peft LoRA, eager · compiled", "≤ 0.75 · ≤ 0.85", ("gpu",), f"{GPU} rest", _p2),
    Goal(
        "P3",
        "GenFT gelu/gelu r = 16 · none/leakyrelu r = 37 · HiRA r = 16, forward + backward against a trainable "
        "nn.Linear",
        "≤ 1.15 · ≤ 1.30 · ≤ 1.15 at M ≥ 8192; ≤ 1.50 at M = 2048; and ≤ 0.90 · ≤ 0.60 of the released formulation at "
        "M = 8192 · 2048",
        ("gpu",),
        f"{GPU} rest",
        _p3,
    ),
    Goal(
        "P4",
        "memory of P3 beyond the frozen layer's",
        "factors, plus one workspace of ≤ 16 MiB per device whatever the model",
        ("gpu",),
        f"{GPU} rest",
        _p4,
    ),
    Goal(
        "P5",
        "saved for backward beyond x",
        "low rank: t [M, r]; methods that make factors from W0: those factors, r·(N + K), and nothing with M·N, M·K or "
        "N·K elements",
        ("gpu", "cpu"),
        f"{GPU} goals",
        _p5,
    ),
    Goal(
        "P6",
        "Llama-3-8B-shaped model, sequence 2048, WeGeFT on q, k, v, up, down, r = 64: one training step",
        "≤ 1.05 of the same model with every weight frozen and gradients flowing to the embedding; ≥ 1.10 of peft "
        "LoRA's tokens/s at the same sites; peak memory ≤ peft LoRA's",
        ("gpu",),
        f"{GPU} goals",
        _p6,
    ),
    Goal(
        "P7",
        "decode, M ∈ {1, 8, 64}, unmerged, CUDA graph",
        "≤ 1.10 of frozen for low rank",
        ("gpu",),
        f"{GPU} goals",
        _p7,
    ),
    Goal(
        "P8",
        "2 CPU cores, fp32, M = 2048, N = K = 1024, r = 16, forward + backward",
        "WeGeFT, LoRA ≤ 1.12 of frozen and ≤ 0.85 of peft LoRA; fused peft LoRA ≤ 0.85 (with dropout ≤ 1), DoRA ≤ 0.75 "
        "WeGeFT, LoRA ≤ 1.12 of frozen and ≤ 0.85 of peft LoRA; fused peft LoRA ≤ 0.85 (with dropout ≤ 1), DoRA ≤ 0.75 "
        "of peft's; PEANuT ≤ 0.5 and HiRA ≤ 0.7 of peft's; GenFT gelu/gelu ≤ 1.75 of frozen and ≤ 0.6 of the released "
        "formulation (x ΔWᵀ apart)",
        ("cpu",),
        f"{CPU} --threads 2 --parts ceilings,p8",
        _p8,
    ),
    Goal(
        "P9",
        "Python cost of a call, eager",
        "≤ 2 of nn.Linear's on a GPU at M = 1; on a CPU at 16×16 ≤ 20 µs above F.linear without gradient, ≤ 40 µs with",
        ("gpu", "cpu"),
        f"{GPU} goals, {CPU} --parts p9",
        _p9,
    ),
    Goal(
        "P10",
        "swapping 224 layers of an 8B-shaped model; saving its adapter",
        "< 2 s; < 1 s",
        ("cpu",),
        f"{CPU} --parts p10",
        _p10,
    ),
    Goal(
        "P11",
        "decode on a CPU with 1 to 64 adapters in a batch of 1 to 64 samples, against peft LoRA's loop",
        "≤ 1",
        ("cpu",),
        f"{CPU} --parts mixed",
        _p11,
    ),
    Goal(
        "N1",
        "bf16: gain of the output's and dX's answer to ΔW at ‖ΔW‖/‖W0‖ = 10⁻³ and 10⁻⁴",
        "1.00 ± 0.03 for every low-rank method, reference and Triton",
        ("gpu", "cpu"),
        f"{GPU} goals, {CPU} --parts n1",
        _n1,
    ),
)


def table(records: list[Record], device_type: str) -> list[tuple[Goal, list[Finding]]]:
    """Every goal with the findings of one device; none where the goal needs another kind of device."""
    return [(goal, goal.read(records) if device_type in goal.needs else []) for goal in GOALS]
