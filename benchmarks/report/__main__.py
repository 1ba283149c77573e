"""From result files to docs/benchmarks.md, its charts, and the README's picture and table of methods.

python -m benchmarks.report                       writes docs/benchmarks.md, docs/charts, the README between markers
python -m benchmarks.report --compare OLD NEW     what became slower or larger; exit code 1 past --threshold
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import adaptation
from benchmarks.measure import results
from benchmarks.measure.results import Record, key
from benchmarks.measure.shapes import CPU_GOAL
from benchmarks.report import goals

UNMEASURED = {"gpu": "not measured (needs a GPU)", "cpu": "not measured"}


# ---- text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _ms(record: Record) -> str:
    ms = record["ms"]
    return f"{ms['median']:.4g} [{ms['q1']:.4g}, {ms['q3']:.4g}]"


def _ratio(record: Record | None) -> str:
    if record is None:
        return ""
    if "ratio" not in record:
        return "withheld" if "withheld" in record else ""
    return f"{record['ratio']['median']:.2f}"


def _shape(record: Record) -> str:
    if "model" in record:
        return str(record["model"]["name"])
    return f"{record['m']}×{'+'.join(map(str, record['n']))}×{record['k']}"


def _grouped(records: Iterable[Record]) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


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


class Device:
    """What is known of one device: its runs, oldest first, and each comparison as its newest run measured it."""

    def __init__(self, slug: str, runs: list[dict[str, Any]]) -> None:
        self.slug, self.runs = slug, runs
        self.records = results.newest(runs)
        last = runs[-1]["run"]
        self.type, self.name = last["device"]["type"], last["device"]["name"]

    def last(self, field: str) -> Any:
        return next((run[field] for run in reversed(self.runs) if run.get(field)), None)

    def typical(self) -> list[Record]:
        """The comparison that stands for the device in short tables: most contenders, then goal P8's or the largest
        square layer."""
        groups = _grouped(r for r in self.records if r["suite"] == "layer" and r["mode"] == "step" and "ms" in r)
        if not groups:
            return []

        def rank(records: list[Record]) -> tuple[Any, ...]:
            first = records[0]
            goal = (first["m"], first["n"], first["k"]) in (
                (CPU_GOAL.m, list(CPU_GOAL.n), CPU_GOAL.k),
                (8192, [4096], 4096),
            )
            return goal, len(records), first["m"] * first["k"] * sum(first["n"])

        return max(groups.values(), key=rank)


def _environment(device: Device) -> list[str]:
    run, ceilings, gate = device.runs[-1]["run"], device.last("ceilings"), device.last("gate")
    about = run["device"]
    facts = [f"torch {run['torch']}", f"triton {run['triton']}", f"peft {run['peft']}", f"Python {run['python']}"]
    if about["type"] == "gpu":
        facts[:0] = [f"driver {about['driver']}", f"CUDA {run['cuda']}", f"{about['processors']} multiprocessors"]
    else:
        facts[:0] = [f"{about['threads']} threads"]
    lines = [f"{device.name}: {', '.join(facts)}.", ""]
    if about["type"] == "cpu" and run.get("load", 0.0) > 0.5:
        lines += [
            f"Other processes were running (load {run['load']:g} before the run), which makes times longer and more "
            "spread out; ratios within a run are less affected.",
            "",
        ]
    if ceilings:
        products = ", ".join(f"{name} {value:.3g} TFLOP/s" for name, value in ceilings["product_tflops"].items())
        lines += [
            f"Ceilings measured in the run: copy {ceilings['copy_gb_per_s']:.3g} GB/s (read plus written), product of "
            f"{ceilings['product_side']}² matrices {products}.",
            "",
        ]
    if gate:
        green = gate["checks"] - len(gate["failed"])
        lines += [f"Hardware gate: {green} of {gate['checks']} set-ups green ({gate['listed']} listed).", ""]
        lines += [f"- red: {f['what']}: {f.get('error', f.get('worst'))}" for f in gate["failed"]]
    memcheck = device.last("memcheck")
    if memcheck:
        lines += [f"compute-sanitizer's memcheck: {memcheck['result']}.", ""]
    return lines


def _matrix(records: list[Record], what: str) -> list[str]:
    """Ratios to the frozen layer, one column per comparison."""
    groups = _grouped(records)
    if not groups:
        return []
    columns = [{r["contender"]: r for r in group} for group in groups.values()]
    rows: dict[str, None] = {}
    for column in columns:
        rows.update(dict.fromkeys(column))
    shown = [name for name in rows if any("ms" in column.get(name, {}) for column in columns)]
    head = [f"{_shape(group[0])} r{group[0].get('r', 0)} {group[0]['dtype']}" for group in groups.values()]
    floor = [f"{_ms(column['frozen']).split()[0]} ms" if "ms" in column.get("frozen", {}) else "" for column in columns]
    body = [["frozen, ms", *floor]]
    body += [[name, *(_ratio(column.get(name)) for column in columns)] for name in shown if name != "frozen"]
    # A table wider than a page is split.
    lines = [f"#### {what}", ""]
    for start in range(0, len(head), 6):
        part = slice(start, start + 6)
        lines += _table(["", *head[part]], [[row[0], *row[1:][part]] for row in body if any(row[1:][part])])
    return lines


def _details(records: list[Record]) -> list[str]:
    lora = next((r["ms"]["median"] for r in records if r["contender"] == "peft-lora" and "ms" in r), None)
    rows = []
    for r in sorted((r for r in records if "ms" in r), key=lambda r: r["ms"]["median"]):
        memory = r.get("memory", {})
        rows.append(
            [
                r["contender"],
                _ms(r),
                f"{r['ratio']['median']:.2f} [{r['ratio']['q1']:.2f}, {r['ratio']['q3']:.2f}]" if "ratio" in r else "",
                f"{r['ms']['median'] / lora:.2f}" if lora else "",
                f"{r['percent_of_product']:.0f}" if "percent_of_product" in r else "",
                _bytes(memory["saved"]) if "saved" in memory else "",
                _bytes(memory["peak"]) if memory else "",
                _bytes(memory["parameters"] + memory["gradients"] + memory["optimiser"]) if memory else "",
                r.get("algorithm", ""),
            ]
        )
    head = ["", "ms [quartiles]", "× frozen", "× peft LoRA", "% of product", "saved beyond x", "peak", "trained state"]
    return _table([*head, "algorithm"], rows)


def _models(records: list[Record]) -> list[str]:
    lines: list[str] = []
    for group in _grouped(records).values():
        size = group[0]["model"]
        lines += [
            f"#### {size['name']}: {size['layers']} layers of {size['hidden']}, {size['batch']}×{size['sequence']} "
            f"tokens, {group[0]['dtype']}, {group[0]['mode']}",
            "",
        ]
        rows = [
            [
                r["contender"],
                str(r["r"] or ""),
                _ms(r),
                _ratio(r),
                f"{r['tokens_per_s']:.0f}",
                _bytes(r["memory"]["peak"]) if "memory" in r else "",
                _bytes(r["memory"]["optimiser"]) if "memory" in r else "",
            ]
            for r in group
            if "ms" in r
        ]
        lines += _table(["", "r", "ms [quartiles]", "× frozen", "tokens/s", "peak", "optimiser"], rows)
    return lines


def _fitting(records: list[Record]) -> list[str]:
    head = ["model", "what", "", "largest", "× frozen"]
    frozen = {key(r): r["largest"] for r in records if r["contender"] == "frozen"}
    rows = []
    for r in records:
        floor = frozen.get(key(r))
        share = f"{r['largest'] / floor:.2f}" if floor else ""
        rows.append([r["model"]["name"], r["mode"], r["contender"], str(r["largest"]), share])
    return _table(head, rows)


def _answers(records: list[Record]) -> list[str]:
    """Gains of the answer to a small update."""
    lines: list[str] = []
    for group in _grouped(records).values():
        at = list(group[0]["gains"])
        lines += [f"#### {_shape(group[0])} r{group[0]['r']} {group[0]['dtype']}", ""]
        head = ["", *(f"{what} at ‖ΔW‖/‖W0‖ = {ratio}" for ratio in at for what in ("y", "dX"))]
        rows = [[r["contender"], *(f"{r['gains'][a][what]:.3f}" for a in at for what in ("y", "dx"))] for r in group]
        lines += _table(head, rows)
    return lines


def _slow(device: Device) -> list[str]:
    """Kernels that move their bytes too slowly, in the newest run that looked for them."""
    slow = device.last("slow_kernels")
    if not slow:
        return []
    rows = [
        [
            s["kernel"],
            s["contender"],
            f"{s['shape']} r{s['r']}",
            f"{s['us']:.4g}",
            _bytes(s["bytes"]),
            f"{s['times']:g}",
        ]
        for s in slow
    ]
    head = ["kernel", "in", "M×N×K", "µs a step", "bytes", "× their time at the copy ceiling"]
    return ["### Kernels slower than 1.5 times their bytes", "", *_table(head, rows)]


def _sweep(device: Device) -> list[str]:
    sweep = device.last("sweep")
    if not sweep:
        return []
    rows = [
        [
            e["operation"],
            f"{e['m']}×{e['n']}×{e['k']}",
            str(e["r"]),
            e["best"]["algorithm"],
            f"{e['best']['ratio']:.3f}",
            f"{e['default']['ratio']:.3f}",
            ", ".join(f"{name} {ms / e['floor_ms']:.3f}" for name, ms in sorted(e["families"].items())),
            str(e["measured"]),
        ]
        for e in sweep
    ]
    head = ["operation", "M×N×K", "r", "won", "× product", "default plan", "best of each family", "plans"]
    return ["### Plans that were measured", "", *_table(head, rows)]


def _device(device: Device, charts: list[Path], docs: Path) -> list[str]:
    records = device.records
    lines = [f"## {device.name}", "", *_environment(device)]
    lines += [f"![{chart.stem}]({chart.relative_to(docs).as_posix()})" for chart in charts] + [""]
    typical = device.typical()
    if typical:
        lines += [f"### One layer: {_shape(typical[0])}, r = {typical[0]['r']}, {typical[0]['dtype']}", ""]
        lines += ["Forward and backward, interleaved in one run.", "", *_details(typical)]
    lines += ["### Time over the frozen layer", ""]
    for suite in ("layer", "peers", "generated"):
        for mode, words in (
            ("step", "forward and backward"),
            ("forward", "forward"),
            ("decode", "decode"),
            ("call", "host time of a call"),
            ("call-eval", "host time of a call without gradient"),
        ):
            for r in sorted({x["r"] for x in records if x["suite"] == suite and "model" not in x}):
                own = [x for x in records if (x["suite"], x["mode"], x.get("r")) == (suite, mode, r)]
                lines += _matrix(own, f"{suite}, {words}, r = {r}")
    models = [r for r in records if r["suite"] in ("model", "block", "mixed") and "ms" in r]
    if models:
        lines += ["### Whole models and blocks", "", *_models(models)]
    fitting = [r for r in records if "largest" in r]
    if fitting:
        lines += ["### What fits", "", *_fitting(fitting)]
    swaps = [r for r in records if r["suite"] == "swap" and "ms" in r]
    if swaps:
        lines += [f"### Swapping {swaps[0]['layers']} layers of a {swaps[0]['model']['name']} shape", ""]
        rows = [[r["contender"], f"{r['ms']['median']:.0f}", f"{r['save_ms']['median']:.0f}"] for r in swaps]
        lines += _table(["", "adapt, ms", "save, ms"], rows)
    answered = [r for r in records if "gains" in r]
    if answered:
        lines += ["### Gain of the answer to a small update (1 is right)", "", *_answers(answered)]
    lines += [*_slow(device), *_sweep(device)]
    withheld = sorted({(r["contender"], r["withheld"]) for r in records if "withheld" in r})
    if withheld:
        lines += ["### Withheld", "", *(f"- {name}: {why}" for name, why in withheld), ""]
    lines += ["### Runs", ""]
    rows = [[d["run"]["date"], d["run"]["commit"], f"`{d['run']['command']}`"] for d in device.runs]
    return lines + _table(["date", "commit", "command"], rows)


def _spread(bits: Sequence[float]) -> str:
    return f"{statistics.mean(bits):.3f} [{min(bits):.3f}, {max(bits):.3f}]"


def _adaptation(data: Record, chart: Path, docs: Path) -> list[str]:
    """Methods at one parameter budget, on one device."""
    about, steps = data["about"], data["steps"]
    task, rows = about["task"], adaptation.rows(data)
    device = f"{about['device']['name']}, {about['device'].get('threads', '')} threads".removesuffix(",  threads")
    loads = [steps["load"], *(run["load"] for run in data["runs"].values())]
    commits = sorted({steps["commit"], *(run["commit"] for run in data["runs"].values())})
    lines = [
        f"### On {device}",
        "",
        f"The task of `make demo`: a byte-level Llama ({task['layers']} layers of {task['hidden']}), pre-trained on "
        f"source code, adapted to prose in {task['adapt_steps']} steps of {task['batch_size']}×{task['seq_len']} bytes "
        f"on {', '.join(task['target_modules'])}. The base has {adaptation.before(data):.3f} bits per byte on the "
        f"held-out prose. Each method except full fine-tuning is sized as close as possible to {about['budget']:,} "
        "trainable parameters. Bits per byte are the mean and range over "
        f"{len(about['seeds'])} seeds; methods whose ranges overlap cannot be told apart. The time of a step is "
        "relative to LoRA (peft): median and quartiles over interleaved rounds. Memory is the peak of a run's process, "
        "median over the seeds"
        + (", of which the libraries alone take " if about["device"]["type"] == "cpu" else ", on top of ")
        + f"{statistics.median(row.idle for row in rows):.0f} MiB.",
        "",
        *_table(
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
                    _spread(row.bits),
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
    tuned = adaptation.tuned(data)
    lines += [
        "Learning rates: the best of those tried with another seed, with the bits per byte of each.",
        "",
        *_table(
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
) -> str:
    """docs/benchmarks.md. `adapted`: result files of `benchmarks.adaptation`, each with its chart."""
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
        *_table(["", "goal", "measured on", "value", "", "device"], _goal_rows(devices)),
        "Commands: " + "; ".join(f"{goal.id} `{goal.command}`" for goal in goals.GOALS) + ".",
        "",
    ]
    for slug, device in devices.items():
        lines += _device(device, charts.get(slug, []), docs)
    if adapted:
        lines += ["## Methods at one parameter budget", "", "Generated by `python -m benchmarks.adaptation`.", ""]
    for data, chart in adapted:
        lines += _adaptation(data, chart, docs)
    return "\n".join(lines).rstrip() + "\n"


# ---- the README

# Method, contender, when to take it, and what it trains at r = 16 on the q, k, v, up and down projections of
# Llama-3-8B, as docs/guides/choose.md counts it.
SHOWN = (
    ("**WeGeFT**", "genft-wegeft", "you have no reason for another: the default; also on quantised models", "0.983 M"),
    ("**GIFT** (identity)", "genft-gift", "you want one pair for all layers, or a block between φ and ψ", "0.983 M"),
    ("**GenFT** (gelu)", "genft-genft-gelu", "ΔW should have full rank, and a slower step is acceptable", "27.1 M"),
    ("**GRFT**", "genft-grft-row", "you want to train existing rows, chosen by their gradients", "15.7 M"),
    ("**LoRA**", "genft-lora", "you need a baseline, or LoRA from the start", "28.3 M"),
)


def readme_blocks(devices: dict[str, Device], adapted: Sequence[Record] = ()) -> dict[str, str]:
    """What stands between the README's markers, by the name of the pair of markers. `adapted`: result files of
    `benchmarks.adaptation`, of which the first counts."""
    return {"memory": _memory_block(devices), "methods": _methods_block(devices, adapted)}


def _memory_block(devices: dict[str, Device]) -> str:
    pairs = _memory_pairs(devices)
    if not pairs:
        return ""
    name, other, ours = pairs[0]
    place = "in peft" if other["contender"].startswith("peft-") else "with the released formulation"
    return (
        f"Memory kept for the backward pass by {_case(ours)}, beyond the layer's input. {name}: "
        f"{_bytes(ours['memory']['saved'])}, against {_bytes(other['memory']['saved'])} {place}.\n"
    )


def _methods_block(devices: dict[str, Device], adapted: Sequence[Record]) -> str:
    typical = [{r["contender"]: r for r in device.typical() if "ratio" in r} for device in devices.values()]
    typical = [records for records in typical if records]
    lines: list[str] = []
    if typical:
        rows = [
            [name, use, trains, _across(typical, contender), _bytes(own["memory"]["saved"])]
            for name, contender, use, trains in SHOWN
            if (own := next((records[contender] for records in typical if contender in records), None))
        ]
        lines += _table(["method", "use it when", "trains", "time", "memory"], rows)
        compared = [
            f"{words} {_across(typical, contender)}"
            for words, contender in (("peft's LoRA takes", "peft-lora"), ("training the whole weight", "trainable"))
            if any(contender in records for records in typical)
        ]
        lines += [
            "Trains: parameters at r = 16 on the q, k, v, up and down projections of Llama-3-8B. Time: forward and "
            f"backward of {_case(next(iter(typical[0].values())))}, relative to the frozen layer, on "
            f"{' and '.join(device.name for device in devices.values() if device.typical())}"
            f"{'; ' if compared else ''}{', '.join(compared)}. Memory: kept for backward beyond the layer's input.",
            "",
        ]
    for data in adapted[:1]:
        best: dict[str, float] = {}
        for row in adaptation.rows(data):
            best.setdefault(row.name.split(" (")[0], statistics.mean(row.bits))
        full = best.pop("full fine-tuning", None)
        if best:
            lines += [
                f"**{next(iter(best))} leads** on our small task at {data['about']['budget']:,} trainable parameters. "
                f"Held-out bits per byte: {', '.join(f'{name} {bits:.2f}' for name, bits in best.items())}"
                + (f"; full fine-tuning {full:.2f}." if full else "."),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n" if lines else ""


def _case(record: Record) -> str:
    """In words: the layer of a comparison."""
    n = "+".join(map(str, record["n"]))
    return f"one {n}×{record['k']} layer on {record['m']} tokens (r = {record['r']}, {record['dtype']})"


def _across(typical: list[dict[str, Record]], contender: str) -> str:
    """A contender's time over the frozen layer's, from the least to the most of the devices."""
    found = [records[contender] for records in typical if contender in records]
    found.sort(key=lambda record: record["ratio"]["median"])
    return "–".join(dict.fromkeys((_ratio(found[0]), _ratio(found[-1])))) + "×"


def refresh_readme(path: Path, blocks: dict[str, str]) -> bool:
    """Puts each block between its markers, `<!-- NAME:start -->` and `<!-- NAME:end -->`; False where the file or a
    marker is not there."""
    if not path.is_file():
        return False
    text, whole = path.read_text(), True
    for name, block in blocks.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        if start not in text or end not in text:
            whole = False
            continue
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{block}{end}{rest.split(end, 1)[1]}"
    path.write_text(text)
    return whole


# ---- charts

COLOURS = {"floor": "#7f7f7f", "genft": "#1f77b4", "peer": "#ff7f0e", "naive": "#d62728"}
MARKS = "os^Dv<>PX*"


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "genft", "font.size": 9, "axes.spines.top": False}
    )
    matplotlib.rcParams["axes.spines.right"] = False
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _chart_ratio(device: Device, path: Path) -> Path | None:
    """Ratio to the frozen layer, by method and shape."""
    records = [
        r for r in device.records if r["suite"] in ("layer", "generated") and r["mode"] == "step" and "ratio" in r
    ]
    groups = list(_grouped(records).values())[:10]
    if not groups:
        return None
    best: dict[str, float] = {}
    for group in groups:
        for r in group:
            best[r["contender"]] = min(r["ratio"]["median"], best.get(r["contender"], float("inf")))
    order = sorted(best, key=lambda name: -best[name])
    figure, axes = _figure(1, 1, 8, 0.24 * len(order) + 1.6)
    axis = axes[0][0]
    for mark, group in zip(MARKS, groups, strict=False):
        for r in group:
            ratio = r["ratio"]
            axis.errorbar(
                ratio["median"],
                order.index(r["contender"]),
                xerr=[[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]],
                fmt=mark,
                color=COLOURS[r["kind"]],
                markersize=5,
                elinewidth=1,
            )
        axis.plot([], [], mark, color="black", label=f"{_shape(group[0])} r{group[0]['r']} {group[0]['dtype']}")
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(order)), order)
    axis.set_xscale("log")
    axis.set_xlabel(f"time over the frozen layer, forward and backward; {device.name}")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.legend(fontsize=7, loc="upper right")
    return _save(figure, path)


def _chart_memory(device: Device, path: Path) -> Path | None:
    """Peak of a step and bytes saved for backward, on the device's typical layer."""
    records = sorted((r for r in device.typical() if "memory" in r), key=lambda r: -r["memory"]["peak"])
    if not records:
        return None
    figure, axes = _figure(1, 2, 9, 0.24 * len(records) + 1.2)
    for axis, field, words in zip(
        axes[0], ("peak", "saved"), ("peak of a step, MiB", "saved for backward beyond x, MiB"), strict=True
    ):
        axis.barh(
            [r["contender"] for r in records],
            [r["memory"][field] / 2**20 for r in records],
            color=[COLOURS[r["kind"]] for r in records],
        )
        axis.set_xlabel(words)
    axes[0][1].set_yticklabels([])
    figure.suptitle(f"{_shape(records[0])} r{records[0]['r']} {records[0]['dtype']}; {device.name}", fontsize=9)
    return _save(figure, path)


# What the memory of a method is compared with: the formulation of its released code, or peft's own layer.
COMPARED = (
    ("GenFT (gelu)", "genft-genft-gelu", ("released-genft-gelu", "naive-genft-gelu")),
    ("GenFT (leaky ReLU)", "genft-genft-leakyrelu", ("released-genft-leakyrelu", "naive-genft-leakyrelu")),
    ("GenFT (linear)", "genft-genft-linear", ("naive-genft-linear",)),
    ("PEANuT", "genft-peanut", ("peft-peanut",)),
    ("WeGeFT", "genft-wegeft", ("naive-wegeft",)),
    ("GIFT", "genft-gift", ("naive-gift",)),
    ("LoRA", "genft-lora", ("peft-lora",)),
)


def _memory_pairs(devices: dict[str, Device]) -> list[tuple[str, Record, Record]]:
    """Method, the formulation that it is compared with, and ours, from the device on which most of COMPARED was
    measured: what is kept for backward does not depend on the device."""
    found = []
    for device in devices.values():
        records = {r["contender"]: r for r in device.typical() if "memory" in r}
        pairs = [
            (name, records[other], records[own])
            for name, own, others in COMPARED
            if own in records and (other := next((o for o in others if o in records), None))
        ]
        released = sum(other["contender"].startswith("released-") for _, other, _ in pairs)
        found.append((released, len(pairs), pairs))
    return max(found, key=lambda item: item[:2], default=(0, 0, []))[2]


def _chart_kept(devices: dict[str, Device], path: Path) -> Path | None:
    """The README's picture: bytes saved for backward, method by method, beside the released formulation."""
    pairs = _memory_pairs(devices)
    if not pairs:
        return None
    figure, axes = _figure(1, 1, 8, 0.42 * len(pairs) + 1.1)
    axis = axes[0][0]
    for which, offset, colour, words in (
        (1, -0.19, COLOURS["naive"], "released formulation (PEANuT and LoRA: peft)"),
        (2, 0.19, COLOURS["genft"], "genft"),
    ):
        saved = [pair[which]["memory"]["saved"] for pair in pairs]
        places = [place + offset for place in range(len(pairs))]
        axis.barh(places, [count / 2**20 for count in saved], height=0.36, color=colour, label=words)
        for place, count in zip(places, saved, strict=True):
            at = (count / 2**20, place)
            axis.annotate(_bytes(count), at, (3, 0), textcoords="offset points", va="center", size=8)
    axis.set_yticks(range(len(pairs)), [pair[0] for pair in pairs])
    axis.invert_yaxis()
    axis.set_xlabel("MiB kept for the backward pass, beyond the layer's input")
    axis.set_title(_case(pairs[0][2]), fontsize=9)
    axis.margins(x=0.08)
    axis.legend(loc="lower right", frameon=False)
    return _save(figure, path)


def _chart_roofline(device: Device, path: Path) -> Path | None:
    """Rates over arithmetic intensity, both of the floor's operations and bytes, under the run's ceilings."""
    ceilings = device.last("ceilings")
    records = [
        r
        for r in device.records
        if r["suite"] in ("layer", "generated", "scaling")
        and r["mode"] in ("step", "decode")
        and r.get("tflops")
        and (r["contender"] in ("frozen", "peft-lora") or r["contender"] == f"genft-{r['method']}")
    ]
    if not ceilings or not records:
        return None
    figure, axes = _figure(1, 1, 8, 4.5)
    axis = axes[0][0]
    styles = dict(zip(dict.fromkeys(r["contender"] for r in records), MARKS, strict=False))
    intensity = [r["floor_operations"] / r["floor_bytes"] for r in records]
    for r, x in zip(records, intensity, strict=True):
        mark = styles.get(r["contender"], ".")
        axis.plot(x, r["tflops"], mark, color=COLOURS[r["kind"]], markersize=4, alpha=0.8)
    for name, mark in styles.items():
        kind = next(r["kind"] for r in records if r["contender"] == name)
        axis.plot([], [], mark, color=COLOURS[kind], label=name)
    low, high = min(intensity) / 1.5, max(intensity) * 1.5
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        top = ceilings["product_tflops"].get(names.get(dtype, dtype))
        if top:
            slope = ceilings["copy_gb_per_s"] / 1e3
            knee = top / slope
            xs = [low, *([knee] if low < knee < high else []), high]
            axis.plot(xs, [min(top, slope * x) for x in xs], color="black", linewidth=1)
            axis.annotate(f"product, {dtype}", (high, top), fontsize=7, ha="right", va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of the floor", ylabel="TFLOP/s of the floor")
    for each, (first, last) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        each.set_major_formatter("{x:g}")
        if last / first < 10:  # perhaps no power of ten in sight
            each.set_minor_formatter("{x:g}")
        else:
            each.set_minor_formatter("")
    axis.set_title(device.name, fontsize=9)
    axis.legend(fontsize=7)
    return _save(figure, path)


def _chart_scaling(device: Device, path: Path) -> Path | None:
    """Time and peak memory as M, N = K, r and the number of layers grow, the frozen floor drawn in."""
    records = [r for r in device.records if r["suite"] == "scaling" and "ms" in r]
    if not records:
        return None
    sized = [r for r in records if "model" not in r]
    deep = [r for r in records if "model" in r]
    if not sized:
        return None
    # The point that all curves share is the one that most other points differ from in one size only.
    points = {(r["m"], r["k"], r["r"]) for r in sized}
    common = max(points, key=lambda p: sum(sum(a != b for a, b in zip(p, q, strict=True)) == 1 for q in points))
    panels: list[tuple[str, list[Record], Callable[[Record], float]]] = []
    for index, (words, field) in enumerate((("M", "m"), ("N = K", "k"), ("r", "r"))):
        own = [
            r
            for r in sized
            if all(value == common[i] for i, value in enumerate((r["m"], r["k"], r["r"])) if i != index)
        ]
        panels.append((words, own, lambda r, field=field: r[field]))  # type: ignore[misc]
    if deep:
        panels.append(("layers", deep, lambda r: r["model"]["layers"]))
    every = list(dict.fromkeys(r["contender"] for r in records))
    figure, axes = _figure(2, len(panels), 3.2 * len(panels), 5.6)
    for column, (words, own, place) in enumerate(panels):
        for row, (value, label) in enumerate(
            ((lambda r: r["ms"]["median"], "ms"), (lambda r: r["memory"]["peak"] / 2**20, "peak, MiB"))
        ):
            axis = axes[row][column]
            for name in dict.fromkeys(r["contender"] for r in own):
                number = every.index(name)
                curve = sorted((r for r in own if r["contender"] == name and "memory" in r), key=place)
                kind = curve[0]["kind"] if curve else "floor"
                axis.plot(
                    [place(r) for r in curve],
                    [value(r) for r in curve],
                    color="black" if name == "frozen" else f"C{number}",
                    linestyle={"floor": "--", "genft": "-"}.get(kind, ":"),
                    marker=MARKS[number % len(MARKS)],
                    markersize=3,
                    linewidth=1,
                    label=name,
                )
            axis.set(xscale="log", yscale="log", ylabel=label if column == 0 else "")
            axis.minorticks_off()
            places = sorted({place(r) for r in own})
            axis.set_xticks(places, [f"{p:g}" for p in places], fontsize=7)
            axis.yaxis.set_major_formatter("{x:g}")
            if row == 1:
                axis.set_xlabel(words)
        if words in ("M", "layers"):
            axes[0][column].legend(fontsize=6)
    figure.suptitle(
        f"forward and backward around M = {common[0]}, N = K = {common[1]}, r = {common[2]}; {device.name}", fontsize=9
    )
    return _save(figure, path)


def _chart_adaptation(slug: str, data: Record, folder: Path) -> Path:
    """Bits per byte of each seed, time of a step and memory, by method."""
    rows = adaptation.rows(data)[::-1]
    colours = [COLOURS["genft" if row.method not in ("peft-lora", "full") else "peer"] for row in rows]
    places = range(len(rows))
    figure, axes = _figure(1, 3, 10, 0.28 * len(rows) + 1.2)
    bits, time, memory = axes[0]
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        bits.plot(row.bits, [place] * len(row.bits), "o", color=colour, markersize=4, alpha=0.6)
        bits.plot(statistics.mean(row.bits), place, "|", color="black", markersize=12)
        middle, low, high = row.relative
        time.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, markersize=5)
    time.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    memory.barh(list(places), [row.memory for row in rows], color=colours)
    bits.set_yticks(list(places), [f"{row.name}, {row.trainable:,}" for row in rows])
    for axis, words in ((bits, "held-out bits per byte"), (time, "time of a step, × peft LoRA"), (memory, "peak MiB")):
        axis.set_xlabel(words)
        axis.set_ylim(-0.6, len(rows) - 0.4)
    for axis in (time, memory):
        axis.set_yticks(list(places), [])
    figure.suptitle(data["about"]["device"]["name"], fontsize=9)
    return _save(figure, folder / f"{slug}-adaptation.svg")


def draw(device: Device, folder: Path) -> list[Path]:
    """The device's charts, those for which there are records."""
    made = (
        _chart_ratio(device, folder / f"{device.slug}-ratio.svg"),
        _chart_memory(device, folder / f"{device.slug}-memory.svg"),
        _chart_roofline(device, folder / f"{device.slug}-roofline.svg"),
        _chart_scaling(device, folder / f"{device.slug}-scaling.svg"),
    )
    return [path for path in made if path is not None]


# ---- two runs


def regressions(old: dict[str, Any], new: dict[str, Any], threshold: float, absolute: bool = False) -> list[dict]:
    """Every figure that both runs have, with its change; "worse" where it grew by more than `threshold` and, for times,
    the quartiles are apart. Times are compared as ratios to the frozen layer of their own run unless `absolute`."""
    field = "ms" if absolute else "ratio"

    def figures(data: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, float]]:
        found: dict[tuple[Any, ...], dict[str, float]] = {}
        for record in data["records"]:
            own = (*key(record), record["contender"])
            if field in record:
                found[(*own, field)] = record[field]
            for name in ("peak", "saved"):
                if name in record.get("memory", {}):
                    value = record["memory"][name]
                    found[(*own, name)] = {"median": value, "q1": value, "q3": value}
        return found

    before, after = figures(old), figures(new)
    changes = []
    for own, was in before.items():
        now = after.get(own)
        if now is None or (own[-2] == "frozen" and field == "ratio" and own[-1] == "ratio"):
            continue
        grown = now["median"] / was["median"] - 1 if was["median"] else (0.0 if not now["median"] else float("inf"))
        worse = grown > threshold and now["q1"] > was["q3"]
        changes.append({"what": own, "old": was["median"], "new": now["median"], "grown": grown, "worse": worse})
    return changes


def compare_files(old: Path, new: Path, threshold: float, absolute: bool) -> int:
    """Prints what changed; 1 where something became worse, 2 where the files have nothing in common."""
    changes = regressions(results.load(old), results.load(new), threshold, absolute)
    if not changes:
        print("the two files have no figure in common")
        return 2
    worse = [change for change in changes if change["worse"]]
    better = sum(change["grown"] < -threshold for change in changes)
    for change in sorted(worse, key=lambda change: -change["grown"]):
        what = " ".join(str(part) for part in change["what"])
        print(f"WORSE {100 * change['grown']:+6.1f} %  {change['old']:.4g} -> {change['new']:.4g}  {what}")
    print(f"{len(changes)} figures: {len(worse)} worse by more than {100 * threshold:g} %, {better} better")
    return 1 if worse else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of result files")
    parser.add_argument("--docs", type=Path, default=results.ROOT / "docs", help="folder of benchmarks.md and charts/")
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two result files")
    parser.add_argument("--threshold", type=float, default=0.05, help="with --compare: share of growth (%(default)s)")
    parser.add_argument("--absolute", action="store_true", help="with --compare: milliseconds, not ratios to the floor")
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return compare_files(*arguments.compare, arguments.threshold, arguments.absolute)
    devices = read_devices(arguments.results)
    charts = {slug: draw(device, arguments.docs / "charts") for slug, device in devices.items()}
    adapted = [
        (data, _chart_adaptation(slug, data, arguments.docs / "charts"))
        for slug, data in adaptation.load_folder(arguments.results)
    ]
    arguments.docs.mkdir(parents=True, exist_ok=True)
    (arguments.docs / "benchmarks.md").write_text(document(devices, charts, arguments.docs, adapted))
    _chart_kept(devices, arguments.docs / "charts" / "memory.svg")
    refreshed = refresh_readme(arguments.readme, readme_blocks(devices, [data for data, _ in adapted]))
    told = "README refreshed" if refreshed else "README lacks markers"
    print(
        f"{arguments.docs / 'benchmarks.md'}: {len(devices)} devices, {sum(map(len, charts.values()))} charts; {told}"
    )
    return 0


def read_devices(folder: Path) -> dict[str, Device]:
    """What the result files under a folder know of each device, by its slug, GPUs first."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for slug, data in results.load_folder(folder):
        if not data["run"]["tiny"]:
            runs.setdefault(slug, []).append(data)
    return {slug: Device(slug, own) for slug, own in sorted(runs.items(), key=lambda item: _gpu_first(item[1]))}


def _gpu_first(runs: list[dict[str, Any]]) -> tuple[bool, str]:
    device = runs[-1]["run"]["device"]
    return device["type"] != "gpu", device["name"]


if __name__ == "__main__":
    sys.exit(main())
