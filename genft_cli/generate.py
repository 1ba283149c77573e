"""`genft generate`: what the base model says, and what it says with the adapter."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from genft_cli import bases
from genft_cli.console import UserError, one_line
from genft_cli.generation import answers
from genft_cli.tables import check_columns, read_rows
from genft_modules.files import replace_text


def run(
    adapter: str,
    prompt: str,
    *,
    model: str | None = None,
    device: str = "auto",
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The answers of the base model and of the adapted model to `prompt`, one below the other.

    Args:
        chat: put the prompt into the tokenizer's chat template, as a user's message.
        temperature: 0 takes the likeliest token.

    Raises:
        UserError: the adapter, its base model or an option cannot be used.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"--temperature {temperature:g}: must be at least 0")
    loaded, tokenizer = _loaded(adapter, model, device)
    if chat and not tokenizer.chat_template:
        raise UserError("--chat: the tokenizer has no chat template")
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {name: inputs[name].to(loaded.device) for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    if temperature > 0:
        options["temperature"] = temperature

    def answer() -> str:
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids = loaded.eval().generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip("\n")

    with loaded.disable_adapter():
        before = answer()
    return f"--- base model\n{before}\n\n--- {adapter}\n{answer()}"


def run_file(
    adapter: str,
    dataset: str,
    output: str | None = None,
    *,
    model: str | None = None,
    device: str = "auto",
    prompt_column: str = "prompt",
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> str:
    """Answer the prompts of a file greedily, and write its rows with the answers in a column "generated".

    Args:
        dataset: .jsonl, .json, .csv or .parquet with one prompt per row, complete with its template.
        output: .jsonl; default: DATASET with .answers.jsonl.

    Raises:
        UserError: the adapter, its base model, the file or an option cannot be used.
    """
    for option, value in (("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{option} {value}: must be at least 1")
    rows = read_rows("--dataset", dataset)
    check_columns("--prompt-column", dataset, rows, prompt_column, dataset)
    path = bases.path_of(output) if output else bases.path_of(dataset).with_suffix(".answers.jsonl")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: no such folder")
    loaded, tokenizer = _loaded(adapter, model, device)
    try:
        found = answers(loaded, tokenizer, [str(row[prompt_column]) for row in rows], batch_size, max_new_tokens)
    except ValueError as error:
        raise UserError(f"--dataset {dataset}: {one_line(error)}") from None
    lines = [
        json.dumps({**row, "generated": answer}, ensure_ascii=False) for row, answer in zip(rows, found, strict=True)
    ]
    replace_text(path, "\n".join(lines) + "\n")
    return f"{len(rows):,} answers: {path}"


def _loaded(adapter: str, model: str | None, device: str) -> tuple[Any, Any]:
    """(the adapted model, its tokenizer). Raises UserError if it cannot be read or does not generate text."""
    config = bases.config_of(adapter)
    base = bases.base_of(config, adapter, model)
    tokenizer = _tokenizer(adapter, base)
    loaded = bases.load(adapter, config, base, device)
    if not loaded.can_generate():
        raise UserError(f"{adapter}: adapts a model that does not generate text")
    return loaded, tokenizer


def _tokenizer(adapter: str, base: str) -> Any:
    """The tokenizer saved beside the adapter, else the base model's."""
    from transformers import AutoTokenizer

    beside = (bases.path_of(adapter) / "tokenizer_config.json").is_file()
    try:
        return AutoTokenizer.from_pretrained(str(bases.path_of(adapter)) if beside else bases.place(base))
    except Exception as error:  # transformers raises many types
        raise UserError(f"--model {base}: its tokenizer cannot be read ({one_line(error)[:200]})") from None
