"""How figures are written: tables, bytes, times, ratios, and the places in a page that are made."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.measure.results import Record


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def ms(record: Record) -> str:
    ms = record["ms"]
    return f"{ms['median']:.4g} [{ms['q1']:.4g}, {ms['q3']:.4g}]"


def ratio(record: Record | None) -> str:
    if record is None:
        return ""
    if "ratio" not in record:
        return "withheld" if "withheld" in record else ""
    return f"{record['ratio']['median']:.2f}"


def shape(record: Record) -> str:
    if "model" in record:
        return str(record["model"]["name"])
    return f"{record['m']}×{'+'.join(map(str, record['n']))}×{record['k']}"


def case(record: Record) -> str:
    """In words: the layer of a comparison."""
    n = "+".join(map(str, record["n"]))
    return f"one {n}×{record['k']} layer on {record['m']} tokens (r = {record['r']}, {record['dtype']})"


def spread(bits: Sequence[float]) -> str:
    return f"{statistics.mean(bits):.3f} [{min(bits):.3f}, {max(bits):.3f}]"


def plus_minus(values: Sequence[float]) -> str:
    """Mean and half of the range, if there are several."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def refresh(path: Path, blocks: dict[str, str]) -> bool:
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
