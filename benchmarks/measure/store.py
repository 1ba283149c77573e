"""A result file of many runs, rewritten whenever one ends: what was made is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any


class Store:
    """`data` is the file: what is given at first, `about` the comparison, and `runs` by name, each with the `settings`
    that it depends on.

    Raises:
        ValueError: there is a file, of another schema.
    """

    def __init__(self, path: Path, schema: int, **first: Any) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": schema, "about": {}, "runs": {}, **first}
        if path.is_file():
            self.data = json.loads(path.read_text())
            if self.data.get("schema") != schema:
                raise ValueError(f"{path.name}: not a file of schema {schema}; remove it to begin again")

    def has(self, key: str, settings: dict[str, Any]) -> bool:
        return bool(self.data["runs"].get(key, {}).get("settings") == settings)

    def keep(self, keys: Collection[str], among: Callable[[dict[str, Any]], bool] = lambda settings: True) -> None:
        """Forgets the other runs, of those whose settings are `among` them."""
        runs = self.data["runs"]
        for key in [key for key, run in runs.items() if key not in keys and among(run["settings"])]:
            del runs[key]

    def flush(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)
