"""Greedy answers in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from genft_cli.demo.bytes import byte_tokenizer
from genft_cli.generation import answers
from tests.cli.conftest import Genft

PROMPTS = ["The cat", "A", "What is the weight of the tree?"]


@pytest.fixture
def model(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(llama))


def _alone(model: Any, prompt: str, count: int) -> str:
    """Greedy decoding, written out: no batch, no padding, no cache."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    found: list[int] = []
    while len(found) < count:
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids + found]), use_cache=False).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        found.append(best)
    return tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_answers_like_each_prompt_alone(model: Any, batch_size: int) -> None:
    model.train()
    found = answers(model, byte_tokenizer(), PROMPTS, batch_size, 12)
    assert model.training
    assert found == [_alone(model.eval(), prompt, 12) for prompt in PROMPTS]
    assert all(found)


def test_it_stops_at_the_end_of_the_sequence(model: Any) -> None:
    tokenizer = byte_tokenizer()
    with torch.no_grad():  # the end of the sequence becomes the most probable token
        first = int(model(input_ids=torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])).logits[0, -1].argmax())
        model.lm_head.weight[tokenizer.eos_token_id] = 2 * model.lm_head.weight[first]
    assert answers(model, tokenizer, PROMPTS[:1], 1, 8) == [""]


def test_no_prompts(model: Any) -> None:
    assert answers(model, byte_tokenizer(), [], 4, 4) == []


def test_a_tokenizer_without_padding(model: Any) -> None:
    tokenizer = byte_tokenizer()
    expected = answers(model, tokenizer, PROMPTS, 8, 6)
    tokenizer.pad_token = None
    assert answers(model, tokenizer, PROMPTS, 8, 6) == expected


def test_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match="prompts: number 2 has no tokens"):
        answers(model, byte_tokenizer(), ["a", ""], 2, 4)
    with pytest.raises(ValueError, match=r"number 1 has 100 tokens; .* 128 positions take at most 98"):
        answers(model, byte_tokenizer(), ["a" * 100], 2, 30)


def test_what_the_command_refuses(genft: Genft, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "Who?", "answer": "I"}\n')
    for options, message in (
        (("--dataset", "test.jsonl"), "--prompt-column prompt: test.jsonl has the columns question, answer"),
        (("--dataset", "no.jsonl"), "--dataset no.jsonl: no such file"),
        (("--dataset", "test.jsonl", "--batch-size", 0), "--batch-size 0: must be at least 1"),
        (("--dataset", "test.jsonl", "--prompt-column", "question", "--output", "no/a.jsonl"), "no such folder"),
        (("--dataset", "test.jsonl", "--chat"), "--chat: is for --prompt only"),
        (("--prompt", "Who?", "--output", "a.jsonl"), "--output: is for --dataset only"),
        (("--prompt", "Who?", "--dataset", "test.jsonl"), "not allowed with argument"),
        ((), "one of the arguments --prompt --dataset is required"),
    ):
        done = genft("generate", "out", *options)
        assert done.code == 2
        assert message in done.err
    assert not (tmp_path / "out").exists()
