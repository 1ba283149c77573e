"""Progress bars."""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO

from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own


class _Lines(io.TextIOBase):
    """A stream for progress bars in log files: each refresh is a new line instead of a carriage return."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        line = text.strip()
        if line and "| 0/" not in line:  # skip the empty bar
            self._stream.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def bar(
    total: int | None, title: str, *, unit: str = "step", leave: bool = True, initial: int = 0, show: bool = True
) -> Any:
    """A progress bar over `total` units: live in a terminal, a line every 10 seconds in a log file.

    `total=None`: unknown total. `leave=False`: the bar is removed from the terminal when done and is not logged, for
    work of a few seconds. `show=False`: no bar.
    """
    common: dict[str, Any] = {"total": total, "desc": title, "unit": unit, "initial": initial, "leave": leave}
    if sys.stderr.isatty():
        return tqdm(**common, file=sys.stderr, dynamic_ncols=True, disable=not show)
    return tqdm(
        **common,
        file=_Lines(sys.stderr),
        disable=not (leave and show),
        ascii=" #",
        ncols=100,
        mininterval=10,
        maxinterval=60,
    )
