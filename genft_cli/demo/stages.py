"""What the demo does in processes of their own: pretraining, one fine-tuning per method, timing.

The processes are forked from a server that has imported torch, transformers and TRL already, which takes longer than
training does. Peak memory is still that of each process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genft_cli.console import INTERRUPTED, RunError, quiet, say, told

# Imported here and nowhere at the top of this module: the server imports these once, before it forks.
_PRELOADED = [
    "genft_cli.demo.stages", "genft_cli.job", "genft_cli.finetune", "genft_cli.verify", "genft_cli.plotting",
    "trl", "trl.trainer.sft_trainer", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto", "datasets",
    "matplotlib.backends.backend_agg", "matplotlib.figure",
]  # fmt: skip


def in_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call the function in a new process. Raises RunError with what it failed with, KeyboardInterrupt if it was
    interrupted."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_guarded, args=(function, arguments, theirs))
    process.start()
    theirs.close()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join()
    if process.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.exitcode:
        try:
            reason = ours.recv()
        except EOFError:  # it was killed
            reason = f"exit code {process.exitcode}"
        raise RunError(f"{function.__name__}: {reason}")


def _guarded(function: Callable[..., None], arguments: tuple[Any, ...], theirs: Any) -> None:
    try:
        quiet()
        function(*arguments)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        theirs.send(told(error))
        sys.exit(1)


def pretrain(demo: Any, text: Path, directory: Path) -> None:
    """Pretrain a small Llama on the text and save model and tokenizer in the directory."""
    import transformers
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from genft_cli.demo.bytes import byte_tokenizer, windows
    from genft_cli.training import Progress

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
    rows = windows(text.read_text(encoding="utf-8"), tokenizer, demo.seq_len)
    size, amount = f"{model.num_parameters() / 1e6:.1f} M parameters", f"{rows.numel() / 1e6:.2f} MB"
    say(f"pretraining a model with {size} on {amount} of the standard library's source code")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=demo.pretrain_steps,
            per_device_train_batch_size=demo.pretrain_batch,
            learning_rate=demo.pretrain_lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            adam_beta2=0.98,
            seed=demo.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Progress("pretraining", Path(scratch))],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    from genft_modules.files import writing

    with writing(directory):
        model.save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))


def adapt(command: list[str]) -> None:
    """`genft finetune`, in this process."""
    from genft_cli import arguments, finetune

    finetune.run(arguments.parse(command[0], command[1:]))


def time_steps(demo: Any, base: Path, text: Path, result: Path) -> None:
    """Measure the step times of all methods in turns and write them to `result` as JSON."""
    import transformers

    from genft_cli import bases, methods
    from genft_cli.demo.bytes import byte_tokenizer, windows
    from genft_cli.measure import step_seconds

    device = bases.check_device("auto")
    ids = windows(text.read_text(encoding="utf-8"), byte_tokenizer(), demo.seq_len)[: demo.batch_size].to(device)
    transformers.set_seed(demo.seed)
    models = {}
    for method in demo.methods:
        config = methods.peft_config(method, target_modules=None if method == "full" else demo.target_modules)
        models[method] = adapted(base, config).to(device)
        methods.apply_fused(models[method], method)
    times = step_seconds(
        models, {"input_ids": ids, "labels": ids}, rounds=demo.timing_rounds, title="time per step, in turns"
    )
    from genft_modules.files import replace_text

    replace_text(result, json.dumps(times) + "\n")


def adapted(base: Path, config: Any) -> Any:
    """The base model with a new adapter; without a configuration, the model itself."""
    import torch
    import transformers
    from peft import get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if config is None:
        return model
    if getattr(config, "selection", None) == "gradient":
        config.selection = "random"  # which rows are trained makes no difference to the time
    return get_peft_model(model, config)


def check(runs: list[Path]) -> None:
    """Reload the adapters of the runs, in this process; each result is in RUN/reload.json."""
    from genft_cli import verify

    verify.verify_all(runs)


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """The loss curves of all methods."""
    from genft_cli.plotting import loss_curves

    loss_curves(runs, path)
