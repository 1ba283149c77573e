"""The README's pictures, and what stands between its markers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure.results import Record
from benchmarks.report import budget, frontier, text
from benchmarks.report.devices import Device
from benchmarks.report.drawing import bar, canvas, curve, over_parameters, save
from genft_cli.palette import LOOKS, name_ends

# Method, contender, when to take it, and what it trains at r = 16 on the q, k, v, up and down projections of
# Llama-3-8B, as docs/guides/choose.md counts it.
SHOWN = (
    ("**WeGeFT**", "genft-wegeft", "you have no reason for another: the default; also on quantised models", "0.983 M"),
    ("**GIFT** (identity)", "genft-gift", "you want one pair for all layers, or a block between φ and ψ", "0.983 M"),
    ("**GenFT** (gelu)", "genft-genft-gelu", "ΔW should have full rank, and a slower step is acceptable", "27.1 M"),
    ("**GRFT**", "genft-grft-row", "you want to train existing rows, chosen by their gradients", "15.7 M"),
    ("**LoRA**", "genft-lora", "you need a baseline, or LoRA from the start", "28.3 M"),
)

# What the memory of a method is compared with: the formulation of its released code, or peft's own layer.
COMPARED = (
    ("GenFT (gelu)", "genft-genft-gelu", ("released-genft-gelu", "naive-genft-gelu")),
    ("GenFT (leaky ReLU)", "genft-genft-leakyrelu", ("released-genft-leakyrelu", "naive-genft-leakyrelu")),
    ("GenFT (linear)", "genft-genft-linear", ("naive-genft-linear",)),
    ("PEANuT", "genft-peanut", ("peft-peanut",)),
    ("HiRA", "genft-hira", ("peft-hira",)),
    ("WeGeFT", "genft-wegeft", ("naive-wegeft",)),
    ("GIFT", "genft-gift", ("naive-gift",)),
    ("LoRA", "genft-lora", ("peft-lora",)),
)

CURVES = ("wegeft", "gift", "lora")  # of the README's first picture


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


def blocks(
    devices: dict[str, Device], adapted: Sequence[Record] = (), frontiers: Sequence[Record] = ()
) -> dict[str, str]:
    """What is between the README's markers, by the name of the pair of markers. `adapted`, `frontiers`: result files
    of `benchmarks.adaptation`, of which the first counts, and of `benchmarks.frontier`, all of one device."""
    return {
        "quality": _quality_block(frontiers),
        "memory": _memory_block(devices),
        "methods": _methods_block(devices, adapted),
    }


def _memory_block(devices: dict[str, Device]) -> str:
    pairs = _memory_pairs(devices)
    if not pairs:
        return ""
    name, other, ours = pairs[0]
    place = "in peft" if other["contender"].startswith("peft-") else "with the released formulation"
    return (
        f"Memory kept for the backward pass by {text.case(ours)}, beyond the layer's input. {name}: "
        f"{text.size(ours['memory']['saved'])}, against {text.size(other['memory']['saved'])} {place}.\n"
    )


def _methods_block(devices: dict[str, Device], adapted: Sequence[Record]) -> str:
    typical = [{r["contender"]: r for r in device.typical() if "ratio" in r} for device in devices.values()]
    typical = [records for records in typical if records]
    lines: list[str] = []
    if typical:
        rows = [
            [name, use, trains, _across(typical, contender), text.size(own["memory"]["saved"])]
            for name, contender, use, trains in SHOWN
            if (own := next((records[contender] for records in typical if contender in records), None))
        ]
        lines += text.table(["method", "use it when", "trains", "time", "memory"], rows)
        compared = [
            f"{words} {_across(typical, contender)}"
            for words, contender in (("peft's LoRA takes", "peft-lora"), ("training the whole weight", "trainable"))
            if any(contender in records for records in typical)
        ]
        lines += [
            "Trains: parameters at r = 16 on the q, k, v, up and down projections of Llama-3-8B. Time: forward and "
            f"backward of {text.case(next(iter(typical[0].values())))}, relative to the frozen layer, on "
            f"{' and '.join(device.name for device in devices.values() if device.typical())}"
            f"{'; ' if compared else ''}{', '.join(compared)}. Memory: kept for backward beyond the layer's input.",
            "",
        ]
    for data in adapted[:1]:
        best: dict[str, float] = {}
        for row in budget.rows(data):
            best.setdefault(_short(row.name), statistics.mean(row.bits))
        full = best.pop("full fine-tuning", None)
        if best:
            lines += [
                f"**{next(iter(best))} leads** on our small task at {data['about']['budget']:,} trainable parameters. "
                f"Held-out bits per byte: {', '.join(f'{name} {bits:.2f}' for name, bits in best.items())}"
                + (f"; full fine-tuning {full:.2f}." if full else "."),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n" if lines else ""


def _quality_block(files: Sequence[Record]) -> str:
    """Who leads with the fewest parameters, and with the most that are not a quarter of the model."""
    files = [data for data in files if data["about"]["finished"]]
    told = frontier.shares(files)
    sizes = sorted(data["about"]["parameters"] for data in files)
    budgets = sorted({budget for own in told.values() for _, budget in own if budget <= sizes[0] / 4})
    if not budgets:
        return ""
    parts = []
    for limit in dict.fromkeys((budgets[0], budgets[-1])):
        own = {
            method: {task: found[method, limit] for task, found in told.items() if (method, limit) in found}
            for method in frontier.NAMES
        }
        # Those that have a figure for every task, by the mean of the tasks' means.
        full = {method: of for method, of in own.items() if len(of) == len(told)}
        order = sorted(full, key=lambda method: -statistics.mean(map(statistics.mean, full[method].values())))
        shown = dict.fromkeys([order[0], *(method for method in CURVES if method in full)])
        listed = ", ".join(f"{_short(frontier.NAMES[method])} {_shares(full[method])}" for method in shown)
        parts.append(f"with {limit:,}, {listed}")
    depths = sorted({data["depth"] for data in files})
    millions = dict.fromkeys(f"{size / 1e6:.2f}" for size in (sizes[0], sizes[-1]))
    return (
        "Share of what full fine-tuning gains on small models of "
        f"{', '.join(map(str, depths[:-1]))}{' and ' if depths[:-1] else ''}{depths[-1]} layers "
        f"({'–'.join(millions)} million parameters), by trained parameters: {'; '.join(parts)}. "
        "[From few to many](docs/benchmarks.md#from-few-to-many-trainable-parameters) has every method and curve.\n"
    )


def _short(name: str) -> str:
    """A method's name without its variant."""
    return name.split(" (")[0]


def _shares(of: dict[str, list[float]]) -> str:
    """Each task's share, from the least to the most of the bases."""
    told = []
    for task, found in of.items():
        low, high = (f"{100 * value:.0f}" for value in (min(found), max(found)))
        told.append(f"{low if low == high else f'{low}–{high}'}% ({task})")
    return " and ".join(told)


def _across(typical: list[dict[str, Record]], contender: str) -> str:
    """A contender's time over the frozen layer's, from the least to the most of the devices."""
    found = [records[contender] for records in typical if contender in records]
    found.sort(key=lambda record: record["ratio"]["median"])
    return "–".join(dict.fromkeys((text.ratio(found[0]), text.ratio(found[-1])))) + "×"


def draw_shares(files: Sequence[Record], path: Path) -> Path | None:
    """The README's first picture: share of what full fine-tuning gains, by budget, a panel for each target task; mean
    and range over the bases."""
    told = frontier.shares([data for data in files if data["about"]["finished"]])
    if not told:
        return None
    figure, axes = canvas(1, len(told), 4.4 * len(told), 3.2)
    for axis, (task, found) in zip(axes[0], told.items(), strict=True):
        bases, ends = max(map(len, found.values())), []
        for method in CURVES:
            # Only where every base has such a budget: a mean over others would bend the line.
            own = {budget: of for (name, budget), of in sorted(found.items()) if name == method and len(of) == bases}
            if not own:
                continue
            curve(axis, method, list(own), list(own.values()), width=1.2)
            last = max(own)
            ends.append((_short(frontier.NAMES[method]), last, statistics.mean(own[last]), LOOKS[method].colour))
        over_parameters(axis, task)
        axis.yaxis.set_major_formatter("{x:.0%}")
        name_ends(axis, ends)
    axes[0][0].set_ylabel("share of what full fine-tuning gains")
    return save(figure, path)


def draw_kept(devices: dict[str, Device], path: Path) -> Path | None:
    """The README's second picture: bytes saved for backward, method by method, beside the released formulation."""
    pairs = _memory_pairs(devices)
    if not pairs:
        return None
    figure, axes = canvas(1, 1, 8, 0.42 * len(pairs) + 1.1)
    axis = axes[0][0]
    for which, offset in ((1, -0.19), (2, 0.19)):
        for place, pair in enumerate(pairs):
            record = pair[which]
            saved = record["memory"]["saved"]
            whose = "genft" if which == 2 else "peft" if record["kind"] == "peer" else "released formulation"
            axis.barh(place + offset, saved / 2**20, height=0.34, **bar(record))
            at = (saved / 2**20, place + offset)
            words = f"{text.size(saved)}, {whose}"
            axis.annotate(words, at, (4, 0), textcoords="offset points", va="center", size=8)
    axis.set_yticks(range(len(pairs)), [pair[0] for pair in pairs])
    axis.invert_yaxis()
    axis.set_xlabel("MiB kept for the backward pass, beyond the layer's input")
    axis.set_title(text.case(pairs[0][2]), fontsize=9)
    axis.margins(x=0.24)
    return save(figure, path)
