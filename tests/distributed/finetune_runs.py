"""Two processes that run `genft finetune`, as forks of one that has imported everything.

`python -m tests.distributed.finetune_runs FOLDER` makes a model and a text in FOLDER, then a run whose processes have
different options, which has to be refused, one that nothing disturbs, in FOLDER/whole, the same in one process, and one
of which a process is killed, in FOLDER/killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import transformers  # noqa: F401 - before the forks
import trl  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: F401
from trl import SFTConfig, SFTTrainer  # noqa: F401

from genft_cli import finetune, job, plotting, verify  # noqa: F401
from genft_cli import main as cli
from genft_cli.demo.bytes import byte_tokenizer
from tests.distributed.contract import fork

STEPS = 24


def arguments(folder: Path, output: str) -> list[str]:
    options = f"""finetune --model {folder}/llama --dataset {folder}/text.txt --output {folder}/{output}
        --rank 4 --dropout 0.2 --target_modules q_proj v_proj --max_steps {STEPS} --per_device_train_batch_size 2
        --max_length 16 --save_steps 4 --learning_rate 1e-2 --no_verify --seed 7 --logging_steps 1 --eval_steps 24
        --gradient_checkpointing false"""
    return options.split()


def prepare(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    text = "\n\n".join(
        f"Paragraph {i}: {i * i} is the square of {i}, and {i * 7 % 13} is something else." for i in range(40)
    )
    (folder / "text.txt").write_text(text)


def run(folder: Path, output: str, *more: str) -> None:
    torch.set_num_threads(1)
    os._exit(cli.main([*arguments(folder, output), *more]))


def rank(folder: Path) -> None:
    """One of torchrun's processes; leaves its number where `kill` finds it."""
    torch.set_num_threads(1)
    (folder / f"process-{os.environ['RANK']}").write_text(str(os.getpid()))
    if code := cli.main(arguments(folder, "killed")):
        sys.exit(code)


def kill(folder: Path) -> None:
    """Kill the second process when there is a second checkpoint."""
    while not any((folder / "killed" / f"checkpoint-{step}").exists() for step in (8, 12, 16)):
        time.sleep(0.002)
    os.kill(int((folder / "process-1").read_text()), signal.SIGKILL)


def killed(folder: Path) -> None:
    """What `torchrun --nproc-per-node 2 --max-restarts 1` does, with forks."""
    threading.Thread(target=kill, args=(folder,), daemon=True).start()
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, run_id="killed", start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, rank)(folder)


def main(folder: Path) -> None:
    if not all(fork(1, lambda: prepare(folder))):
        ends = {"refused": fork(2, lambda: run(folder, "refused", "--warmup_steps", os.environ["RANK"]))}
        ends["whole"] = fork(2, lambda: run(folder, "whole"))
        ends["single"] = fork(1, lambda: run(folder, "single", "--per_device_train_batch_size", "4"))
        print(json.dumps({name: [os.waitstatus_to_exitcode(end) for end in found] for name, found in ends.items()}))
        sys.stdout.flush()
        killed(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
