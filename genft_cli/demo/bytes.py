"""The demo's tokenizer, in which a token is a byte, and windows of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def windows(text: str, tokenizer: Any, length: int) -> torch.Tensor:
    """The text in windows of `length` tokens [count, length]; what does not fill the last one is left out."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer: ids 0 to 255 are the bytes, then start, end and padding; 259 in total."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The `tokenizers` library maps bytes to printable characters: those printable in Latin-1 to themselves, the rest
    # to U+0100 and up.
    shown: Iterable[int] = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    vocab = {chr(byte if byte in shown else next(spare)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
