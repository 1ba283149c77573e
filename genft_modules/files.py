"""Files on disk: directories that appear whole, adapters that are replaced whole and fit their model, no pickles."""

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
PREFIX = "base_model.model."  # of every key in a peft checkpoint, and of a module's name in a PeftModel
FORMER = CONFIG + ".old"  # while CONFIG and WEIGHTS change places with newer ones
PARTIAL = ".partial"


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which gets its name `path` when the block ends without an error: nobody ever sees it
    half-written, and what is written is on the disk before it has the name.

    Raises:
        ValueError: `path` is a file, or a directory that is not empty.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written(path.parent / f".{path.name}{PARTIAL}") as partial:
        yield partial
        _sync(*partial.rglob("*"), partial)
        os.replace(partial, path)
        _sync(path.parent)


def check_new(path: Path) -> None:
    """Raises ValueError if `path` is a file, or a directory that is not empty."""
    if path.is_dir():
        if any(path.iterdir()):
            raise ValueError(f"{path}: exists and is not empty, expected a new directory")
    elif path.exists():
        raise ValueError(f"{path}: is a file, expected a new directory")


@contextmanager
def replaced_adapter(path: Path) -> Iterator[Path]:
    """A directory to write an adapter's files into, which take the place of those in `path` when the block ends without
    an error. Other files in `path` stay.

    A process that dies on the way leaves the former adapter, or the new one, and never the configuration of one with
    the weights of the other: where the configuration changes, the former one is put aside before the weights change,
    and for that moment the directory holds no adapter that anything would load (see `check_files`).
    """
    if not path.is_dir() or not any(path.iterdir()):
        with new_directory(path) as partial:
            yield partial
        return
    with _written(path / PARTIAL) as partial:
        yield partial
        _sync(*partial.rglob("*"))
        for new in partial.iterdir():  # names change in this order, without a pause: the moment between is short
            if new.name not in (CONFIG, WEIGHTS):
                os.replace(new, path / new.name)
        config = path / CONFIG
        if config.exists() and config.read_bytes() != (partial / CONFIG).read_bytes():
            os.replace(config, path / FORMER)
        os.replace(partial / WEIGHTS, path / WEIGHTS)
        os.replace(partial / CONFIG, config)
        _sync(path)
        (path / FORMER).unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is either the former one or the whole new one, on the disk before it has its name."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(text.encode("utf-8"))
    _sync(partial)
    os.replace(partial, path)


@contextmanager
def _written(partial: Path) -> Iterator[Path]:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(*paths: Path) -> None:
    """Waits until files' contents, and directories' lists of names, are on the disk."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue  # Windows opens no directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_files(directory: Path, *, weights: bool = True) -> None:
    """Raises ValueError, naming the file, if the directory holds no adapter in whole safetensors. `weights=False`: a
    configuration on its own will do."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory, expected one with {CONFIG} and {WEIGHTS}")
    if not (directory / CONFIG).is_file():
        hint = ""
        if (directory / FORMER).is_file():
            if (directory / PARTIAL / WEIGHTS).exists():
                hint = f"; a save was interrupted here: {FORMER} belongs to the weights"
            else:
                hint = f"; a save was interrupted here: {PARTIAL}/{CONFIG} belongs to the weights"
        raise ValueError(f"{directory}: holds no {CONFIG}{hint}")
    path = directory / WEIGHTS
    if path.is_file():
        try:
            with safe_open(path, framework="pt"):
                return
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is not a whole safetensors file ({error})") from None
    if (directory / "adapter_model.bin").exists():
        raise ValueError(
            f"{directory}: holds adapter_model.bin, a pickle, which genft does not read; expected {WEIGHTS}"
        )
    if weights:
        raise ValueError(f"{directory}: holds no {WEIGHTS}")


def refuse_misfits(
    what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless `found` has all tensors that are `wanted`, beside them only some of the `others`, and
    each in the right shape and floating point."""
    known = {**others, **wanted}
    shapes = [
        f"{key} is {tuple(tensor.shape)} for {tuple(known[key].shape)}"
        for key, tensor in found.items()
        if key in known and tensor.shape != known[key].shape
    ]
    kinds = [
        f"{key} is {tensor.dtype}"
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
        raise ValueError(f"{what}: does not fit the model: {'; '.join(complaints)}")


def some(entries: Collection[str], most: int = 3) -> str:
    """The first entries, and how many more there are."""
    shown = ", ".join(list(entries)[:most])
    return shown if len(entries) <= most else f"{shown} and {len(entries) - most} more"
