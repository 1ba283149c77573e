"""What docs/benchmarks.md says of one device."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure.results import Record, key
from benchmarks.report import text
from benchmarks.report.devices import Device, grouped


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
    groups = grouped(records)
    if not groups:
        return []
    columns = [{r["contender"]: r for r in group} for group in groups.values()]
    rows: dict[str, None] = {}
    for column in columns:
        rows.update(dict.fromkeys(column))
    shown = [name for name in rows if any("ms" in column.get(name, {}) for column in columns)]
    head = [f"{text.shape(group[0])} r{group[0].get('r', 0)} {group[0]['dtype']}" for group in groups.values()]
    floor = [
        f"{text.ms(column['frozen']).split()[0]} ms" if "ms" in column.get("frozen", {}) else "" for column in columns
    ]
    body = [["frozen, ms", *floor]]
    body += [[name, *(text.ratio(column.get(name)) for column in columns)] for name in shown if name != "frozen"]
    # A table wider than a page is split.
    lines = [f"#### {what}", ""]
    for start in range(0, len(head), 6):
        part = slice(start, start + 6)
        lines += text.table(["", *head[part]], [[row[0], *row[1:][part]] for row in body if any(row[1:][part])])
    return lines


def _mixed(records: list[Record]) -> list[str]:
    """Layers that are given an adapter per sample, over peft's: a row per batch, a column per contender."""
    if not records:
        return []
    lines = ["### One layer, an adapter per sample", "", "Time over peft LoRA's loop, without gradients.", ""]
    shown = list(dict.fromkeys(r["contender"] for r in records if r["kind"] != "peer"))
    layers: dict[str, dict[tuple[int, str], dict[str, Record]]] = {}
    for r in records:
        rows = layers.setdefault(f"N×K = {r['n'][0]}×{r['k']}, {r['dtype']}", {})
        rows.setdefault((r["m"], r["mode"].partition(", ")[2]), {})[r["contender"]] = r
    for layer, rows in layers.items():
        body = [
            [
                str(m),
                words,
                *(f"{c[name]['over_peer']['median']:.2f}" if "over_peer" in c.get(name, {}) else "" for name in shown),
            ]
            for (m, words), c in rows.items()
        ]
        lines += [f"#### {layer}", "", *text.table(["samples", "", *shown], body)]
    return lines


def _details(records: list[Record]) -> list[str]:
    lora = next((r["ms"]["median"] for r in records if r["contender"] == "peft-lora" and "ms" in r), None)
    rows = []
    for r in sorted((r for r in records if "ms" in r), key=lambda r: r["ms"]["median"]):
        memory = r.get("memory", {})
        rows.append(
            [
                r["contender"],
                text.ms(r),
                f"{r['ratio']['median']:.2f} [{r['ratio']['q1']:.2f}, {r['ratio']['q3']:.2f}]" if "ratio" in r else "",
                f"{r['ms']['median'] / lora:.2f}" if lora else "",
                f"{r['percent_of_product']:.0f}" if "percent_of_product" in r else "",
                text.size(memory["saved"]) if "saved" in memory else "",
                text.size(memory["peak"]) if memory else "",
                text.size(memory["parameters"] + memory["gradients"] + memory["optimiser"]) if memory else "",
                r.get("algorithm", ""),
            ]
        )
    head = ["", "ms [quartiles]", "× frozen", "× peft LoRA", "% of product", "saved beyond x", "peak", "trained state"]
    return text.table([*head, "algorithm"], rows)


def _models(records: list[Record]) -> list[str]:
    lines: list[str] = []
    for group in grouped(records).values():
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
                text.ms(r),
                text.ratio(r),
                f"{r['tokens_per_s']:.0f}",
                text.size(r["memory"]["peak"]) if "memory" in r else "",
                text.size(r["memory"]["optimiser"]) if "memory" in r else "",
            ]
            for r in group
            if "ms" in r
        ]
        lines += text.table(["", "r", "ms [quartiles]", "× frozen", "tokens/s", "peak", "optimiser"], rows)
    return lines


def _fitting(records: list[Record]) -> list[str]:
    head = ["model", "what", "", "largest", "× frozen"]
    frozen = {key(r): r["largest"] for r in records if r["contender"] == "frozen"}
    rows = []
    for r in records:
        floor = frozen.get(key(r))
        share = f"{r['largest'] / floor:.2f}" if floor else ""
        rows.append([r["model"]["name"], r["mode"], r["contender"], str(r["largest"]), share])
    return text.table(head, rows)


def _answers(records: list[Record]) -> list[str]:
    """Gains of the answer to a small update."""
    lines: list[str] = []
    for group in grouped(records).values():
        at = list(group[0]["gains"])
        lines += [f"#### {text.shape(group[0])} r{group[0]['r']} {group[0]['dtype']}", ""]
        head = ["", *(f"{what} at ‖ΔW‖/‖W0‖ = {ratio}" for ratio in at for what in ("y", "dX"))]
        rows = [[r["contender"], *(f"{r['gains'][a][what]:.3f}" for a in at for what in ("y", "dx"))] for r in group]
        lines += text.table(head, rows)
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
            text.size(s["bytes"]),
            f"{s['times']:g}",
        ]
        for s in slow
    ]
    head = ["kernel", "in", "M×N×K", "µs a step", "bytes", "× their time at the copy ceiling"]
    return ["### Kernels slower than 1.5 times their bytes", "", *text.table(head, rows)]


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
    return ["### Plans that were measured", "", *text.table(head, rows)]


def of_device(device: Device, charts: list[Path], docs: Path) -> list[str]:
    records = device.records
    lines = [f"## {device.name}", "", *_environment(device)]
    lines += [f"![{chart.stem}]({chart.relative_to(docs).as_posix()})" for chart in charts] + [""]
    typical = device.typical()
    if typical:
        lines += [f"### One layer: {text.shape(typical[0])}, r = {typical[0]['r']}, {typical[0]['dtype']}", ""]
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
    lines += _mixed([r for r in records if r["suite"] == "mixed" and "model" not in r])
    models = [r for r in records if r["suite"] in ("model", "block", "mixed") and "model" in r and "ms" in r]
    if models:
        lines += ["### Whole models and blocks", "", *_models(models)]
    fitting = [r for r in records if "largest" in r]
    if fitting:
        lines += ["### What fits", "", *_fitting(fitting)]
    swaps = [r for r in records if r["suite"] == "swap" and "ms" in r]
    if swaps:
        lines += [f"### Swapping {swaps[0]['layers']} layers of a {swaps[0]['model']['name']} shape", ""]
        rows = [[r["contender"], f"{r['ms']['median']:.0f}", f"{r['save_ms']['median']:.0f}"] for r in swaps]
        lines += text.table(["", "adapt, ms", "save, ms"], rows)
    answered = [r for r in records if "gains" in r]
    if answered:
        lines += ["### Gain of the answer to a small update (1 is right)", "", *_answers(answered)]
    lines += [*_slow(device), *_sweep(device)]
    withheld = sorted({(r["contender"], r["withheld"]) for r in records if "withheld" in r})
    if withheld:
        lines += ["### Withheld", "", *(f"- {name}: {why}" for name, why in withheld), ""]
    lines += ["### Runs", ""]
    rows = [[d["run"]["date"], d["run"]["commit"], f"`{d['run']['command']}`"] for d in device.runs]
    return lines + text.table(["date", "commit", "command"], rows)
