"""docs/benchmarks.md: the goals, every device, the methods at one parameter budget."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure.results import Record
from benchmarks.report import budget, frontier, goals, sections, text
from benchmarks.report.devices import Device

UNMEASURED = {"gpu": "not measured (needs a GPU)", "cpu": "not measured"}


def _value(finding: goals.Finding) -> str:
    return f"{finding.value:.3g}{finding.unit}"


def _goal_rows(devices: dict[str, Device]) -> list[list[str]]:
    rows = []
    for goal in goals.GOALS:
        first = True
        for device in devices.values():
            findings = goal.read(device.records) if device.type in goal.needs else []
            for number, finding in enumerate(findings):
                sign = "≥" if finding.least else "≤"
                rows.append(
                    [
                        f"**{goal.id}**" if first else "",
                        f"{goal.what}: {goal.target}" if first else "",
                        f"{finding.what}{f' ({finding.note})' if finding.note else ''}",
                        f"{_value(finding)} (goal {sign} {finding.limit:g})",
                        "met" if finding.met else "**missed**",
                        device.name if number == 0 else "",
                    ]
                )
                first = False
        if first:
            needed = UNMEASURED["gpu" if goal.needs == ("gpu",) else "cpu"]
            rows.append([f"**{goal.id}**", f"{goal.what}: {goal.target}", "", needed, "", ""])
    return rows


def _adaptation(data: Record, chart: Path, docs: Path) -> list[str]:
    """Methods at one parameter budget, on one device."""
    about, steps = data["about"], data["steps"]
    task, rows = about["task"], budget.rows(data)
    device = f"{about['device']['name']}, {about['device'].get('threads', '')} threads".removesuffix(",  threads")
    loads = [steps["load"], *(run["load"] for run in data["runs"].values())]
    commits = sorted({steps["commit"], *(run["commit"] for run in data["runs"].values())})
    lines = [
        f"### On {device}",
        "",
        f"The task of `make demo`: a byte-level Llama ({task['layers']} layers of {task['hidden']}), pre-trained on "
        f"source code, adapted to prose in {task['adapt_steps']} steps of {task['batch_size']}×{task['seq_len']} bytes "
        f"on {', '.join(task['target_modules'])}. The base has {budget.before(data):.3f} bits per byte on the "
        f"held-out prose. Each method except full fine-tuning is sized as close as possible to {about['budget']:,} "
        "trainable parameters. Bits per byte are the mean and range over "
        f"{len(about['seeds'])} seeds; methods whose ranges overlap cannot be told apart. The time of a step is "
        "relative to LoRA (peft): median and quartiles over interleaved rounds. Memory is the peak of a run's process, "
        "median over the seeds"
        + (", of which the libraries alone take " if about["device"]["type"] == "cpu" else ", on top of ")
        + f"{statistics.median(row.idle for row in rows):.0f} MiB.",
        "",
        *text.table(
            [
                "",
                "size",
                "trainable",
                "learning rate",
                "bits/byte [range]",
                "× peft LoRA [quartiles]",
                "ms/step",
                "MiB",
            ],
            [
                [
                    row.name,
                    row.knob,
                    f"{row.trainable:,}",
                    f"{row.lr:g}",
                    text.spread(row.bits),
                    f"{row.relative[0]:.2f} [{row.relative[1]:.2f}, {row.relative[2]:.2f}]",
                    f"{1e3 * row.seconds:.0f}",
                    f"{row.memory:.0f}",
                ]
                for row in rows
            ],
        ),
        f"![{chart.stem}]({chart.relative_to(docs).as_posix()})",
        "",
    ]
    if max(loads) > 0.5 and about["device"]["type"] == "cpu":
        lines += [
            f"Steps were timed at a load of {steps['load']:g}; runs started at a load of {min(loads):g} to "
            f"{max(loads):g}, including the runs of this command.",
            "",
        ]
    tuned = budget.tuned(data)
    lines += [
        "Learning rates: the best of those tried with another seed, with the bits per byte of each.",
        "",
        *text.table(
            ["", "learning rate: bits/byte"],
            [[row.name, ", ".join(f"{lr:g}: {bits:.3f}" for lr, bits in tuned[row.method])] for row in rows],
        ),
    ]
    return [*lines, f"Made with torch {about['torch']} at commits {', '.join(commits)}.", ""]


def document(
    devices: dict[str, Device],
    charts: dict[str, list[Path]],
    docs: Path,
    adapted: Sequence[tuple[Record, Path]] = (),
    frontiers: Sequence[tuple[Sequence[Record], Path]] = (),
) -> str:
    """docs/benchmarks.md. `adapted`: result files of `benchmarks.adaptation`, each with its chart; `frontiers`: those
    of `benchmarks.frontier`, of each device."""
    lines = [
        "# Benchmarks",
        "",
        "Generated by `python -m benchmarks.report` from the files in benchmarks/results; do not edit by hand.",
        "",
        "A time is the median over interleaved rounds, with quartiles; ratios are taken within each round. A contender "
        "is timed only if it passed the correctness gate in the same run: its error against float64 must be at most "
        "twice that of plain torch at the same dtype.",
        "",
        "Names: `genft-METHOD` is a `FusedGenLinear`, so GenFT with gelu is `genft-genft-gelu`; a suffix `-seeded`, "
        "`-single`, `-fused`, `-panel` or `-library` fixes the algorithm. `naive-METHOD` builds ΔW in full, as the "
        "released code does, and `released-METHOD` also applies it in a separate product, as GenFT's does. "
        "`peft-METHOD` is stock peft. `frozen` and `trainable` are `nn.Linear`.",
        "",
        "## Goals",
        "",
        "A goal that was missed or not measured stays in the table.",
        "",
        *text.table(["", "goal", "measured on", "value", "", "device"], _goal_rows(devices)),
        "Commands: " + "; ".join(f"{goal.id} `{goal.command}`" for goal in goals.GOALS) + ".",
        "",
    ]
    for slug, device in devices.items():
        lines += sections.of_device(device, charts.get(slug, []), docs)
    if adapted:
        lines += ["## Methods at one parameter budget", "", "Generated by `python -m benchmarks.adaptation`.", ""]
    for data, chart in adapted:
        lines += _adaptation(data, chart, docs)
    if frontiers:
        lines += ["## From few to many trainable parameters", "", "Generated by `python -m benchmarks.frontier`.", ""]
    for files, chart in frontiers:
        lines += frontier.section(files, chart, docs)
    return "\n".join(lines).rstrip() + "\n"
