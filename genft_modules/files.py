"""Files on disk: atomic directories, atomic replacement of adapters, checks of adapter files; no pickles."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key in a peft checkpoint and every module name in a PeftModel
FORMER = CONFIG + ".old"  # the previous config while CONFIG and WEIGHTS are being replaced
PARTIAL = ".partial"


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Create the directory `path` atomically: a temporary directory to write into, synced to disk and renamed to `path`
    when the block ends without an error.

    Raises:
        ValueError: `path` is a file or a non-empty directory.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written(path.parent / f".{path.name}{PARTIAL}") as partial:
        yield partial
        _sync(*partial.rglob("*"), partial)
        os.replace(partial, path)
        _sync(path.parent)


def check_new(path: Path) -> None:
    """Raises ValueError if `path` is a file or a non-empty directory."""
    if path.is_dir():
        if any(path.iterdir()):
            raise ValueError(f"{path}: exists and is not empty, expected a new directory")
    elif path.exists():
        raise ValueError(f"{path}: is a file, expected a new directory")


@contextmanager
def replaced_adapter(path: Path) -> Iterator[Path]:
    """A temporary directory for an adapter's files, which replace those in `path` when the block ends without an error.
    Other files in `path` are kept.

    If the process dies, `path` contains the previous or the new adapter, never the config of one with the weights of
    the other: if the config changes, the previous one is renamed before the weights are replaced, and until the new one
    is in place the directory contains no loadable adapter (see `check_files`).
    """
    if not path.is_dir() or not any(path.iterdir()):
        with new_directory(path) as partial:
            yield partial
        return
    with _written(path / PARTIAL) as partial:
        yield partial
        _sync(*partial.rglob("*"))
        for new in partial.iterdir():
            if new.name not in (CONFIG, WEIGHTS):
                os.replace(new, path / new.name)
        config = path / CONFIG
        if config.exists() and config.read_bytes() != (partial / CONFIG).read_bytes():
            os.replace(config, path / FORMER)
        os.replace(partial / WEIGHTS, path / WEIGHTS)
        os.replace(partial / CONFIG, config)
        _sync(path)
        (path / FORMER).unlink(missing_ok=True)


@contextmanager
def _written(partial: Path) -> Iterator[Path]:
    shutil.rmtree(partial, ignore_errors=True)  # left over from a killed process
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(*paths: Path) -> None:
    """fsync files and directories."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue  # Windows cannot open directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_files(directory: Path, *, weights: bool = True) -> None:
    """Raises ValueError, naming the file, unless the directory contains a config and a valid safetensors file.
    `weights=False`: the weights may be missing."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory, expected one with {CONFIG} and {WEIGHTS}")
    if not (directory / CONFIG).is_file():
        hint = ""
        if (directory / FORMER).is_file():
            if (directory / PARTIAL / WEIGHTS).exists():
                hint = f"; a save was interrupted here: {FORMER} belongs to the weights"
            else:
                hint = f"; a save was interrupted here: {PARTIAL}/{CONFIG} belongs to the weights"
        raise ValueError(f"{directory}: contains no {CONFIG}{hint}")
    path = directory / WEIGHTS
    if path.is_file():
        try:
            with safe_open(path, framework="pt"):
                return
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is not a valid safetensors file ({error})") from None
    if (directory / "adapter_model.bin").exists():
        raise ValueError(f"{directory}: got adapter_model.bin, a pickle, which genft does not load; expected {WEIGHTS}")
    if weights:
        raise ValueError(f"{directory}: contains no {WEIGHTS}")


def refuse_misfits(
    what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless `found` has all `wanted` tensors, otherwise only tensors of `others`, and each has the
    right shape and a floating-point dtype."""
    known = {**others, **wanted}
    shapes = [
        f"{key}: got {tuple(tensor.shape)}, expected {tuple(known[key].shape)}"
        for key, tensor in found.items()
        if key in known and tensor.shape != known[key].shape
    ]
    kinds = [
        f"{key}: got {tensor.dtype}"
        for key, tensor in found.items()
        if key in known and known[key].is_floating_point() and not tensor.is_floating_point()
    ]
    complaints = [
        f"{title}: {some(entries)}"
        for title, entries in (
            ("missing", [key for key in wanted if key not in found]),
            ("unknown", [key for key in found if key not in known]),
            ("shape mismatch", shapes),
            ("not floating point", kinds),
        )
        if entries
    ]
    if complaints:
        raise ValueError(f"{what}: does not match the model: {'; '.join(complaints)}")


def some(entries: Collection[str], most: int = 3) -> str:
    """The first entries and the number of the rest."""
    shown = ", ".join(list(entries)[:most])
    return shown if len(entries) <= most else f"{shown} and {len(entries) - most} more"
