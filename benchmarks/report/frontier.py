"""Methods from few to many trainable parameters: what the result files of `benchmarks.frontier` say, and the section of
docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import text
from benchmarks.report.budget import TUNING_SEED
from genft_cli.demo.run import NAMES

SCHEMA = 1
REFERENCE = "lora"


@dataclass(frozen=True)
class Point:
    """A method at a budget (0: full fine-tuning): its configuration, and what each seed reached on held-out text. A run
    that diverged is not among `bits`, but among `diverged`."""

    method: str
    budget: int
    modules: str
    options: dict[str, Any]
    trainable: int
    lr: float
    bits: list[float]
    accuracy: list[float]
    diverged: int

    @property
    def key(self) -> str:
        return f"{self.method} {self.budget}" if self.budget else self.method

    @property
    def mean(self) -> float:
        return statistics.mean(self.bits)


def points(data: dict[str, Any]) -> list[Point]:
    """One for each method and budget that a seed has been reported of, smaller budgets first."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in data["runs"].values():
        settings = run["settings"]
        if settings["seed"] != TUNING_SEED:
            groups.setdefault((settings["method"], settings["budget"]), []).append(run)
    found = []
    for (method, budget), runs in groups.items():
        settings = runs[0]["settings"]
        good = [run for run in runs if run["bits"] is not None]
        if good:
            found.append(
                Point(
                    method,
                    budget,
                    settings["modules"],
                    settings["options"],
                    settings["trainable"],
                    settings["lr"],
                    [run["bits"] for run in good],
                    [run["accuracy"] for run in good],
                    len(runs) - len(good),
                )
            )
    return sorted(found, key=lambda point: point.budget)


def pareto(found: Sequence[Point]) -> list[Point]:
    """The points for which no other has fewer bits with no more parameters, from few to many."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.trainable, point.mean)):
        if not best or point.mean < best[-1].mean:
            best.append(point)
    return best


def leaders(found: Sequence[Point]) -> list[tuple[int, list[Point], Point | None]]:
    """For each budget: the method with the fewest bits and those whose range over the seeds overlaps with its own, the
    best first; and LoRA, if it is there."""
    told = []
    for budget in sorted({point.budget for point in found if point.budget}):
        own = sorted((point for point in found if point.budget == budget), key=lambda point: point.mean)
        near = [point for point in own if min(point.bits) <= max(own[0].bits)]
        told.append((budget, near, next((point for point in own if point.method == REFERENCE), None)))
    return told


def shares(files: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[str, int], list[float]]]:
    """For each target task, method and budget: the share of what full fine-tuning gains, on each base."""
    told: dict[str, dict[tuple[str, int], list[float]]] = {}
    for data in files:
        found = points(data)
        for point in found:
            share = _share(point, found, data["about"]["before"]["bits"])
            if share is not None and point.budget:
                told.setdefault(data["task"], {}).setdefault((point.method, point.budget), []).append(share)
    return told


def _share(point: Point, found: Sequence[Point], before: float) -> float | None:
    """Of what full fine-tuning gains; None where it is not among those found."""
    full = next((other.mean for other in found if other.method == "full"), None)
    return None if full is None else (before - point.mean) / (before - full)


def load_folder(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(device slug, its files: each target task, from the shallowest base to the deepest), of every device."""
    for directory in sorted(folder.glob("*/frontier")):
        found = [json.loads(path.read_text()) for path in directory.glob("*.json")]
        found = [data for data in found if data["schema"] == SCHEMA and points(data)]
        if found:
            # Prose comes first.
            yield directory.parent.name, sorted(found, key=lambda data: (data["task"] != "prose", data["depth"]))


# ---- the section of docs/benchmarks.md

_ASKED = {
    "prose": "adapted to prose, every byte predicted",
    "labels": "asked which kind of token each byte of Python source belongs to (one of six, by Python's own tokenizer; "
    "blanks are not counted), through a linear probe on its last hidden states, which was fitted before and is frozen",
}


def section(files: Sequence[dict[str, Any]], chart: Path, docs: Path) -> list[str]:
    """Methods from few to many trainable parameters, on one device."""
    about = files[0]["about"]
    threads = about["device"].get("threads", 0)
    device = about["device"]["name"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
    base = about["base"]
    sizes = ", ".join(f"{data['about']['parameters']:,}" for data in {data["depth"]: data for data in files}.values())
    lines = [
        f"### On {device}",
        "",
        f"A byte-level Llama ({sizes} parameters), pre-trained on "
        f"{base['pretrain_steps'] * base['pretrain_batch'] * base['seq_len'] / 1e6:.1f} MB of source code, is "
        f"{'; or '.join(_ASKED[task] for task in dict.fromkeys(data['task'] for data in files))}: {about['steps']} "
        f"steps of {about['tokens']} bytes, AdamW, cosine. For each method and budget the configuration with the "
        "widest modules within 25 % of the budget is tried at three learning rates, 2.5 times apart, around what was "
        "best at the budget before, and at up to two further ones while the best is at an edge; then the next narrower "
        "configuration at the best of these, and the better of the two is taken. This takes a seed "
        "of its own and text that is not reported. Modules are chosen from: all linear layers, attention, q and v, v, "
        "and v of the upper half of the layers, so that a method whose rank cannot fall below 1 adapts fewer modules. "
        "A method that shares its factors across depth ends where its rank reaches the width of the layers. Beyond a "
        f"quarter of the base ({about['parameters'] // 4:,}) the figures only show where the lines go. The model is "
        "small and its training short: this shows where each method's "
        "parameters count, and is no ranking on large models.",
        "",
        f"![{chart.stem}]({chart.relative_to(docs).as_posix()})",
        "",
        "Each point is the mean over the seeds, its bar their range. Rings: the Pareto set, the points for which no "
        "other has fewer bits with no more parameters.",
        "",
    ]
    for data in files:
        lines += _part(data)
    return lines


def _part(data: dict[str, Any]) -> list[str]:
    """One target task on one base."""
    about, found = data["about"], points(data)
    rings = {point.key for point in pareto(found)}
    budgets = sorted({point.budget for point in found if point.budget})
    cells = {(point.method, point.budget): point for point in found}
    methods = [method for method in NAMES if any(point.method == method for point in found) and method != "full"]

    def cell(point: Point | None, words: Callable[[Point], str]) -> str:
        if point is None:
            return ""
        return f"**{words(point)}**" if point.key in rings else words(point)

    def grid(words: Callable[[Point], str]) -> list[str]:
        head = ["", *(f"{budget:,}" for budget in budgets)]
        rows = [
            [NAMES[method], *(cell(cells.get((method, budget)), words) for budget in budgets)] for method in methods
        ]
        return text.table(head, rows)

    of = "byte" if data["task"] == "prose" else "label"
    before, full = about["before"], cells.get(("full", 0))
    counts = {len(point.bits) + point.diverged for point in found}
    seeds = "one seed" if counts == {1} else f"{'–'.join(map(str, sorted({min(counts), max(counts)})))} seeds"
    lines = [
        f"#### {data['task']}, {data['depth']} layers of {about['base']['hidden']}",
        "",
        f"Held-out bits per {of}, mean ± half of the range over {seeds}, by budget; "
        f"the Pareto set in bold. The base{' and its probe have' if data['task'] == 'labels' else ' has'} "
        f"{before['bits']:.3f}"
        + (f", full fine-tuning {text.plus_minus(full.bits)} with {full.trainable:,} parameters." if full else "."),
        "",
        *grid(lambda point: text.plus_minus(point.bits)),
        _told(found, before["bits"]),
        "",
    ]
    if data["task"] == "labels":
        lines += ["Share of labels that are right:", "", *grid(lambda p: f"{statistics.mean(p.accuracy):.0%}")]
    lines += ["Configuration, trainable parameters and learning rate:", "", *grid(_configuration)]
    steps = data["steps"]
    if steps:
        lines += [
            "Time of a training step over that of full fine-tuning in the same round (median), and MiB allocated at "
            f"its peak, trained state included; load {steps['load']:g}:",
            "",
            *grid(
                lambda p: (
                    f"{s['times_full'][1]:.2f}, {s['peak_mib'] + s['state_mib']:.1f}"
                    if (s := steps["points"].get(p.key))
                    else ""
                )
            ),
        ]
    commits = sorted({run["commit"] for run in data["runs"].values()})
    state = "Runs" if about["finished"] else "Runs so far, of more"
    return [
        *lines,
        f"{state}: {len(data['runs'])}, in "
        f"{sum(run['seconds'] for run in data['runs'].values()) / 60:.0f} minutes; torch {about['torch']}, "
        f"{'commits' if len(commits) > 1 else 'commit'} {', '.join(commits)}.",
        "",
    ]


def _configuration(point: Point) -> str:
    options = ", ".join(f"{name} = {value}" for name, value in point.options.items())
    return f"{point.modules}; {options}; {point.trainable:,}; {point.lr:g}"


def _told(found: Sequence[Point], before: float) -> str:
    """Who leads at each budget, in a sentence."""

    def gain(point: Point) -> str:
        share = _share(point, found, before)
        return f"{point.mean:.3f}" + (f", {share:.0%}" if share is not None else "")

    parts = []
    for budget, near, lora in leaders(found):
        first = near[0]
        other = f"; LoRA {gain(lora)}" if lora is not None and lora is not first else ""
        words = f"at {budget:,} {NAMES[first.method]} ({gain(first)}{other})"
        if len(near) > 1:
            words += f", within the seeds' range of {', '.join(NAMES[point.method] for point in near[1:])}"
        parts.append(words)
    of = " (and share of what full fine-tuning gains)" if any(point.method == "full" for point in found) else ""
    return f"Fewest bits{of}: {'; '.join(parts)}." if parts else ""
