"""How every chart looks, and the same file each time it is drawn. Colours are those of genft_cli.palette."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.results import Record
from genft_cli.palette import LOOKS, OTHER, Look

MARKS = "os^Dv<>PX*"
METHODS = {"genft-linear": "genft", "genft-leakyrelu": "genft-gelu", "grft-row": "grft", "grft-column": "grft"}


def look(record: Record) -> Look:
    """Of the method that a contender computes, whoever computes it; the frozen layer and methods that are not ours are
    grey. peft's LoRA is the one that has a look of its own."""
    method = METHODS.get(record["method"], record["method"])
    if record["kind"] == "peer" and method == "lora":
        method = "peft-lora"
    return LOOKS.get(method, OTHER)


def ours(record: Record) -> bool:
    return record["kind"] in ("genft", "floor")


def line(record: Record) -> Any:
    """The line of a contender: the method's own, dotted for formulations that are not ours and for a second variant."""
    if record["kind"] == "floor" and record["method"] == "none":
        return "-"
    return look(record).line if record["kind"] != "naive" and record["method"] != "genft-leakyrelu" else ":"


def dot(record: Record) -> dict[str, Any]:
    """Keywords of a marker: filled where the contender is ours, hollow where it is another implementation."""
    colour = look(record).colour
    return {"color": colour, "markerfacecolor": colour if ours(record) else "white"}


def bar(record: Record) -> dict[str, Any]:
    """Keywords of a bar, in the same way."""
    colour = look(record).colour
    return {"color": colour if ours(record) else "white", "edgecolor": colour, "linewidth": 1.2}


def curve(axis: Any, method: str, over: Sequence[int], values: Sequence[Sequence[float]], width: float = 1) -> Any:
    """A method's line over trainable parameters: the mean of the values at each, and their range."""
    middle, style = [statistics.mean(own) for own in values], LOOKS[method]
    return axis.errorbar(
        over,
        middle,
        yerr=[
            [mean - min(own) for mean, own in zip(middle, values, strict=True)],
            [max(own) - mean for mean, own in zip(middle, values, strict=True)],
        ],
        color=style.colour,
        linestyle=style.line,
        marker=style.mark,
        markersize=4,
        linewidth=width,
        elinewidth=0.8,
    )


def over_parameters(axis: Any, title: str) -> None:
    """What is below and around such lines."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("trainable parameters")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.2)


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "genft", "font.size": 9, "axes.spines.top": False}
    )
    matplotlib.rcParams["axes.spines.right"] = False
    return pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
