"""What every trainer gets: a progress bar, a log on disk, checkpoints in time, a stop when training diverges."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from genft_cli import runs
from genft_cli.console import RunError, say
from genft_modules.files import writing
from genft_modules.model.slices import PenaltyMixin
from genft_modules.progress import bar

WARMUP_STEPS = 3  # excluded from the median step time
_LOWER = "a lower --learning_rate or a longer --warmup_steps may help"
FLAT = 0.995  # a loss that falls by less than half a per cent is flat


class TrainerMixin(PenaltyMixin):
    """Before a trainer's class: GRFT's optional penalty, and no checkpoint of a model that has diverged."""

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        super().log(logs, *arguments, **options)  # type: ignore[misc]
        if not math.isfinite(logs.get("loss", 0.0)):
            raise RunError(f"the loss is {logs['loss']} at step {self.state.global_step}; {_LOWER}")  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
                step = self.state.global_step  # type: ignore[attr-defined]
                raise RunError(f"{name} is no longer finite at step {step}; {_LOWER}")
        directory = Path(self.args.output_dir)  # type: ignore[attr-defined]
        runs.check_there(directory)
        try:
            with writing(directory):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except OSError:
            checkpoint = directory / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            if checkpoint.is_dir() and runs.fault_of(checkpoint):
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """The adapter brings its own card."""


class Progress(TrainerCallback):
    """The progress bar, the log on disk, a line per evaluation, and the time of each step."""

    def __init__(self, title: str, directory: Path) -> None:
        self.title, self.log = title, directory / runs.LOG
        self.bar: Any = None
        self.seconds: list[float] = []
        self._began: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = bar(state.max_steps, self.title, initial=state.global_step, show=state.is_world_process_zero)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # From begin to begin, because a GPU works on after the end.
        now = time.perf_counter()
        if self._began is not None:
            self.seconds.append(now - self._began)
        self._began = now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()
        if control.should_evaluate or control.should_save or state.global_step == state.max_steps:
            if self._began is not None:
                self.seconds.append(time.perf_counter() - self._began)
            self._began = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs):
            return
        if "loss" in logs and self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        for key in held_out_losses(logs):
            name = key.removeprefix("eval_").removesuffix("loss").rstrip("_")
            say(f"step {state.global_step}: held-out loss {logs[key]:.4f}{name and f' of {name}'}")
        row = {"step": state.global_step, "time": round(time.time(), 3), **logs}
        with writing(self.log.parent), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def seconds_per_step(self) -> float | None:
        steady = self.seconds[WARMUP_STEPS:] or self.seconds
        return statistics.median(steady) if steady else None


def held_out_losses(logs: Mapping[str, Any]) -> list[str]:
    """The keys of held-out losses: eval_loss, or eval_NAME_loss for each adapter of a group."""
    return [key for key in logs if key.startswith("eval_") and key.endswith("loss")]


class Trained(Exception):
    """There is nothing left to train."""


class End(TrainerCallback):
    """Raises `Trained` before the first step if the checkpoint to resume from is the last of its run. transformers
    would train one more step."""

    def __init__(self) -> None:
        self._first = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._first and (state.global_step >= state.max_steps or _out_of_patience(state)):
            raise Trained
        self._first = False


def _out_of_patience(state: Any) -> bool:
    """Whether the run of a loaded checkpoint was ended by EarlyStoppingCallback."""
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
    if not isinstance(stopping, dict):
        return False
    patience = stopping["args"]["early_stopping_patience"]
    return bool(stopping["attributes"]["early_stopping_patience_counter"] >= patience)


class Keeper(TrainerCallback):
    """Checkpoints at least every `minutes`, and one more when a signal asks to stop."""

    def __init__(self, minutes: float) -> None:
        self.limit = 60 * minutes if minutes > 0 else math.inf
        self.stopped_by: int | None = None
        self._saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due, stop = time.monotonic() - self._saved >= self.limit, self.stopped_by is not None
        if args.world_size > 1:  # all processes save, or none
            flags = torch.tensor([due, stop], dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            due, stop = map(bool, flags.tolist())
        if due or stop:
            control.should_save = True
        if stop:
            self.stopped_by = self.stopped_by or signal.SIGINT
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends training after the current step, with a checkpoint; the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self.stopped_by is not None:
                raise KeyboardInterrupt
            self.stopped_by = number
            say("stopping after this step, with a checkpoint; once more to stop at once")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def flat(curve: list[tuple[int, float]]) -> str | None:
    """What to say of a training curve of (step, loss) that does not fall; None if it falls or is too short to tell."""
    part = len(curve) // 4
    if part < 2:
        return None
    first, last = (statistics.fmean(loss for _, loss in piece) for piece in (curve[:part], curve[-part:]))
    if last < FLAT * first:
        return None
    return f"the training loss hardly fell ({first:.3f} to {last:.3f}); a higher --learning_rate may help"
