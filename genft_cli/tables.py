"""Rows of a file of the user: .jsonl, .json (a list of objects), .csv, .tsv or .parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genft_cli.console import UserError, one_line

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
Rows = list[dict[str, Any]]


def read_rows(option: str, name: str) -> Rows:
    """The rows of the file `name`, which was given for `option`. Values of .csv and .tsv are text.

    Raises:
        UserError: no such file, another format, a broken line, or no rows.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{option} {name}: no such file")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{option} {name}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _text(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{option} {name}: {one_line(error)}") from None
    if not rows:
        raise UserError(f"{option} {name}: has no rows")
    return rows


def check_columns(option: str, name: str, rows: Rows, column: str, source: str) -> None:
    """Check that every row of the file `source` has the column that was given for `option`."""
    if column not in rows[0]:
        raise UserError(f"{option} {column}: {source} has the columns {', '.join(rows[0])}")
    for number, row in enumerate(rows, 1):
        if row.get(column) is None:
            raise UserError(f"{name}: row {number} has no {column}")


def _text(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return _objects(json.loads(text))
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows += _objects([json.loads(line)])
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
        return rows
    # The files of GLUE do not quote: a quotation mark is a character of the text.
    plain = path.suffix == ".tsv"
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter="\t" if plain else ",",
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
    )
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _objects(rows: Any) -> Rows:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected objects such as {...}, with one key per column")
    return list(rows)


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped] # has no types
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install 'genft[train]'") from None
    rows: Rows = pyarrow.parquet.read_table(str(path)).to_pylist()
    return rows
