"""Loss curves to a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_curves(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw `training_curve` and `held_out_curve` of each run, pairs of (step, bits per byte), side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, run), colour in zip(runs.items(), _COLOURS * len(runs), strict=False):
        steps = [step for step, _ in run["training_curve"]]
        bits = [value for _, value in run["training_curve"]]
        left.plot(steps, bits, color=colour, alpha=0.2, linewidth=1)
        left.plot(steps, _smooth(bits), color=colour, label=name)
        held = run["held_out_curve"]
        right.plot([s for s, _ in held], [v for _, v in held], color=colour, marker="o", markersize=4, label=name)
    for axes, title in ((left, "training batches"), (right, "held-out text")):
        axes.set(title=title, xlabel="step", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend()
    partial = path.with_suffix(".tmp")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean, with the weight of the missing past taken out."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
