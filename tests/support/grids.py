"""Grids that are smaller than a product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value from each list, in which any two values of two lists meet, found greedily: the first rows of
    the product that add the most pairs. A mistake that two settings make together shows in some row."""
    open_pairs = {
        (i, a, j, b)
        for i, j in combinations(range(len(lists)), 2)
        for a, b in product(range(len(lists[i])), range(len(lists[j])))
    }
    rows = list(product(*(range(len(values)) for values in lists)))

    def pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, row[i], j, row[j]) for i, j in combinations(range(len(lists)), 2)}

    chosen = []
    while open_pairs:
        best = max(rows, key=lambda row: len(pairs(row) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return [tuple(values[at] for values, at in zip(lists, row, strict=True)) for row in sorted(chosen)]
