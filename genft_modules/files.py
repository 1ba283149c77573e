"""Files on disk: atomic directories, atomic replacement of adapters, checks of adapter files; no pickles.

An adapter is two files. It is replaced so that the process may die at any step, and during the next save again:

1. adapter_config.json is renamed to adapter_config.json.old, unless it does not change.
2. adapter_model.safetensors is replaced. Its header contains a copy of its config.
3. adapter_config.json is put in place, and the old one is removed.

So if there is an adapter_config.json, it belongs to the weights. If there is none, the config in the header does (or
the .old one, if the weights were saved by other code). `load_adapter` follows these rules; stock peft finds no adapter
between steps 1 and 3. Processes that save to the same directory wait for each other.

If something cannot be written, what was there stays as it was, the temporary files are removed, and the error is an
OSError that names the directory and the reason (`writing`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."  # of every key in a peft checkpoint and every module name in a PeftModel
FORMER = CONFIG + ".old"  # the previous config while CONFIG and WEIGHTS are being replaced
PARTIAL = ".partial"
CARRIED = "adapter_config"  # in the metadata of WEIGHTS: the text of their CONFIG
_TORCH = re.compile("inline_container|PytorchStreamWriter|Parent directory")  # in torch's errors of writing
_FOREIGN = "lost+found"  # in the root of an empty file system


def local_name(name: str) -> str:
    """The name of a model: with ./ in front if it is a directory here whose name could be one on the Hub as well."""
    path = Path(name)
    if not os.path.isdir(path) or path.is_absolute() or path.parts[:1] == ("..",):
        return name
    return f"./{path}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written in this block raises an OSError that names `path` and the reason. safetensors, tokenizers
    and torch have errors of their own for it; other errors pass."""
    try:
        yield
    except Exception as error:
        number = _number(error, path)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _number(error: Exception, path: Path) -> int | None:
    """The system's number of a failed write to `path`; None for any other error."""
    if isinstance(error, OSError):
        place = error.filename
        elsewhere = isinstance(place, str) and not Path(os.path.abspath(place)).is_relative_to(path.absolute().parent)
        return None if elsewhere else error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of Rust
        return int(found[1])
    if isinstance(error, RuntimeError) and _TORCH.search(str(error)):  # which does not say why
        if not path.is_dir():
            return errno.ENOENT
        return errno.ENOSPC if shutil.disk_usage(path).free < 1 << 16 else errno.EIO
    return None


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Create the directory `path` atomically: a temporary directory to write into, synced to disk and renamed to `path`
    when the block ends without an error. An empty directory stays itself, because it may be a mount point: the files
    are moved into it, the configuration last.

    Raises:
        ValueError: `path` is a file or a non-empty directory.
        OSError: something cannot be written; names `path` and the reason.
    """
    check_new(path)
    path = Path(os.path.realpath(path))
    with writing(path):
        empty = path.is_dir()
        (path if empty else path.parent).mkdir(parents=True, exist_ok=True)
        with _partial(path if empty else path.parent, "" if empty else path.name) as partial:
            yield partial
            _sync(*partial.rglob("*"), partial)
            if not path.is_dir():
                check_new(path)
                os.replace(partial, path)
                _sync(path.parent)
                return
            with _locked(path):
                check_new(path)
                _move(partial, path)


@contextmanager
def added_files(path: Path) -> Iterator[Path]:
    """A temporary directory for files that are moved into the directory `path`, the configuration last, when the block
    ends without an error. They replace files of the same names.

    Raises:
        OSError: something cannot be written; names `path` and the reason.
    """
    path = Path(os.path.realpath(path))
    with writing(path), _partial(path, "") as partial:
        yield partial
        _sync(*partial.rglob("*"), partial)
        with _locked(path):
            _move(partial, path)


def _move(partial: Path, path: Path) -> None:
    for new in sorted(partial.iterdir(), key=lambda new: new.name in (CONFIG, "config.json")):
        os.replace(new, path / new.name)
    _sync(path)


def check_new(path: Path) -> None:
    """Raises ValueError if `path` is a file or a non-empty directory."""
    if path.is_dir():
        if any(not found.name.startswith(PARTIAL) and found.name != _FOREIGN for found in path.iterdir()):
            raise ValueError(f"{path}: exists and is not empty, expected a new directory")
    elif path.exists():
        raise ValueError(f"{path}: is a file, expected a new directory")


@contextmanager
def replaced_adapter(path: Path) -> Iterator[Path]:
    """A temporary directory for an adapter's files, which replace those in `path` when the block ends without an error,
    in the order that this module's docstring describes. Other files in `path` are kept.

    Raises:
        ValueError: `path` is a file.
        OSError: something cannot be written; names `path` and the reason. What was there is unchanged.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, expected a directory")
    path = Path(os.path.realpath(path))
    with writing(path):
        fresh = not path.exists()
        (path.parent if fresh else path).mkdir(parents=True, exist_ok=True)
        with _partial(path.parent if fresh else path, path.name if fresh else "") as partial:
            yield partial
            _carry(partial / WEIGHTS, (partial / CONFIG).read_text(encoding="utf-8"))
            _sync(*partial.rglob("*"), partial)
            if fresh:
                try:
                    os.replace(partial, path)
                except OSError:  # another process may have created it meanwhile
                    if not path.is_dir():
                        raise
                else:
                    _sync(path.parent)
                    return
            with _locked(path):
                _put(partial, path)
                _clear(path.parent, path.name)


def _put(partial: Path, path: Path) -> None:
    config, former = path / CONFIG, path / FORMER
    changed = config.exists() and config.read_bytes() != (partial / CONFIG).read_bytes()
    if changed:
        os.replace(config, former)
    try:
        os.replace(partial / WEIGHTS, path / WEIGHTS)
    except OSError:
        if changed:
            os.replace(former, config)
        raise
    os.replace(partial / CONFIG, config)
    _sync(path)
    former.unlink(missing_ok=True)
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
    """Writes a file that is either the former one or the whole new one, on the disk before it has its name.

    Raises:
        OSError: it cannot be written; names its directory and the reason.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path.parent):
        try:
            partial.write_bytes(text.encode("utf-8"))
            _sync(partial)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


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
    with suppress(OSError):  # of a directory that may be written but not listed
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
    if (directory / PICKLE).exists():
        raise ValueError(f"{directory}: got {PICKLE}, a pickle, which genft does not load; expected {WEIGHTS}")
    if weights:
        raise ValueError(f"{directory}: contains no {WEIGHTS}")


def refuse_pickle(directory: Path) -> None:
    """Raises ValueError if the weights last written to `directory` are a pickle, and removes it."""
    pickle, weights = directory / PICKLE, directory / WEIGHTS
    if not pickle.exists() or (weights.exists() and weights.stat().st_mtime_ns >= pickle.stat().st_mtime_ns):
        return
    pickle.unlink()
    raise ValueError(
        f"safe_serialization: got False, expected True: adapters of genft are saved as {WEIGHTS}, not as a pickle; "
        f"nothing was saved to {directory}"
    )


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
