"""Files on disk: directories that appear whole, adapters that are replaced whole and fit their model, no pickles.

How an adapter takes the place of another, so that a process may die at any moment, and at the next one again:

1. adapter_config.json is put aside, unless it stays the same.
2. adapter_model.safetensors is replaced. Its header carries a copy of its configuration.
3. adapter_config.json is put in place, and the former one goes.

So an adapter_config.json that is there belongs to the weights; where there is none, the weights say which is theirs (or
the one put aside is, if something else saved them). `load_adapter` goes by that; stock peft finds no adapter between
steps 1 and 3. Writers of one directory wait for each other.
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
PREFIX = "base_model.model."  # of every key in a peft checkpoint, and of a module's name in a PeftModel
FORMER = CONFIG + ".old"  # put aside while CONFIG and WEIGHTS change places with newer ones
PARTIAL = ".partial"
CARRIED = "adapter_config"  # in the metadata of WEIGHTS: the text of their CONFIG


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which gets its name `path` when the block ends without an error: nobody ever sees it
    half-written, and what is written is on the disk before it has the name.

    Raises:
        ValueError: `path` is a file, or a directory that is not empty.
    """
    check_new(path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _partial(path.parent, path.name) as partial:
        yield partial
        _sync(*partial.rglob("*"), partial)
        check_new(path)
        if path.is_dir():  # an empty one may be a place where a disk is mounted, which keeps its name
            for new in partial.iterdir():
                os.replace(new, path / new.name)
        else:
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
    an error, as this module's docstring says. Other files in `path` stay.

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
            except OSError:  # unless another process was faster
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
    """Puts the text of their configuration into the header of weights; the tensors are copied as they are."""
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
    """The directory itself; or, while CONFIG is missing because a save was interrupted, one that has the configuration
    of its weights beside them, for the length of the block.

    Raises:
        ValueError: as of `check_files`.
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
    """A directory of this process in `parent`, for what is to become `name` or part of `parent`; gone afterwards."""
    _clear(parent, name)
    while True:
        partial = parent / f"{_start(name)}{uuid.uuid4().hex}"
        partial.mkdir()
        with _locked(partial):
            if not partial.is_dir():
                continue  # another process took it for left behind before the lock was held
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return


def _start(name: str) -> str:
    return f".{name}{PARTIAL}-" if name else f"{PARTIAL}-"


def _clear(parent: Path, name: str) -> None:
    """Removes what killed processes have left of `name`: what nobody holds."""
    for old in parent.iterdir():
        if old.name.startswith(_start(name)):
            with _locked(old, wait=False) as free:
                if free:
                    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the directory's lock, which a process that dies lets go; yields whether it is held. A file system, or a
    system, without locks has none."""
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
        interrupted = _config_of_weights(directory) is not None
        hint = "; a save was interrupted here: genft_modules.load_adapter loads it all the same" if interrupted else ""
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
        if key in known and known[key].is_floating_point() != tensor.is_floating_point()
    ]
    complaints = [
        f"{title}: {some(entries)}"
        for title, entries in (
            ("missing", [key for key in wanted if key not in found]),
            ("unknown", [key for key in found if key not in known]),
            ("shape mismatch", shapes),
            ("of the wrong kind", kinds),
        )
        if entries
    ]
    if complaints:
        raise ValueError(f"{what}: does not fit the model: {'; '.join(complaints)}")


def some(entries: Collection[str], most: int = 3) -> str:
    """The first entries, and how many more there are."""
    shown = ", ".join(list(entries)[:most])
    return shown if len(entries) <= most else f"{shown} and {len(entries) - most} more"
