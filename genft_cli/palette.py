"""How each method looks in every chart, and names at the ends of lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Look:
    """A colour, and what matplotlib takes as `linestyle` and `marker`."""

    colour: str
    line: Any
    mark: str


# Colours that can be told apart in each kind of colour blindness, which a test checks; lines and marks differ as well.
LOOKS = {
    "wegeft": Look("#1736CF", "-", "o"),
    "gift": Look("#8C97FF", (0, (5, 2)), "s"),
    "genft": Look("#13C176", "-", "^"),
    "genft-gelu": Look("#03380C", (0, (5, 2)), "v"),
    "grft": Look("#B84A11", (0, (1, 1)), "D"),
    "sas": Look("#F07BBB", (0, (6, 2, 1, 2)), "P"),
    "peanut": Look("#CAA800", (0, (3, 1)), "X"),
    "hira": Look("#177A58", (0, (2, 1)), "p"),
    "lora": Look("#6B1153", "-", "<"),
    "peft-lora": Look("#7C3BA0", (0, (4, 1, 1, 1, 1, 1)), ">"),
    "full": Look("#000000", "-", "*"),
}
OTHER = Look("#8A8A8A", (0, (2, 2)), ".")
_TITLES = {"lora (peft)": "peft-lora", "genft (gelu)": "genft-gelu", "full fine-tuning": "full"}


def look(method: str) -> Look:
    """Of a method, by its name on the command line or in a table, such as "GenFT (gelu)"; `OTHER` of anything else."""
    name = method.lower()
    return LOOKS.get(_TITLES.get(name) or re.sub(r" \(.*\)$", "", name), OTHER)


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted, in their order, that keep a distance of `gap` from each other."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []  # of neighbours that touch: the sum of their places less their offsets, their number
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    places = [total / count for total, count in pools for _ in range(int(count))]
    found = dict(zip(order, (place + rank * gap for rank, place in enumerate(places)), strict=True))
    return [found[i] for i in range(len(wanted))]


def name_ends(axes: Any, ends: Sequence[tuple[str, float, float, str]], size: float = 8) -> None:
    """Write names at the right of `axes`, (name, x, y, colour) of each line's last point, as near to their heights as
    they fit. The limits of the axes must not change afterwards."""
    figure = axes.figure
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((x, y))[1]) for _, x, y, _ in ends]
    notes = [
        axes.annotate(
            name,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1},
        )
        for (name, x, y, colour), height in zip(ends, heights, strict=True)
    ]
    figure.draw_without_rendering()  # lays the axes out
    points = axes.get_window_extent().height / figure.dpi * 72
    for note, place in zip(notes, apart(heights, 1.2 * size / points), strict=True):
        note.set_position((1.04, place))
