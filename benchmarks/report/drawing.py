"""How every chart looks, and the same file each time it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"floor": "#7f7f7f", "genft": "#1f77b4", "peer": "#ff7f0e", "naive": "#d62728"}
MARKS = "os^Dv<>PX*"


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
