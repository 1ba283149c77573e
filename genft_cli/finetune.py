"""`genft finetune`, `genft dpo` and `genft grpo`: TRL's trainers with genft's methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from genft_cli import data, job, methods, runs
from genft_cli.arguments import COMMANDS, Options
from genft_cli.bases import place
from genft_cli.console import UserError, is_first, one_line, say

PROBE_TOKENS = 256  # length of the text on which the reloaded adapter is compared


def run(options: Options) -> dict[str, Any]:
    """Train as the options say. Returns the record of the run; empty on all ranks but the first.

    Raises:
        UserError: an option, the model or the data does not fit; nothing was written.
    """
    checked, tokenizer = check(options)
    where = runs.directory(
        options.training.output_dir, options.given, resume=options.run.resume, overwrite=options.run.overwrite
    )
    with where as (directory, resume_from):
        trainer = _trainer(checked, tokenizer)
        _warn_of_cut(trainer)
        return job.train(checked, trainer, directory, resume_from, probe(trainer, tokenizer))


def check(options: Options) -> tuple[job.Job, Any]:
    """(the checked run, the tokenizer or processor). Raises UserError."""
    job.check_numbers(options)
    base_config = job.base_of(options)
    job.peft_config_of(options, "CAUSAL_LM")
    tokenizer = _tokenizer(options, base_config)
    _fit_length(options, base_config)
    say("reading the data")
    train, held_out = data.load(options)
    _check_template(options, train, tokenizer)
    checked = job.check(options, _class_of(base_config, options), base_config, "CAUSAL_LM", train, held_out)
    return checked, tokenizer


def _class_of(base_config: Any, options: Options) -> Any:
    """The class of the base model: its own where it generates text, so that vision-language models are whole."""
    import transformers

    remote = getattr(base_config, "auto_map", None) and getattr(options.training, "trust_remote_code", False)
    for name in () if remote else base_config.architectures or ():
        if name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _tokenizer(options: Options, base_config: Any) -> Any:
    from transformers import AutoProcessor

    name = options.model.model_name_or_path
    try:
        found = AutoProcessor.from_pretrained(
            place(name),
            revision=options.model.model_revision,
            trust_remote_code=getattr(options.training, "trust_remote_code", False),
        )
    except Exception as error:  # transformers raises many types
        raise UserError(f"--model {name}: its tokenizer cannot be read ({one_line(error)[:200]})") from None
    tokenizer = getattr(found, "tokenizer", found)
    if not hasattr(tokenizer, "get_vocab"):
        raise UserError(f"--model {name}: has no tokenizer")
    vocabulary = base_config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}")
    if tokenizer.eos_token is None and not getattr(options.training, "eos_token", None):
        raise UserError(f"--model {name}: its tokenizer has no end-of-sequence token; name one with --eos_token")
    return found


def _fit_length(options: Options, base_config: Any) -> None:
    """TRL's default length may be more than the model takes."""
    limit = getattr(base_config.get_text_config(), "max_position_embeddings", None)
    length = getattr(options.training, "max_length", None)
    if limit is None or length is None or length <= limit:
        return
    if "max_length" in options.given:
        raise UserError(f"--max_length {length}: the model takes at most {limit} tokens")
    options.training.max_length = limit


def _check_template(options: Options, train: Any, tokenizer: Any) -> None:
    first: Mapping[str, Any] = next(iter(train))
    chat = [name for name in ("messages", "prompt", "chosen") if isinstance(first.get(name), list)]
    if chat and not tokenizer.chat_template and not getattr(options.training, "chat_template_path", None):
        raise UserError(
            f"--dataset: has {chat[0]}, but the tokenizer has no chat template; name one with --chat_template_path"
        )
    text = str(options.script.dataset_name or "").endswith(".txt")
    if options.command == "finetune" and text and "packing" not in options.given:
        # One long text: windows of max_length. The other strategies would keep its beginning only.
        options.training.packing, options.training.packing_strategy = True, "wrapped"


def _trainer(checked: job.Job, tokenizer: Any) -> Any:
    import trl

    options = checked.options
    model = job.load(checked)
    if options.training.ddp_find_unused_parameters is None and not hasattr(tokenizer, "tokenizer"):
        options.training.ddp_find_unused_parameters = False  # a processor: the vision tower may be unused
    details: dict[str, Any] = {"processing_class": tokenizer}
    if options.command == "grpo":
        details["reward_funcs"] = _rewards(options)
    kind = job.trainer_class(getattr(trl, COMMANDS[options.command][2]))
    say("preparing the data")
    try:
        trainer = kind(
            model=model,
            args=options.training,
            train_dataset=checked.train,
            eval_dataset=checked.held_out,
            peft_config=checked.peft_config,
            **details,
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(one_line(error)) from None
    if options.method.method not in methods.PLAIN:
        # On quantised models TRL rounds them to bf16, in which small updates are lost.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def _rewards(options: Options) -> list[Any]:
    """Reward functions as in `trl grpo`: names known to TRL, or dotted paths of functions."""
    import importlib
    import os
    import sys

    from trl import rewards

    found: list[Any] = [name] if (name := options.script.reward_model_name_or_path) else []
    for name in options.script.reward_funcs or ():
        module, _, function = name.rpartition(".")
        if not module and hasattr(rewards, name):
            found.append(getattr(rewards, name))
            continue
        sys.path.insert(0, os.getcwd())
        try:
            found.append(getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--reward_funcs {name}: {one_line(error)}") from None
        finally:
            sys.path.pop(0)
    if not found:
        raise UserError("--reward_funcs is missing: a name of TRL's, such as accuracy_reward, or package.function")
    return found


def _warn_of_cut(trainer: Any) -> None:
    """Says how many sequences reach the maximal length, so that a completion that is cut does not go unnoticed."""
    rows, limit = trainer.train_dataset, getattr(trainer.args, "max_length", None)
    if limit is None or getattr(trainer.args, "packing", False) or "input_ids" not in (rows.column_names or ()):
        return
    cut = sum(len(row) >= limit for row in rows["input_ids"])
    if cut and is_first():
        say(f"{cut:,} of {len(rows):,} sequences reach --max_length {limit}; what is longer was cut off")


def probe(trainer: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """A text of the data as inputs of the model, on which a saved adapter is compared with the trained one."""
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    row = next(iter(rows))
    ids = row.get("input_ids") or row.get("prompt_ids")
    if ids is None:
        ids = getattr(tokenizer, "tokenizer", tokenizer)("The quick brown fox jumps over the lazy dog.")["input_ids"]
    return {"input_ids": torch.tensor([list(ids)[:PROBE_TOKENS]])}
