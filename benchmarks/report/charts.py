"""The charts of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure.results import Record
from benchmarks.report import budget, frontier, text
from benchmarks.report.devices import Device, grouped
from benchmarks.report.drawing import MARKS, bar, canvas, curve, dot, line, look, over_parameters, save
from genft_cli.demo.run import NAMES
from genft_cli.palette import LOOKS, name_ends

_TICKS = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]


def _ratio(device: Device, path: Path) -> Path | None:
    """Ratio to the frozen layer, by method and shape."""
    records = [
        r for r in device.records if r["suite"] in ("layer", "generated") and r["mode"] == "step" and "ratio" in r
    ]
    groups = list(grouped(records).values())[:10]
    if not groups:
        return None
    best: dict[str, float] = {}
    for group in groups:
        for r in group:
            best[r["contender"]] = min(r["ratio"]["median"], best.get(r["contender"], float("inf")))
    order = sorted(best, key=lambda name: -best[name])
    figure, axes = canvas(1, 1, 8, 0.24 * len(order) + 1.6)
    axis = axes[0][0]
    for mark, group in zip(MARKS, groups, strict=False):
        for r in group:
            ratio = r["ratio"]
            axis.errorbar(
                ratio["median"],
                order.index(r["contender"]),
                xerr=[[ratio["median"] - ratio["q1"]], [ratio["q3"] - ratio["median"]]],
                fmt=mark,
                **dot(r),
                markersize=5,
                elinewidth=1,
            )
        axis.plot([], [], mark, color="#555555", label=f"{text.shape(group[0])} r{group[0]['r']} {group[0]['dtype']}")
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(order)), order)
    axis.set_xscale("log")
    axis.set_xlabel(f"time over the frozen layer, forward and backward; {device.name}")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="x", which="minor", labelsize=7)
    axis.grid(axis="y", alpha=0.25)
    axis.plot([], [], "o", color="#555555", markerfacecolor="white", label="not genft's")
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return save(figure, path)


def _memory(device: Device, path: Path) -> Path | None:
    """Peak of a step and bytes saved for backward, on the device's typical layer."""
    records = sorted((r for r in device.typical() if "memory" in r), key=lambda r: -r["memory"]["peak"])
    if not records:
        return None
    figure, axes = canvas(1, 2, 9, 0.24 * len(records) + 1.2)
    for axis, field, words in zip(
        axes[0], ("peak", "saved"), ("peak of a step, MiB", "saved for backward beyond x, MiB"), strict=True
    ):
        for r in records:
            axis.barh(r["contender"], r["memory"][field] / 2**20, **bar(r))
        axis.set_xlabel(words)
    axes[0][1].set_yticklabels([])
    figure.suptitle(f"{text.shape(records[0])} r{records[0]['r']} {records[0]['dtype']}; {device.name}", fontsize=9)
    return save(figure, path)


def _roofline(device: Device, path: Path) -> Path | None:
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
    figure, axes = canvas(1, 1, 8, 4.5)
    axis = axes[0][0]
    intensity = [r["floor_operations"] / r["floor_bytes"] for r in records]
    for r, x in zip(records, intensity, strict=True):
        axis.plot(x, r["tflops"], look(r).mark, **dot(r), markersize=5, alpha=0.8)
    for name in dict.fromkeys(r["contender"] for r in records):
        first = next(r for r in records if r["contender"] == name)
        axis.plot([], [], look(first).mark, **dot(first), label=name)
    low, high = min(intensity) / 1.5, max(intensity) * 1.5
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        top = ceilings["product_tflops"].get(names.get(dtype, dtype))
        if top:
            slope = ceilings["copy_gb_per_s"] / 1e3
            knee = top / slope
            xs = [low, *([knee] if low < knee < high else []), high]
            axis.plot(xs, [min(top, slope * x) for x in xs], color="black", linewidth=1)
            axis.annotate(f"product, {dtype}", (min(max(knee, low), high), top), fontsize=7, ha="left", va="bottom")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte of the floor", ylabel="TFLOP/s of the floor")
    for each, (first, last) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        each.set_major_formatter("{x:g}")
        if last / first < 10:  # perhaps no power of ten in sight
            each.set_minor_formatter("{x:g}")
        else:
            each.set_minor_formatter("")
    axis.set_title(device.name, fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right center", frameon=False)
    return save(figure, path)


def _scaling(device: Device, path: Path) -> Path | None:
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
    figure, axes = canvas(len(panels), 2, 10.5, 3.4 * len(panels))
    for row, (words, own, place) in enumerate(panels):
        for column, (value, label) in enumerate(
            ((lambda r: r["ms"]["median"], "ms"), (lambda r: r["memory"]["peak"] / 2**20, "peak, MiB"))
        ):
            axis = axes[row][column]
            ends = []
            for name in dict.fromkeys(r["contender"] for r in own):
                curve = sorted((r for r in own if r["contender"] == name and "memory" in r), key=place)
                if not curve:
                    continue
                xs, ys = [place(r) for r in curve], [value(r) for r in curve]
                style = look(curve[0])
                axis.plot(
                    xs, ys, linestyle=line(curve[0]), marker=style.mark, **dot(curve[0]), markersize=4, linewidth=1
                )
                ends.append((name, xs[-1], ys[-1], style.colour))
            axis.set(xscale="log", yscale="log", xlabel=words, ylabel=label)
            axis.minorticks_off()
            places = sorted({place(r) for r in own})
            axis.set_xticks(places, [f"{p:g}" for p in places], fontsize=8)
            axis.set_yticks([t for t in _TICKS if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]])
            axis.yaxis.set_major_formatter("{x:g}")
            name_ends(axis, ends)
    figure.suptitle(
        f"forward and backward around M = {common[0]}, N = K = {common[1]}, r = {common[2]}; {device.name}", fontsize=9
    )
    return save(figure, path)


def draw_adaptation(slug: str, data: Record, folder: Path) -> Path:
    """Bits per byte of each seed, time of a step and memory, by method."""
    rows = budget.rows(data)[::-1]
    colours = [LOOKS[row.method].colour for row in rows]
    places = range(len(rows))
    figure, axes = canvas(1, 3, 10, 0.28 * len(rows) + 1.2)
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
    return save(figure, folder / f"{slug}-adaptation.svg")


def draw_frontier(slug: str, files: Sequence[Record], folder: Path) -> Path:
    """Bits held out over trainable parameters, a line for each method; a panel for each target task and base."""
    tasks = list(dict.fromkeys(data["task"] for data in files))
    depths = sorted({data["depth"] for data in files})
    figure, axes = canvas(len(tasks), len(depths), 4.2 * len(depths) + 2, 3.8 * len(tasks) + 0.4)
    for row in axes:
        for axis in row:
            axis.set_visible(False)
    shown = {}
    for data in files:
        axis = axes[tasks.index(data["task"])][depths.index(data["depth"])]
        axis.set_visible(True)
        found = frontier.points(data)
        for method in (name for name in LOOKS if any(point.method == name for point in found)):
            own = sorted((point for point in found if point.method == method), key=lambda point: point.trainable)
            shown[NAMES[method]] = curve(
                axis, method, [point.trainable for point in own], [point.bits for point in own]
            )
        best = frontier.pareto(found)
        (shown["Pareto set"],) = axis.plot(
            [point.trainable for point in best],
            [point.mean for point in best],
            "o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor="black",
            markeredgewidth=0.8,
        )
        before = data["about"]["before"]["bits"]
        shown["the base"] = axis.axhline(before, color="black", linewidth=0.8, linestyle="--")
        # Learning rates are chosen on other text: what is worse than the base here is not worth the room.
        low = min(point.mean for point in found)
        axis.set_ylim(low - 0.08 * (before - low), before + 0.12 * (before - low))
        axis.set_ylabel(f"held-out bits per {'byte' if data['task'] == 'prose' else 'label'}")
        over_parameters(axis, f"{data['task']}, {data['depth']} layers of {data['about']['base']['hidden']}")
    figure.legend(
        list(shown.values()), list(shown), fontsize=8, loc="outside right center", ncols=1, frameon=False
    )  # fmt: skip
    figure.suptitle(files[0]["about"]["device"]["name"], fontsize=9)
    return save(figure, folder / f"{slug}-frontier.svg")


def draw(device: Device, folder: Path) -> list[Path]:
    """The device's charts, those for which there are records."""
    made = (
        _ratio(device, folder / f"{device.slug}-ratio.svg"),
        _memory(device, folder / f"{device.slug}-memory.svg"),
        _roofline(device, folder / f"{device.slug}-roofline.svg"),
        _scaling(device, folder / f"{device.slug}-scaling.svg"),
    )
    return [path for path in made if path is not None]
