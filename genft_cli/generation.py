"""Greedy answers to a list of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genft_modules.progress import bar


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int = 8, max_new_tokens: int = 256
) -> list[str]:
    """The most probable next tokens of each prompt, up to the end of the sequence, as text without special tokens.

    Batches are padded on the left. Prompts of similar length share a batch; the answers are in the prompts' order.

    Args:
        model: a causal language model, with or without adapters. It is not modified.
        tokenizer: its tokenizer.
        prompts: texts that are ready for the model: templates are already applied.
        batch_size: prompts per batch.
        max_new_tokens: limit for each answer.

    Raises:
        ValueError: a prompt without tokens, or one that leaves no room for max_new_tokens in the model's context.
    """
    from transformers import GenerationConfig

    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(tokens, 1):
        if not ids:
            raise ValueError(f"prompts: number {number} has no tokens")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompts: number {number} has {len(ids)} tokens; with max_new_tokens = {max_new_tokens}, the model's "
                f"{limit} positions take at most {limit - max_new_tokens}"
            )
    ends = _ends(model, tokenizer)
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = ends[0] if ends else 0
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=padding
    )
    device = next(model.parameters()).device
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found = [""] * len(tokens)
    training = model.training
    model.eval()
    try:
        with bar(len(tokens), "generating", unit="answer") as progress:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                width = max(len(tokens[i]) for i in chosen)
                ids = torch.tensor([[padding] * (width - len(tokens[i])) + tokens[i] for i in chosen], device=device)
                mask = torch.tensor([[0] * (width - len(tokens[i])) + [1] * len(tokens[i]) for i in chosen])
                output = model.generate(
                    input_ids=ids, attention_mask=mask.to(device), generation_config=settings, use_cache=True
                )
                for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
                    found[i] = tokenizer.decode(row, skip_special_tokens=True)
                progress.update(len(chosen))
    finally:
        model.train(training)
    return found


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, which may be several, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    found = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(end for end in (*found, tokenizer.eos_token_id) if end is not None))
