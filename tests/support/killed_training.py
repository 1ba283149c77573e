"""Trains with every method to the end, and again and again: killed on the way, and resumed.

`python -m tests.support.killed_training DIRECTORY KILLS`; `test_resume.py` compares what they leave behind. Each run is
a process of its own, a fork of one that has imported everything and computed nothing yet.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from random import SystemRandom

import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.support.cases import CASES, MODELS

STEPS, SAVE_EVERY = 6, 2
# One per way of keeping parameters; dropout where a method has any: then the random state has to come back, too.
METHODS = {
    "wegeft": {"wegeft_dropout": 0.3},
    "genft_gelu": {"drop": 0.2},
    "sas": {},
    "grft": {},
}


MOMENTS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step")


class Kill(TrainerCallback):
    """The process is gone in the middle of a step, as when its machine is."""

    def __init__(self, step: int, moment: str) -> None:
        def kill(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, moment, kill)


def train(case: str, directory: Path, *callbacks: TrainerCallback, resume: bool = False) -> None:
    base, targets = MODELS["bert"]  # its own dropout is on
    model = get_peft_model(base(), CASES[case](target_modules=targets, modules_to_save=["classifier"], **METHODS[case]))
    arguments = TrainingArguments(
        directory,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        save_steps=SAVE_EVERY,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = torch.randint(0, 61, (10, 6), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": row, "labels": row.sum() % 3} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train(resume_from_checkpoint=resume)


def forked(*args, **kwargs) -> int:
    """Runs `train` in a fork; what `os.wait` says of its end."""
    child = os.fork()
    if child == 0:
        try:
            train(*args, **kwargs)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main() -> None:
    directory, kills = Path(sys.argv[1]), int(sys.argv[2])
    random = SystemRandom()
    for case in METHODS:
        assert forked(case, directory / case / "whole") == 0, case
    for number in range(kills):
        case = list(METHODS)[number % len(METHODS)]
        step, moment = random.randrange(SAVE_EVERY, STEPS), random.choice(MOMENTS)  # after the first checkpoint
        killed = directory / case / f"{number}, killed in step {step}, {moment}"
        assert forked(case, killed, Kill(step, moment)) == signal.SIGKILL, killed
        assert not (killed / f"checkpoint-{STEPS}").exists()
        assert forked(case, killed, resume=True) == 0, killed


if __name__ == "__main__":
    main()
