"""The goals P1 to P10, and what records say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .results import key
from .shapes import CPU_GOAL, QKV

Record = dict[str, Any]


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


def _p1(records: list[Record]) -> list[Finding]:
    found = []
    layer = {"suite": "layer", "mode": "step", "dtype": "bf16"}
    for name, own in _ours(records, "lowrank", **layer).items():
        single = {(r["m"], tuple(r["n"]), r["k"], r["r"]): r for r in own if len(r["n"]) == 1}
        at_16 = [(r["ratio"]["median"], r) for r in single.values() if r["r"] == 16]
        big = [(v, r) for v, r in at_16 if min(r["n"][0], r["k"]) >= 4096 and r["m"] >= 8192]
        if big:
            found.append(Finding(f"{name}, N, K ≥ 4096 and M ≥ 8192", _worst(big)[0], 1.06, _worst(big)[1]))
        if at_16:
            found.append(
                Finding(f"{name}, geometric mean", _geomean(v for v, _ in at_16), 1.12, f"{len(at_16)} shapes")
            )
        group = [r for r in own if tuple(r["n"]) == QKV.n and r["r"] == 16]
        if group:
            found.append(Finding(f"{name}, q, k, v with one input", group[-1]["ratio"]["median"], 1.08))
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
    for name, own in _ours(records, "lowrank", suite="layer", mode="step", dtype="bf16", r=16).items():
        for peer, limit in (("peft-lora", 0.70), ("peft-lora-compiled", 0.85)):
            pairs = _against(records, own, peer)
            if pairs:
                value, where = _worst(pairs)
                mean = _geomean(v for v, _ in pairs)
                found.append(Finding(f"{name} against {peer}", value, limit, f"{where}, geometric mean {mean:.2f}"))
    return found


def _p3(records: list[Record]) -> list[Finding]:
    found = []
    for method, r, limit in (("genft-gelu", 16, 1.15), ("genft-leakyrelu", 37, 1.30)):
        own = _pick(records, contender=f"genft-{method}", mode="step", dtype="bf16", r=r)
        for peer, most in (("trainable", limit), (f"naive-{method}", 0.5)):
            pairs = _against(records, own, peer)
            if pairs:
                found.append(Finding(f"{method} r = {r} against {peer}", _worst(pairs)[0], most, _worst(pairs)[1]))
    return found


def _p4(records: list[Record]) -> list[Finding]:
    found = []
    floors = {key(r): r for r in _pick(records, contender="frozen") if "memory" in r}
    for method, r in (("genft-gelu", 16), ("genft-leakyrelu", 37)):
        own = _pick(records, contender=f"genft-{method}", mode="step", dtype="bf16", r=r)
        pairs = []
        for record in own:
            floor = floors.get(key(record))
            if floor is not None and "memory" in record:
                beyond = record["memory"]["peak"] - floor["memory"]["peak"]
                pairs.append((100 * beyond / (2 * sum(record["n"]) * record["k"]), record))
        if pairs:
            found.append(Finding(f"{method} beyond frozen", *_swap(_worst(pairs), 5.0), unit=" % of N·K·2 bytes"))
    return found


def _swap(pair: tuple[float, str], limit: float) -> tuple[float, float, str]:
    return pair[0], limit, pair[1]


def _p5(records: list[Record]) -> list[Finding]:
    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    found = []
    for name, own in _ours(records, "lowrank", suite="layer", mode="step").items():
        pairs = [
            (r["memory"]["saved"] / (r["m"] * r["r"] * sizes[r["dtype"]] * len(r["n"])), r)
            for r in own
            if "memory" in r and r["dtype"] in sizes
        ]
        if pairs:
            found.append(Finding(f"{name}, saved beyond x", *_swap(_worst(pairs), 1.0), unit=" of t [M, r]"))
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
            found.append(Finding(f"tokens per second against {peer}", speed, 1.25, least=True))
            if "memory" in mine and "memory" in own[peer]:
                found.append(
                    Finding(f"peak memory against {peer}", mine["memory"]["peak"] / own[peer]["memory"]["peak"], 1.0)
                )
    return found


def _p7(records: list[Record]) -> list[Finding]:
    found = []
    for name, own in _ours(
        records, "lowrank", "generated", "slices", suite="layer", mode="decode", dtype="bf16"
    ).items():
        pairs = [(r["ratio"]["median"], r) for r in own if r["m"] in (1, 8, 64)]
        if pairs:
            found.append(Finding(name, *_swap(_worst(pairs), 1.10)))
    return found


def _p8(records: list[Record]) -> list[Finding]:
    found = []
    shape = {"m": CPU_GOAL.m, "n": list(CPU_GOAL.n), "k": CPU_GOAL.k, "r": 16}
    layer = {"suite": "layer", "mode": "step", "dtype": "fp32", **shape}
    for name, own in _ours(records, "lowrank", **layer).items():
        found.append(Finding(f"{name} against frozen", own[-1]["ratio"]["median"], 1.10))
        for value, _ in _against(records, own, "peft-lora"):
            found.append(Finding(f"{name} against peft-lora", value, 0.65))
    for value, _ in _against(records, _pick(records, contender="genft-peanut", **layer), "peft-peanut"):
        found.append(Finding("genft-peanut against peft-peanut", value, 0.555))
    for record in _pick(records, contender="genft-genft-gelu", **layer):
        found.append(Finding("genft-gelu against frozen", record["ratio"]["median"], 1.75))
        for value, _ in _against(records, [record], "naive-genft-gelu"):
            found.append(Finding("genft-gelu against the released formulation", value, 0.65))
    return found


def _p9(records: list[Record]) -> list[Finding]:
    own = _ours(records, "lowrank", "generated", "slices", suite="layer", mode="call")
    return [Finding(name, found[-1]["ratio"]["median"], 2.0) for name, found in own.items()]


def _p10(records: list[Record]) -> list[Finding]:
    found = []
    for record in _pick(records, suite="swap", kind="genft"):
        if record["layers"] != 224:
            continue
        name = record["contender"]
        found.append(Finding(f"{name}, swap", record["ms"]["median"] / 1e3, 2.0, unit=" s"))
        found.append(Finding(f"{name}, save", record["save_ms"]["median"] / 1e3, 1.0, unit=" s"))
    return found


GPU = "python -m benchmarks.gpu"
CPU = "python -m benchmarks.cpu"
GOALS = (
    Goal(
        "P1",
        "low rank, forward + backward against a frozen nn.Linear, bf16",
        "≤ 1.06 for N, K ≥ 4096, M ≥ 8192; ≤ 1.12 on average; ≤ 1.08 for q, k, v; r = 64 adds ≤ 0.04",
        ("gpu",),
        f"{GPU} --parts gate,ceilings,p1",
        _p1,
    ),
    Goal(
        "P2",
        "the same against peft LoRA, eager · compiled",
        "≤ 0.70 · ≤ 0.85",
        ("gpu",),
        f"{GPU} --parts gate,ceilings,p1,p2",
        _p2,
    ),
    Goal(
        "P3",
        "GenFT gelu/gelu r = 16 · none/leakyrelu r = 37, forward + backward",
        "≤ 1.15 · ≤ 1.30 of a trainable nn.Linear; ≤ 0.5 of the released formulation",
        ("gpu",),
        f"{GPU} --parts gate,ceilings,p3",
        _p3,
    ),
    Goal("P4", "memory of P3 beyond the frozen layer's", "≤ 5 % of N·K·2 bytes", ("gpu",), f"{GPU} --parts p3", _p4),
    Goal(
        "P5", "memory of P1 saved for backward beyond x", "t [M, r] at most", ("gpu", "cpu"), f"{GPU} --parts p1", _p5
    ),
    Goal(
        "P6",
        "Llama-3-8B-shaped model, WeGeFT on q, k, v, up, down, r = 64, one training step",
        "≤ 1.05 of the frozen model; ≥ 1.25 of peft LoRA's tokens/s; no more memory than it",
        ("gpu",),
        f"{GPU} --parts p6",
        _p6,
    ),
    Goal(
        "P7",
        "decode, M ∈ {1, 8, 64}, unmerged, CUDA graph",
        "≤ 1.10 of frozen",
        ("gpu",),
        f"{GPU} --parts gate,p7",
        _p7,
    ),
    Goal(
        "P8",
        "2 CPU cores, fp32, M = 2048, N = K = 1024, r = 16, forward + backward",
        "low rank ≤ 1.10 of frozen, ≤ 0.65 of peft LoRA; PEANuT ≤ 0.555 of peft's own; GenFT gelu/gelu ≤ 1.75, "
        "≤ 0.65 of the released formulation",
        ("cpu",),
        f"{CPU} --threads 2 --parts ceilings,p8",
        _p8,
    ),
    Goal("P9", "Python cost of a call at M = 1", "≤ 2 of nn.Linear's", ("gpu",), f"{GPU} --parts p9", _p9),
    Goal(
        "P10",
        "swapping 224 layers of an 8B-shaped model; saving its adapter",
        "< 2 s; < 1 s",
        ("cpu",),
        f"{CPU} --parts p10",
        _p10,
    ),
)


def table(records: list[Record], device_type: str) -> list[tuple[Goal, list[Finding]]]:
    """Every goal with the findings of one device; none where the goal needs another kind of device."""
    return [(goal, goal.read(records) if device_type in goal.needs else []) for goal in GOALS]
