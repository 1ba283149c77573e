"""Two result files: what became slower or larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import results
from benchmarks.measure.results import key


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
