"""The directory of a run: what it is started with, its checkpoints, and how it goes on after a stop.

OUTPUT holds the adapter's (or the model's) files, options.yaml, log.jsonl, run.json, loss.png, the logits that `verify`
compares with, and checkpoint-N directories. With --overwrite, the earlier run waits in OUTPUT/.former until the new one
has ended; files of other names are never touched.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genft_cli.console import UserError, check_writable, one_line, say
from genft_modules import files

OPTIONS, LOG, RECORD, PROBE = "options.yaml", "log.jsonl", "run.json", "probe.safetensors"
LAUNCH = ".launch"  # during the run: identifies the torchrun that started it
FORMER = ".former"  # with --overwrite: the earlier run, until the new one has ended
MARK = "# Written by genft: the options of the run in this directory.\n"  # the first line of OPTIONS
# Options that may change between an interrupted run and its continuation.
_FREE = {"output_dir", "resume", "overwrite", "verify", "checkpoint_minutes", "save_steps", "save_total_limit"}


def write_json(path: Path, value: Any) -> None:
    files.replace_text(path, json.dumps(value, indent=2) + "\n")


# --- checkpoints -------------------------------------------------------------------------------------------------


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints in `directory`, oldest first. Says which are not whole."""
    found = []
    for path in directory.glob("checkpoint-*"):
        if not _CHECKPOINT.fullmatch(path.name):
            continue
        if fault := fault_of(path):
            say(f"{path.name} is not whole and is left out: {fault}")
        else:
            found.append((int(path.name.rpartition("-")[2]), path))
    return [path for _, path in sorted(found)]


def fault_of(checkpoint: Path) -> str | None:
    """What is missing or damaged in a checkpoint of transformers' Trainer; None if it is whole."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if not checkpoint.name.endswith(f"-{state['global_step']}"):
            return "trainer_state.json is of another step"
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json cannot be read"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    random = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    for name in ("scheduler.pt", *random):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if not any(checkpoint.glob("optimizer*")) and not any(checkpoint.glob("global_step*")):  # the latter: DeepSpeed's
        return "optimizer.pt is missing"
    if not (any(checkpoint.rglob("*.safetensors")) or any(checkpoint.glob("*model*"))):
        return "the weights are missing"
    for path in sorted(checkpoint.rglob("*")):  # a group's adapters have a folder each
        if path.suffix in (".pt", ".pth") and not _whole_archive(path):
            return f"{path.name} is damaged"
        if path.suffix == ".safetensors" and not _whole_tensors(path):
            return f"{path.name} is damaged"
    return None


def _whole_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _whole_tensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt"):
            return True
    except (OSError, SafetensorError):
        return False


# --- the directory -----------------------------------------------------------------------------------------------


@contextmanager
def directory(
    output: str, given: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[tuple[Path, Path | None]]:
    """(the run's directory, the checkpoint to resume from).

    If the run fails before its first checkpoint, what it wrote is removed, and the run that it was to replace is put
    back. After a restart by torchrun, the run resumes from its last checkpoint.

    Raises:
        UserError: there is a run already, or none to resume, or with other options.
    """
    from genft_modules.model import distributed

    try:
        distributed.agree("options", {f"--{name}": repr(value) for name, value in given.items()})
    except (ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from None
    made = not os.path.isdir(os.path.expanduser(output))
    path, resume_from = distributed.from_first(lambda: _opened(output, given, resume, overwrite))
    try:
        yield path, resume_from
    except BaseException:
        if distributed.rank() == 0:
            _broken_off(path, made and resume_from is None)
        raise
    if distributed.rank() == 0:
        (path / LAUNCH).unlink(missing_ok=True)
        shutil.rmtree(path / FORMER, ignore_errors=True)


def _broken_off(path: Path, made: bool) -> None:
    """Name what can be used of a run that failed; remove one of which nothing can, and the directory if it was made
    for the run."""
    found, saved = checkpoints(path), [name for name in (files.WEIGHTS, *_models(path)) if (path / name).is_file()]
    if saved:
        say(f"what was trained is saved: {path / saved[0]}")
    if found:
        say(f"the last checkpoint is {found[-1]}; to go on from there, add --resume to the same command")
    if not found and not saved:
        with suppress(OSError):
            _remove(path)
            _put_back(path)
            if made:
                Path(os.path.realpath(path)).rmdir()
    if (path / FORMER).is_dir():
        say(f"the run that this one was to replace is kept in {path / FORMER}")


def check_there(path: Path) -> None:
    """Raises OSError if the run's directory was removed, or its disk is gone: it is not made again."""
    if not (path / OPTIONS).is_file():
        raise FileNotFoundError(errno.ENOENT, "the run's directory is gone", str(path))


def _opened(output: str, given: Mapping[str, Any], resume: bool, overwrite: bool) -> tuple[Path, Path | None]:
    import yaml

    path = Path(output).expanduser()
    options = {name: value for name, value in given.items() if name not in ("resume", "overwrite")}
    resume_from = None
    if _started_again(path):
        found = checkpoints(path)
        return path, found[-1] if found else None
    if resume and overwrite:
        raise UserError("--resume and --overwrite are mutually exclusive")
    text = MARK + yaml.safe_dump(options, sort_keys=True, allow_unicode=True)
    try:
        if resume:
            if not (path / OPTIONS).is_file():
                raise UserError(f"--resume: no run to resume in {path}")
            _check_same(options, path / OPTIONS)
            found = checkpoints(path)
            if not found:
                raise UserError(f"--resume: no whole checkpoint in {path}")
            resume_from = found[-1]
        check_writable("--output", str(path))
        if not resume:
            _make_room(path, overwrite)
        made = not path.is_dir()
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)  # also where a link points to nothing yet
        try:
            files.replace_text(path / OPTIONS, text)
            if launch := _launch():
                files.replace_text(path / LAUNCH, launch)
        except OSError:
            if not resume:
                _broken_off(path, made)
            raise
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or one_line(error)}") from None
    return path, resume_from


# --- files of a run ----------------------------------------------------------------------------------------------

# The names that a run writes. A README.md is not among them: it may contain a user's text, which the next save keeps.
_NAMES = {
    OPTIONS, LOG, RECORD, PROBE, LAUNCH, "loss.png", "reload.json", "training_args.bin",
    files.CONFIG, files.FORMER, files.WEIGHTS,
    "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def _models(path: Path) -> list[str]:
    """The names of the weights of a full model."""
    return sorted(found.name for found in _ours(path) if _MODEL.fullmatch(found.name))


def _ours(path: Path) -> list[Path]:
    """The files and checkpoints of the run in `path`."""
    if not path.is_dir():
        return []

    def is_ours(found: Path) -> bool:
        if found.is_dir():  # a checkpoint, or an adapter of a group
            of_a_group = found.name != FORMER and (found / RECORD).is_file() and (found / files.CONFIG).is_file()
            return of_a_group or _CHECKPOINT.fullmatch(found.name) is not None
        return found.name in _NAMES or _MODEL.fullmatch(found.name) is not None

    return [found for found in path.iterdir() if is_ours(found)]


def _is_run(path: Path) -> bool:
    try:
        with (path / OPTIONS).open(encoding="utf-8") as file:
            return file.readline() == MARK
    except (OSError, UnicodeDecodeError):
        return False


def _make_room(path: Path, overwrite: bool) -> None:
    """Check that `path` is new or empty. With `overwrite`, the run in it is moved to FORMER."""
    if _is_run(path):
        if not overwrite:
            raise UserError(f"--output {path}: exists and is not empty; use another, --resume or --overwrite")
        former = path / FORMER
        if former.is_dir() and not (path / RECORD).is_file():
            _remove(path)  # a run that was to replace the former one, and did not end
            return
        shutil.rmtree(former, ignore_errors=True)
        former.mkdir()
        for found in _ours(path):
            os.replace(found, former / found.name)
        return
    try:
        files.check_new(path)
    except ValueError:
        what = "exists and is not empty; use another" if path.is_dir() else "is a file"
        raise UserError(f"--output {path}: {what}") from None


def _put_back(path: Path) -> None:
    """The run in FORMER, if there is one, is the run in `path` again."""
    former = path / FORMER
    if former.is_dir():
        for found in former.iterdir():
            os.replace(found, path / found.name)
        former.rmdir()


def _remove(path: Path) -> None:
    for found in _ours(path):
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)


def _check_same(options: Mapping[str, Any], before: Path) -> None:
    import yaml

    try:
        then = yaml.safe_load(before.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--resume: {before} cannot be read ({one_line(error)[:200]})") from None
    now = yaml.safe_load(yaml.safe_dump(dict(options)))
    for name in sorted({*now, *then} - _FREE):
        if now.get(name) != then.get(name):
            was, given = (f"--{name} {side[name]}" if name in side else f"no --{name}" for side in (then, now))
            raise UserError(f"--resume: the run was started with {was}, not with {given}")


def _launch() -> str | None:
    """An identifier of this torchrun, the same after its restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {os.getppid()}"


def _started_again(path: Path) -> bool:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (path / LAUNCH).is_file():
        return False
    return (path / LAUNCH).read_text(encoding="utf-8") == _launch()
