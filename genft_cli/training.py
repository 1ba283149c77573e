"""Training with transformers' Trainer: progress bar, held-out evaluation, step time and memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from genft_cli.data import IGNORED, Windows, collate
from genft_cli.measure import PeakMemory, synchronize
from genft_modules.model.slices import PenaltyMixin
from genft_modules.progress import bar

WARMUP_STEPS = 3  # excluded from the median step time


@dataclass(frozen=True)
class Schedule:
    """Training hyperparameters. `warmup` is a number of steps, or a share of them if below 1."""

    steps: int
    lr: float
    batch_size: int = 8
    grad_accumulation: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.0
    beta2: float = 0.999
    seed: int = 0
    save_every: int = 0  # 0: never
    evaluations: int = 4  # number of held-out evaluations, evenly spaced, including one after the last step
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False


@dataclass
class Outcome:
    """Results of a run: bits per byte (in training including the penalty, if any), seconds, MiB."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds_per_step: float | None = None
    peak_mib: float = 0.0


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, windows: Windows, batch_size: int, pad_id: int, title: str = "held out"
) -> float:
    """Negative log2-likelihood of the predicted tokens per byte of their text."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    nats = 0.0
    starts = range(0, len(windows), batch_size)
    with bar(len(starts), title, unit="batch", leave=False) as progress:
        for start in starts:
            rows = [windows[i] for i in range(start, min(start + batch_size, len(windows)))]
            batch = {name: value.to(device) for name, value in collate(rows, pad_id).items()}
            targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            if targets:
                output: Any = model(**batch)
                nats += float(output.loss) * targets
            progress.update()
    model.train(training)
    return nats / math.log(2) / windows.bytes


class _Trainer(PenaltyMixin, Trainer):
    """The Trainer with GRFT's optional penalty."""


class _Watch(TrainerCallback):
    """Progress bar, step times and held-out evaluation during training."""

    def __init__(self, title: str, schedule: Schedule, held_out: Windows | None, pad_id: int) -> None:
        self.title, self.schedule, self.held_out, self.pad_id = title, schedule, held_out, pad_id
        count = max(1, schedule.evaluations)
        self.measure_at = {math.ceil(schedule.steps * (i + 1) / count) for i in range(count)}
        self.seconds: list[float] = []
        self.bar: Any = None
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = bar(self.schedule.steps, self.title, initial=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(args.device)
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(args.device)
        self.seconds.append(time.perf_counter() - self.began)
        self.bar.update()
        if self.held_out is not None and state.global_step in self.measure_at:
            bits = bits_per_byte(kwargs["model"], self.held_out, self.schedule.batch_size, self.pad_id)
            # In the Trainer's history, so that it is saved in checkpoints.
            state.log_history.append({"step": state.global_step, "held_out": bits})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def train(
    model: torch.nn.Module,
    windows: Windows,
    schedule: Schedule,
    directory: Path,
    *,
    held_out: Windows | None = None,
    pad_id: int = 0,
    title: str = "training",
    resume_from: Path | None = None,
    device: torch.device | None = None,
) -> Outcome:
    """Train `model` in place. Checkpoints are saved in `directory`; `resume_from` is one of them."""
    device = device or next(model.parameters()).device
    checkpointing: dict[str, Any] = {}
    if schedule.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.grad_accumulation,
        learning_rate=schedule.lr,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup,
        weight_decay=schedule.weight_decay,
        adam_beta2=schedule.beta2,
        seed=schedule.seed,
        bf16=schedule.dtype == torch.bfloat16,
        fp16=schedule.dtype == torch.float16,
        logging_steps=max(1, schedule.steps // 200),
        logging_nan_inf_filter=False,
        save_strategy="steps" if schedule.save_every else "no",
        save_steps=schedule.save_every or schedule.steps,
        save_total_limit=2,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # adapters have none
        **checkpointing,
    )
    watch = _Watch(title, schedule, held_out, pad_id)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=windows,
        data_collator=partial(collate, pad_id=pad_id),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    memory = PeakMemory(arguments.device)
    memory.start()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        if watch.bar is not None:
            watch.bar.close()
    peak = memory.peak()
    # Mixed precision wraps the model's forward; evaluate and save the model itself from here on.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    steady = watch.seconds[WARMUP_STEPS:] or watch.seconds
    bits = windows.targets / windows.bytes / math.log(2)  # from nats per token to bits per byte
    history = trainer.state.log_history
    return Outcome(
        train=[(row["step"], row["loss"] * bits) for row in history if "loss" in row],
        held_out=[(row["step"], row["held_out"]) for row in history if "held_out" in row],
        seconds_per_step=statistics.median(steady) if steady else None,
        peak_mib=peak,
    )


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first. The Trainer writes trainer_state.json last; with several
    processes, each also writes its RNG state."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    random_states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else []
    found = []
    for path in directory.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if all((path / name).is_file() for name in random_states):
                found.append((int(state["global_step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [path for _, path in sorted(found)]


def drop_checkpoints(directory: Path, *, keep: Path | None = None) -> None:
    """Remove all checkpoints except `keep`, including incomplete ones."""
    for path in directory.glob("checkpoint-*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
