"""Shared by the examples: a small model instead of a pretrained one, and learnable data."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def tiny_llama() -> LlamaForCausalLM:
    """A small Llama, with the same weights in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def tiny_data(rows: int = 64, length: int = 16, step: int = 5) -> list[dict[str, torch.Tensor]]:
    """Sequences that count in steps: rows of input_ids and labels, int64 [length]."""
    starts = torch.arange(rows)[:, None]
    ids = (starts + step * torch.arange(length)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in ids]


def batches(data: list[dict[str, torch.Tensor]], size: int = 8) -> list[dict[str, torch.Tensor]]:
    """The rows in batches: int64 [size, length]."""
    groups = [data[i : i + size] for i in range(0, len(data), size)]
    return [{name: torch.stack([row[name] for row in group]) for name in group[0]} for group in groups]
