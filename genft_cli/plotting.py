"""Charts: loss curves and norms of ΔW."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from genft_cli.palette import LOOKS, look, name_ends
from genft_modules.files import writing


def loss_curves(runs: Mapping[str, Mapping[str, Any]], path: Path, unit: str = "bits per byte") -> None:
    """Plot `training_curve` and `held_out_curve` of each run, lists of (step, loss in `unit`), side by side. The keys
    of `runs` are methods, as `palette.look` takes them; the lines are named at their ends."""
    figure = _figure(12, 5)
    left, right = figure.subplots(1, 2)
    ends: dict[Any, list[tuple[str, float, float, str]]] = {left: [], right: []}
    for name, run in runs.items():
        style = look(name)
        # An adapter of a group that diverged has losses that are not finite.
        training, held = (
            [(step, value) for step, value in run[curve] if math.isfinite(value)]
            for curve in ("training_curve", "held_out_curve")
        )
        steps, bits = [step for step, _ in training], [value for _, value in training]
        for axes, places, values, mark in (
            (left, steps, _smooth(bits), None),
            (right, [s for s, _ in held], [v for _, v in held], style.mark),
        ):
            axes.plot(places, values, color=style.colour, linestyle=style.line, marker=mark, markersize=4)
            if values:
                ends[axes].append((name, places[-1], values[-1], style.colour))
        if len(runs) == 1:
            left.plot(steps, bits, color=style.colour, alpha=0.25, linewidth=1)
    for axes, title in ((left, "training batches, smoothed"), (right, "held-out text")):
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        name_ends(axes, ends[axes])
    _save(figure, path)


def update_norms(norms: Mapping[str, tuple[float, float]], path: Path, title: str) -> None:
    """Plot (‖ΔW‖, ‖ΔW‖/‖W0‖) of each layer over depth, one line per kind of layer; `norms` is keyed by layer name.

    A layer's depth is the first number in its name; its kind is the name without that number.
    """
    kinds: dict[str, list[tuple[int, tuple[float, float]]]] = {}
    for name, pair in norms.items():
        depth = re.search(r"(?<![^.])\d+(?![^.])", name)
        kind = name if depth is None else f"{name[: depth.start()]}*{name[depth.end() :]}"
        kinds.setdefault(kind, []).append((0 if depth is None else int(depth[0]), pair))
    figure = _figure(11, 4.5)
    figure.suptitle(title)
    looks = list(LOOKS.values())
    for axes, index, label in zip(figure.subplots(1, 2), (0, 1), ("‖ΔW‖", "‖ΔW‖ / ‖W0‖"), strict=True):
        for number, (kind, points) in enumerate(kinds.items()):
            depths, values = [depth for depth, _ in points], [pair[index] for _, pair in points]
            style = looks[number % len(looks)]
            axes.plot(depths, values, color=style.colour, linestyle=style.line, marker="o", markersize=4, label=kind)
        axes.set(xlabel="depth of the layer", ylabel=label, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, path)


def check_format(path: Path) -> None:
    """Raises ValueError if the format given by the file name is not supported."""
    known = _figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"{path}: expected one of the suffixes .{', .'.join(sorted(known))}")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    """Write atomically, in the format given by the file name."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path.parent):
        try:
            figure.savefig(partial, format=path.suffix.removeprefix(".").lower(), dpi=120)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink()


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential moving average with bias correction."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
