"""Small byte-level models trained in this process, and what they have learnt: bits of what is held out."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from benchmarks.subjects.tasks import IGNORED, Rows
from genft_cli import methods
from genft_modules import needs_slices, select_slices

CALIBRATION = 16  # batches by which GRFT chooses, the default of `genft finetune`


def adapted(base: nn.Module, method: str, config: Any) -> nn.Module:
    """A copy of the base with a new adapter; without a configuration, a copy that is trained as a whole."""
    model = copy.deepcopy(base)
    if config is None:
        return model
    model = get_peft_model(model, config)
    methods.apply_fused(model, method)
    return model


def train(
    model: Any,
    rows: Rows,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    warmup: float = 0.0,
    clip: float = math.inf,
) -> None:
    """AdamW without decay and a cosine to zero, on rows in an order of the seed.

    Args:
        warmup: share of the steps in which the learning rate rises to `lr`.
        clip: the greatest norm of all gradients together.
    """
    order = torch.randperm(len(rows.ids), generator=torch.Generator().manual_seed(seed))

    def at(step: int) -> dict[str, Tensor]:
        chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        return {"input_ids": rows.ids[chosen], "labels": rows.labels[chosen]}

    if needs_slices(model):
        select_slices(model, [at(step) for step in range(CALIBRATION)], progressbar=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
    model.train()
    for step in range(steps):
        model(**at(step)).loss.backward()
        if math.isfinite(clip):
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: Any, rows: Rows, batch: int = 32) -> tuple[float, float]:
    """(bits of each byte that is to be predicted, share of them that is the likeliest), without losses of other kinds,
    such as those that balance experts."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for ids, labels in zip(rows.ids.split(batch), rows.labels.split(batch), strict=True):
        wanted = labels[:, 1:]
        counted = wanted != IGNORED
        logits, wanted = model(input_ids=ids).logits[:, :-1][counted], wanted[counted]
        loss += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return loss / count / math.log(2), right / count
