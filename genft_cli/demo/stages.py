"""Stages of the demo that run in their own process: `python -m genft_cli.demo.stages STAGE DEMO PATH...`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from genft_cli import bases, finetune, recipes
from genft_cli.console import INTERRUPTED, quiet, say
from genft_cli.data import byte_tokenizer, collate, encode, read_records
from genft_cli.demo.run import Demo
from genft_cli.measure import step_seconds
from genft_cli.training import Schedule, train


def pretrain(demo: Demo, text: Path, directory: Path) -> None:
    """Pretrain a small Llama on the text and save model and tokenizer in the directory."""
    transformers.set_seed(demo.seed)
    tokenizer = byte_tokenizer()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=demo.hidden,
            intermediate_size=demo.feed_forward,
            num_hidden_layers=demo.layers,
            num_attention_heads=demo.heads,
            max_position_embeddings=demo.seq_len,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    device = bases.check_device("auto")
    windows = encode(read_records(str(text)), tokenizer, demo.seq_len, title="source code")
    parameters = sum(p.numel() for p in model.parameters())
    size, amount = f"{parameters / 1e6:.1f} M parameters", f"{windows.bytes / 1e6:.2f} MB"
    say(f"pretraining a model with {size} on {amount} of the standard library's source code")
    with tempfile.TemporaryDirectory() as scratch:
        train(
            model.to(device),
            windows,
            Schedule(
                steps=demo.pretrain_steps,
                lr=demo.pretrain_lr,
                batch_size=demo.pretrain_batch,
                weight_decay=0.1,
                beta2=0.98,
                seed=demo.seed,
            ),
            Path(scratch),
            pad_id=tokenizer.pad_token_id,
            title="pretraining",
            device=device,
        )
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))


def time_steps(demo: Demo, base: Path, text: Path, result: Path) -> None:
    """Measure the step times of all methods in turns and write them to `result` as JSON."""
    tokenizer, device = byte_tokenizer(), bases.check_device("auto")
    windows = encode(read_records(str(text)), tokenizer, demo.seq_len)
    batch = collate([windows[i] for i in range(demo.batch_size)], tokenizer.pad_token_id)
    transformers.set_seed(demo.seed)
    models = {}
    for method in demo.methods:
        config = recipes.peft_config(method, target_modules=None if method == "full" else demo.target_modules)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
        models[method] = finetune.adapt(model, config, [batch]).to(device)
    times = step_seconds(
        models,
        {name: value.to(device) for name, value in batch.items()},
        rounds=demo.timing_rounds,
        title="time per step, in turns",
    )
    result.write_text(json.dumps(times) + "\n", encoding="utf-8")


STAGES: dict[str, Callable[..., None]] = {"pretrain": pretrain, "time": time_steps}


def main(arguments: Sequence[str]) -> int:
    quiet()
    stage, demo, *paths = arguments
    try:
        STAGES[stage](Demo.parse(demo), *map(Path, paths))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
