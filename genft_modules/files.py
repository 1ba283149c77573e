"""Files on disk: atomic directories, atomic replacement of adapters, checks of adapter files; no pickles.

An adapter is two files. It is replaced so that the process may die at any step, and during the next save again:

1. adapter_config.json is renamed to adapter_config.json.old, unless it does not change.
2. adapter_model.safetensors is replaced. Its header contains a copy of its config.
3. adapter_config.json is put in place, and the old one is removed.

So if there is an adapter_config.json, it belongs to the weights. If there is none, the config in the header does (or
the .old one, if the weights were saved by other code). `load_adapter` follows these rules; stock peft finds no adapter
between steps 1 and 3. Processes that save to the same directory wait for each other.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key in a peft checkpoint and every module name in a PeftModel
FORMER = CONFIG + ".old"  # the previous config while CONFIG and WEIGHTS are being replaced
PARTIAL = ".partial"
CARRIED = "adapter_config"  # in the metadata of WEIGHTS: the text of their CONFIG


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Create the directory `path` atomically: a temporary directory to write into, synced to disk and renamed to `path`
    when the block ends without an error.

    Raises:
        ValueError: `path` is a file or a non-empty directory.
    """
    check_new(path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path.parent, path.name) as partial:
        yield partial
        _sync(*partial.rglob("*"), partial)
        check_new(path)
        if path.is_dir():  # an empty one may be a mount point, which cannot be replaced
            for new in partial.iterdir():
                os.replace(new, path / new.name)
        else:
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
    """A temporary directory for an adapter's files, which replace those in `path` when the block ends without an error,
    in the order that this module's docstring describes. Other files in `path` are kept.

    Raises:
        ValueError: `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, expected a directory")
    path = Path(os.path.realpath(path))
    fresh = not path.exists()
    (path.parent if fresh else path).mkdir(parents=True, exist_ok=True)
    with _partial(path.parent if fresh else path, path.name if fresh else "") as partial:
        yield partial
        _carry(partial / WEIGHTS, (partial / CONFIG).read_text(encoding="utf-8"))
        _sync(*partial.rglob("*"), partial)
        if fresh:
            try:
                os.replace(partial, path)
                _sync(path.parent)
                return
            except OSError:  # another process may have created it meanwhile
                if not path.is_dir():
                    raise
        with _locked(path):
            _put(partial, path)
            _clear(path.parent, path.name)


def _put(partial: Path, path: Path) -> None:
    config = path / CONFIG
    if config.exists() and config.read_bytes() != (partial / CONFIG).read_bytes():
        os.replace(config, path / FORMER)
    os.replace(partial / WEIGHTS, path / WEIGHTS)
    os.replace(partial / CONFIG, config)
    _sync(path)
    (path / FORMER).unlink(missing_ok=True)
    for other in partial.iterdir():
        os.replace(other, path / other.name)
    _sync(path)


def _carry(weights: Path, config: str) -> None:
    """Write the text of the config into the header of the weights. The tensors are copied unchanged."""
    written = weights.with_name(weights.name + PARTIAL)
    with weights.open("rb") as source, written.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), CARRIED: config}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 1 << 20)
    os.replace(written, weights)


@contextmanager
def whole_adapter(directory: Path) -> Iterator[Path]:
    """The directory itself or, if CONFIG is missing after an interrupted save, a temporary one with the config that
    belongs to the weights.

    Raises:
        ValueError: as in `check_files`.
    """
    if (directory / CONFIG).is_file() or (text := _config_of_weights(directory)) is None:
        check_files(directory)
        yield directory
        return
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / CONFIG).write_text(text, encoding="utf-8")
        (Path(place) / WEIGHTS).symlink_to((directory / WEIGHTS).absolute())
        yield Path(place)


def _config_of_weights(directory: Path) -> str | None:
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as weights:
            carried = (weights.metadata() or {}).get(CARRIED)
        return carried or (directory / FORMER).read_text(encoding="utf-8")
    except (SafetensorError, OSError):
        return None


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is either the former one or the whole new one, on the disk before it has its name."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(text.encode("utf-8"))
    _sync(partial)
    os.replace(partial, path)


@contextmanager
def _partial(parent: Path, name: str) -> Iterator[Path]:
    """A temporary directory of this process in `parent`, for what becomes `name` or part of `parent`."""
    _clear(parent, name)
    while True:
        partial = parent / f"{_start(name)}{uuid.uuid4().hex}"
        partial.mkdir()
        with _locked(partial):
            if not partial.is_dir():
                continue  # another process removed it before the lock was held
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return


def _start(name: str) -> str:
    return f".{name}{PARTIAL}-" if name else f"{PARTIAL}-"


def _clear(parent: Path, name: str) -> None:
    """Remove the temporary directories of killed processes: those that nobody has locked."""
    for old in parent.iterdir():
        if old.name.startswith(_start(name)):
            with _locked(old, wait=False) as free:
                if free:
                    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the directory's lock, which the system releases if the process dies; yields whether it is held. Where the
    file system or the system has no locks, it is not."""
    descriptor = None
    held = False
    if fcntl is not None:
        try:
            descriptor = os.open(directory, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            pass
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


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
        interrupted = _config_of_weights(directory) is not None
        hint = "; a save was interrupted here, genft_modules.load_adapter can load it" if interrupted else ""
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
    right shape and kind of dtype."""
    known = {**others, **wanted}
    shapes = [
        f"{key}: got {tuple(tensor.shape)}, expected {tuple(known[key].shape)}"
        for key, tensor in found.items()
        if key in known and tensor.shape != known[key].shape
    ]
    kinds = [
        f"{key}: got {tensor.dtype}"
        for key, tensor in found.items()
        if key in known and known[key].is_floating_point() != tensor.is_floating_point()
    ]
    complaints = [
        f"{title}: {some(entries)}"
        for title, entries in (
            ("missing", [key for key in wanted if key not in found]),
            ("unknown", [key for key in found if key not in known]),
            ("shape mismatch", shapes),
            ("wrong dtype", kinds),
        )
        if entries
    ]
    if complaints:
        raise ValueError(f"{what}: does not match the model: {'; '.join(complaints)}")


def some(entries: Collection[str], most: int = 3) -> str:
    """The first entries and the number of the rest."""
    shown = ", ".join(list(entries)[:most])
    return shown if len(entries) <= most else f"{shown} and {len(entries) - most} more"
