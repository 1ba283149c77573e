"""The built-in demo: pretrain a small byte-level Llama on Python's source code, then fine-tune it on the documentation.

Each method runs as `genft finetune --model ... --dataset ...` in its own process, so that peak memory is measured per
method. Then the step times of all methods are measured in turns, and a new process reloads every adapter. This module
starts the processes and reports; `genft_cli.demo.stages` has pretraining and timing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genft_cli.console import INTERRUPTED, UserError, one_line, say, table
from genft_cli.demo import corpora
from genft_cli.measure import ratio
from genft_cli.plotting import loss_curves
from genft_cli.verify import verify_in_new_process

REFERENCE = "peft-lora"  # times are relative to this method
NAMES = {
    "wegeft": "WeGeFT",
    "gift": "GIFT",
    "genft": "GenFT (linear)",
    "genft-gelu": "GenFT (gelu)",
    "grft": "GRFT",
    "sas": "SaS (reconstructed)",
    "peanut": "PEANuT",
    "peft-lora": "LoRA (peft)",
    "lora": "LoRA (genft)",
    "full": "full fine-tuning",
}


# Each the best of three to five values within a factor of five, by held-out loss after 80 steps (GRFT: 20).
LEARNING_RATES = {
    "wegeft": 3.5e-3,
    "gift": 5e-3,
    "genft": 2e-3,
    "genft-gelu": 4e-3,
    "grft": 4e-3,
    "sas": 1e-2,
    "peanut": 1e-2,
    "peft-lora": 4e-3,
    "lora": 4e-3,
    "full": 5e-4,
}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Settings of the demo: a small Llama, and training short enough for two cores."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    feed_forward: int = 704
    seq_len: int = 256
    pretrain_steps: int = 800
    pretrain_batch: int = 2
    pretrain_lr: float = 6e-4
    batch_size: int = 4
    adapt_steps: int = 36
    evaluations: int = 2
    timing_rounds: int = 9
    held_out: float = 0.07
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    methods: tuple[str, ...] = tuple(NAMES)
    seed: int = 0

    @staticmethod
    def parse(text: str) -> Demo:
        """The inverse of `json.dumps(dataclasses.asdict(demo))`."""
        fields: dict[str, Any] = json.loads(text)
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return Demo(**fields)


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods without duplicates. Raises UserError for an unknown name, or if REFERENCE is missing."""
    for method in methods:
        if method not in NAMES:
            raise UserError(f"--methods {method}: unknown; choose from {', '.join(NAMES)}")
    if REFERENCE not in methods:
        raise UserError(f"--methods: {REFERENCE} is missing; times are relative to it")
    return tuple(dict.fromkeys(methods))


def default_cache() -> Path:
    """$XDG_CACHE_HOME/genft, by default ~/.cache/genft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genft"


def run(demo: Demo, output: Path, cache: Path) -> dict[str, Any]:
    """Run the demo. Returns the results, which are also written to OUTPUT: results.json, table.md, loss.png."""
    began = time.perf_counter()
    for option, directory in (("--output", output), ("--cache-dir", cache)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {directory}: {error.strerror or one_line(error)}") from None
    texts = write_texts(demo, output)
    # Spinning OpenMP threads stall for milliseconds when another process has the core: one busy neighbour makes a step
    # ten times slower. Sleeping threads cost a few per cent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    base, pretrained = pretrained_base(demo, cache)
    runs = {}
    for number, method in enumerate(demo.methods, start=1):
        say(f"[{number}/{len(demo.methods)}] {NAMES[method]}")
        runs[method] = _adapt(demo, method, base, texts, output / method)
    _stage("time", demo, base, texts["train"], output / "times.json")
    times = json.loads((output / "times.json").read_text(encoding="utf-8"))
    reloads = verify_in_new_process([output / method for method in demo.methods])
    for method, reload in zip(demo.methods, reloads, strict=True):
        runs[method]["reload"] = reload
        runs[method]["timed_seconds_per_step"] = statistics.median(times[method])
        runs[method]["relative_time"] = ratio(times, method, REFERENCE)
    loss_curves({NAMES[method]: record for method, record in runs.items()}, output / "loss.png")
    results = {
        "demo": dataclasses.asdict(demo),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "base": str(base),
        "base_was_cached": not pretrained,
        "runs": runs,
        "seconds": time.perf_counter() - began,
    }
    (output / "table.md").write_text(report(results) + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


# What the pre-trained base depends on.
_BASE = {
    "hidden", "layers", "heads", "feed_forward", "seq_len",
    "pretrain_steps", "pretrain_batch", "pretrain_lr", "seed",
}  # fmt: skip


# --- the base ----------------------------------------------------------------------------------------------------


def pretrained_base(demo: Demo, cache: Path) -> tuple[Path, bool]:
    """(the base model's directory in the cache, whether it was trained just now).

    The directory's name is a hash of all it depends on: the demo's settings, Python's version and the text.
    """
    code = corpora.stdlib_code(demo.pretrain_steps * demo.pretrain_batch * demo.seq_len)
    key = json.dumps(
        [
            {name: value for name, value in dataclasses.asdict(demo).items() if name in _BASE},
            platform.python_version(),
            hashlib.sha256(code.encode()).hexdigest(),
        ]
    )
    place = cache / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (place / "config.json").is_file():
        say(f"using the cached base model: {place}")
        return place, False
    partial = Path(tempfile.mkdtemp(prefix=".base-", dir=cache))
    try:
        text = partial / "code.txt"
        text.write_text(code, encoding="utf-8")
        _stage("pretrain", demo, text, partial)
        text.unlink()
        try:
            os.replace(partial, place)
        except OSError:
            if not (place / "config.json").is_file():  # else another process has written the same base
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place, True


# --- the methods -------------------------------------------------------------------------------------------------


def finetune_command(
    demo: Demo, method: str, base: Path, texts: dict[str, Path], output: Path, *, lr: float, options: Sequence[str] = ()
) -> list[str]:
    """The command that fine-tunes the base on `texts["train"]` and evaluates on `texts["held-out"]`."""
    command = [
        sys.executable, "-m", "genft_cli", "finetune",
        "--model", str(base), "--dataset", str(texts["train"]), "--eval-dataset", str(texts["held-out"]),
        "--method", method, "--lr", str(lr), "--evaluations", str(demo.evaluations),
        "--steps", str(demo.adapt_steps), "--batch-size", str(demo.batch_size),
        "--seq-len", str(demo.seq_len), "--seed", str(demo.seed), "--dtype", "float32",
        "--output", str(output), "--overwrite", "--no-verify", *options,
    ]  # fmt: skip
    if method != "full":
        command += ["--target-modules", *demo.target_modules]
    return command


def write_texts(demo: Demo, directory: Path) -> dict[str, Path]:
    """Write the fine-tuning data: train.txt and held-out.txt."""
    texts = {}
    for name, text in zip(("train", "held-out"), corpora.pydoc_prose(demo.held_out), strict=True):
        texts[name] = directory / f"{name}.txt"
        texts[name].write_text(text, encoding="utf-8")
    return texts


def _adapt(demo: Demo, method: str, base: Path, texts: dict[str, Path], output: Path) -> dict[str, Any]:
    _run(finetune_command(demo, method, base, texts, output, lr=LEARNING_RATES[method]))
    record: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return record


def _stage(name: str, demo: Demo, *paths: Path) -> None:
    """Run one of `genft_cli.demo.stages` in a new process."""
    settings = json.dumps(dataclasses.asdict(demo))
    _run([sys.executable, "-m", "genft_cli.demo.stages", name, settings, *map(str, paths)])


def _run(command: list[str]) -> None:
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}")


# --- the result --------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """The demo's table, with the check of each reloaded adapter."""
    runs: dict[str, dict[str, Any]] = results["runs"]
    header = (
        "method",
        "trainable",
        "bits/byte before",
        "after",
        "time/step",
        "s/step",
        "peak MiB",
        "max Δ logit",
        "merged",
    )
    rows = []
    for method, record in runs.items():
        reload = record["reload"]
        rows.append(
            (
                NAMES[method],
                f"{record['trainable_parameters']:,}",
                f"{record['bits_per_byte_before']:.3f}",
                f"{record['bits_per_byte_after']:.3f}",
                f"{record['relative_time']:.2f}",
                f"{record['timed_seconds_per_step']:.3f}",
                f"{record['peak_memory_mib']:.0f}",
                f"{reload['loaded']:.1e}",
                "—" if reload["merged"] is None else f"{reload['merged']:.1e}",
            )
        )
    idle = statistics.median(record["idle_memory_mib"] for record in runs.values())
    device = next(iter(runs.values()))["device"]
    memory = (
        f"peak resident memory of the process during training ({idle:.0f} MiB before training)"
        if device == "cpu"
        else "peak memory allocated by torch during training"
    )
    agree = all(record["reload"]["agree"] for record in runs.values())
    return "\n".join(
        [
            table(header, rows),
            "",
            "bits/byte: on held-out text. time/step: relative to LoRA (peft), median over "
            f"{results['demo']['timing_rounds']} rounds in which the methods take turns.",
            f"peak MiB: {memory}.",
            "max Δ logit: adapter saved and reloaded in a new process, as loaded and merged; "
            + ("all agree." if agree else "NOT ALL AGREE."),
            f"total: {results['seconds']:.0f} s, "
            + ("base model from the cache." if results["base_was_cached"] else "including pretraining of the base."),
        ]
    )


def agrees(results: dict[str, Any]) -> bool:
    """Whether every reloaded adapter reproduces the logits of the trained one."""
    return all(record["reload"]["agree"] for record in results["runs"].values())
