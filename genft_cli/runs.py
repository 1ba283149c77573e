"""The directory of a run: what it is started with, its checkpoints, and how it goes on after a stop.

OUTPUT holds the adapter's (or the model's) files, options.yaml, log.jsonl, run.json, loss.png, the logits that `verify`
compares with, and checkpoint-N directories.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genft_cli.console import UserError, one_line, say

OPTIONS, LOG, RECORD, PROBE = "options.yaml", "log.jsonl", "run.json", "probe.safetensors"
LAUNCH = ".launch"  # during the run: identifies the torchrun that started it
# Options that may change between an interrupted run and its continuation.
_FREE = {"output_dir", "resume", "overwrite", "verify", "checkpoint_minutes", "save_steps", "save_total_limit"}


def write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


# --- checkpoints -------------------------------------------------------------------------------------------------


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints in `directory`, oldest first. Says which are not whole."""
    found = []
    for path in directory.glob("checkpoint-*"):
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
    if not (any(checkpoint.glob("*.safetensors")) or any(checkpoint.glob("*model*"))):
        return "the weights are missing"
    for path in sorted(checkpoint.iterdir()):
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

    If the run fails before its first checkpoint, what it wrote is removed. After a restart by torchrun, the run resumes
    from its last checkpoint.

    Raises:
        UserError: there is a run already, or none to resume, or with other options.
    """
    from genft_modules.model import distributed

    try:
        distributed.agree("options", {f"--{name}": repr(value) for name, value in given.items()})
    except (ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from None
    path, resume_from = distributed.from_first(lambda: _opened(output, given, resume, overwrite))
    try:
        yield path, resume_from
    except BaseException:
        if distributed.rank() == 0:
            if found := checkpoints(path):
                say(f"the last checkpoint is {found[-1]}; to go on from there, add --resume to the same command")
            elif resume_from is None:
                _remove_run(path)
        raise
    if distributed.rank() == 0:
        (path / LAUNCH).unlink(missing_ok=True)


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
    if resume:
        if not (path / OPTIONS).is_file():
            raise UserError(f"--resume: no run to resume in {path}")
        _check_same(options, path / OPTIONS)
        found = checkpoints(path)
        if not found:
            raise UserError(f"--resume: no whole checkpoint in {path}")
        resume_from = found[-1]
    elif path.exists():
        if not path.is_dir():
            raise UserError(f"--output {path}: is a file")
        if any(path.iterdir()):
            if not (overwrite and (path / OPTIONS).is_file()):
                hint = "use another, --resume or --overwrite" if (path / OPTIONS).is_file() else "use another"
                raise UserError(f"--output {path}: exists and is not empty; {hint}")
            _remove_run(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / OPTIONS).write_text(yaml.safe_dump(options, sort_keys=True, allow_unicode=True), encoding="utf-8")
        if launch := _launch():
            (path / LAUNCH).write_text(launch, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or one_line(error)}") from None
    return path, resume_from


_OURS = (OPTIONS, LOG, RECORD, PROBE, LAUNCH, "loss.png", "README.md", "reload.json", "training_args.bin")
_OURS_LIKE = (
    "adapter_*", "model*.safetensors*", "config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt",
    "special_tokens_map.json", "chat_template.jinja", "added_tokens.json", "preprocessor_config.json",
)  # fmt: skip


def _remove_run(path: Path) -> None:
    """Remove what a run wrote, and the directory if nothing else is in it."""
    for found in path.glob("checkpoint-*"):
        shutil.rmtree(found, ignore_errors=True)
    for pattern in (*_OURS, *_OURS_LIKE):
        for found in path.glob(pattern):
            if not found.is_dir():
                found.unlink(missing_ok=True)
    if not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()


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
