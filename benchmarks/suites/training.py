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

NEVER = -1e9  # the logit of what must not be predicted
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


def probe(base: Any, rows: Rows, batch: int = 32, decay: float = 1e-4) -> None:
    """Replaces the head of a causal model by a linear probe, which is frozen: logistic regression from the last hidden
    states to the labels of `rows`. Bytes that are no label get no chance."""
    counted = rows.labels[:, 1:] != IGNORED
    with torch.no_grad():
        states = [base.base_model(input_ids=ids).last_hidden_state[:, :-1] for ids in rows.ids.split(batch)]
        seen = nn.functional.pad(torch.cat(states)[counted], (0, 1), value=1.0)  # the last column is for the bias
        values, wanted = rows.labels[:, 1:][counted].unique(return_inverse=True)
    weight = seen.new_zeros(len(values), seen.shape[1]).requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=300, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(seen @ weight.t(), wanted) + decay * weight.square().sum()
        found.backward()
        return found.detach()

    optimizer.step(loss)
    head = nn.Linear(seen.shape[1] - 1, base.config.vocab_size, device=seen.device, dtype=seen.dtype)
    with torch.no_grad():
        head.weight.zero_()[values] = weight[:, :-1]
        head.bias.fill_(NEVER)[values] = weight[:, -1]
    base.set_output_embeddings(head.requires_grad_(False))


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
