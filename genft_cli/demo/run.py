"""The built-in demo: pretrain a small byte-level Llama on Python's source code, then fine-tune it on the documentation.

Each method runs as `genft finetune --model ... --dataset ...` in its own process, so that peak memory is measured per
method, and is a row of the table as soon as it has finished. Then the step times of all methods are measured in turns,
and a new process reloads every adapter. This module starts the processes and reports; `genft_cli.demo.stages` has what
they do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from genft_cli.console import RunError, UserError, check_writable, one_line, say, table
from genft_cli.demo import corpora, stages

REFERENCE = "peft-lora"  # times are relative to this method
EQUAL = 0.01  # bits per byte: seeds differ by as much
NAMES = {
    "wegeft": "WeGeFT",
    "gift": "GIFT",
    "genft": "GenFT (linear)",
    "genft-gelu": "GenFT (gelu)",
    "grft": "GRFT",
    "sas": "SaS (reconstructed)",
    "peanut": "PEANuT",
    "hira": "HiRA",
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
    "hira": 1e-1,
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
    pretrain_steps: int = 360
    pretrain_batch: int = 2
    pretrain_lr: float = 6e-4
    batch_size: int = 4
    adapt_steps: int = 36
    evaluations: int = 2
    timing_rounds: int = 9
    held_out: float = 0.07
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    methods: tuple[str, ...] = ("peft-lora", "wegeft", "gift", "genft-gelu", "full")
    seed: int = 0


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """The methods without duplicates; "all" stands for all. Raises UserError for an unknown name, or if REFERENCE is
    missing."""
    if list(methods) == ["all"]:
        return tuple(NAMES)
    for method in methods:
        if method not in NAMES:
            raise UserError(f"--methods {method}: unknown; choose from {', '.join(NAMES)}, or all")
    if REFERENCE not in methods:
        raise UserError(f"--methods: {REFERENCE} is missing; times are relative to it")
    return tuple(dict.fromkeys(methods))


def default_cache() -> Path:
    """$XDG_CACHE_HOME/genft, by default ~/.cache/genft."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "genft"


def run(demo: Demo, output: Path, cache: Path, show: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the demo. Returns the results, which are also written to OUTPUT: results.json, table.md, loss.png.

    Args:
        show: gets the table, line by line as the methods finish.
    """
    began = time.perf_counter()
    for option, directory in (("--output", output), ("--cache-dir", cache)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {directory}: {error.strerror or one_line(error)}") from None
        check_writable(option, str(directory))
    texts = write_texts(demo, output)
    # Spinning OpenMP threads stall for milliseconds when another process has the core: one busy neighbour makes a step
    # ten times slower. Sleeping threads cost a few per cent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    base, pretrained = pretrained_base(demo, cache)
    runs: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(demo.methods, start=1):
        say(f"[{number}/{len(demo.methods)}] {NAMES[method]}")
        runs[method] = _adapt(demo, method, base, texts, output / method, first=not runs)
        if number == 1:
            base_curve = runs[method]["held_out_curve"][:1]  # of the base, which is the same for all
            show(_HEADER)
        else:
            runs[method]["bits_per_byte_before"] = base_curve[0][1]
            runs[method]["held_out_curve"][:0] = base_curve
        show(_row(method, runs[method]))
    stages.in_process(stages.time_steps, demo, base, texts["train"], output / "times.json")
    times = json.loads((output / "times.json").read_text(encoding="utf-8"))
    stages.in_process(stages.check, [output / method for method in demo.methods])
    for method, record in runs.items():
        record["reload"] = json.loads((output / method / "reload.json").read_text(encoding="utf-8"))
        record["timed_seconds_per_step"] = statistics.median(times[method])
        record["relative_time"] = statistics.median(a / b for a, b in zip(times[method], times[REFERENCE], strict=True))
    stages.in_process(stages.plot, {NAMES[method]: record for method, record in runs.items()}, output / "loss.png")
    results = {
        "demo": dataclasses.asdict(demo),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "threads": os.cpu_count(),
        "base": str(base),
        "base_was_cached": not pretrained,
        "runs": runs,
        "seconds": time.perf_counter() - began,
    }
    _write(output / "table.md", report(results) + "\n")
    _write(output / "results.json", json.dumps(results, indent=2) + "\n")
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
        _write(text, code)
        stages.in_process(stages.pretrain, demo, text, partial)
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
    """The options of `genft` that fine-tune the base on `texts["train"]` and evaluate on `texts["held-out"]`."""
    command = [
        "finetune", "--model", str(base), "--dataset", str(texts["train"]), "--eval_dataset", str(texts["held-out"]),
        "--method", method, "--learning_rate", str(lr), "--max_steps", str(demo.adapt_steps),
        "--eval_steps", str(-(-demo.adapt_steps // demo.evaluations)), "--logging_steps", "1",
        "--per_device_train_batch_size", str(demo.batch_size), "--per_device_eval_batch_size", str(demo.batch_size),
        "--max_length", str(demo.seq_len), "--seed", str(demo.seed), "--dtype", "float32",
        "--gradient_checkpointing", "false", "--save_strategy", "no", "--checkpoint_minutes", "0",
        "--output", str(output), "--overwrite", "--no_verify", *options,
    ]  # fmt: skip
    if method != "full":
        command += ["--target_modules", *demo.target_modules]
    return command


def read_record(directory: Path) -> dict[str, Any]:
    """A run's record, with its losses also in bits per byte: a token is a byte."""
    record: dict[str, Any] = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    for when in ("before", "after"):
        loss = record[f"held_out_{when}"]
        record[f"bits_per_byte_{when}"] = None if loss is None else loss / math.log(2)
    for name in ("training_curve", "held_out_curve"):
        record[name] = [(step, loss / math.log(2)) for step, loss in record[name]]
    return record


def write_texts(demo: Demo, directory: Path) -> dict[str, Path]:
    """Write the fine-tuning data: train.txt and held-out.txt."""
    texts = {}
    for name, text in zip(("train", "held-out"), corpora.pydoc_prose(demo.held_out), strict=True):
        texts[name] = directory / f"{name}.txt"
        _write(texts[name], text)
    return texts


def _write(path: Path, text: str) -> None:
    """`files.replace_text`, without torch, which this process does not import."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunError(f"{path.parent}: {error.strerror}") from None


def _adapt(demo: Demo, method: str, base: Path, texts: dict[str, Path], output: Path, *, first: bool) -> dict[str, Any]:
    # The base is the same for all: it is evaluated once.
    options = () if first else ("--eval_on_start", "false")
    command = finetune_command(demo, method, base, texts, output, lr=LEARNING_RATES[method], options=options)
    stages.in_process(stages.adapt, command)
    return read_record(output)


# --- the result --------------------------------------------------------------------------------------------------


_WIDTHS = (18, 11, 18, 8, 8, 10)


def _cells(first: str, *others: str) -> str:
    padded = (f"{text:>{width}}" for text, width in zip(others, _WIDTHS[1:], strict=True))
    return f"{first:<{_WIDTHS[0]}}{''.join(padded)}"


_HEADER = _cells("method", "trainable", "bits/byte before", "after", "s/step", "peak MiB")


def _row(method: str, record: dict[str, Any]) -> str:
    return _cells(
        NAMES[method],
        f"{record['trainable_parameters']:,}",
        f"{record['bits_per_byte_before']:.3f}",
        f"{record['bits_per_byte_after']:.3f}",
        f"{record['seconds_per_step'] or math.nan:.3f}",
        f"{record['peak_memory_mib']:.0f}",
    )


def closing(results: dict[str, Any]) -> str:
    """What stands below the table: each method beside LoRA, and whether the saved adapters are the trained ones."""
    runs: dict[str, dict[str, Any]] = results["runs"]
    lora = runs[REFERENCE]
    lines = ["", f"beside {NAMES[REFERENCE]}, with step times measured in turns:"]
    for method, record in runs.items():
        if method == REFERENCE:
            continue
        gain = lora["bits_per_byte_after"] - record["bits_per_byte_after"]
        result = (
            "the same loss" if abs(gain) < EQUAL else f"{abs(gain):.3f} bits/byte {'better' if gain > 0 else 'worse'}"
        )
        share = record["trainable_parameters"] / lora["trainable_parameters"]
        memory = record["peak_memory_mib"] - lora["peak_memory_mib"]
        lines.append(
            f"  {NAMES[method]}: {result}, {share:.2g} × the trainable parameters, {record['relative_time']:.2f} × the "
            f"time, {abs(memory):.0f} MiB {'more' if memory > 0 else 'less'}"
        )
    return "\n".join([*lines, "", *_notes(results)])


def report(results: dict[str, Any]) -> str:
    """The demo's table in Markdown, with the relative step times and the check of each reloaded adapter."""
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
    for method, record in results["runs"].items():
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
    time_note = (
        "time/step: relative to LoRA (peft), median over "
        f"{results['demo']['timing_rounds']} rounds in which the methods take turns."
    )
    return "\n".join([table(header, rows), "", time_note, *_notes(results)])


def _notes(results: dict[str, Any]) -> list[str]:
    runs = list(results["runs"].values())
    idle = statistics.median(record["idle_memory_mib"] for record in runs)
    memory = (
        f"peak resident memory of the process during training ({idle:.0f} MiB before training)"
        if runs[0]["device"] == "cpu"
        else "peak memory allocated by torch during training"
    )
    return [
        f"bits/byte: on held-out text. peak MiB: {memory}.",
        "saved adapters, reloaded in a new process: "
        + ("the logits agree, merged and not." if agrees(results) else "NOT ALL AGREE."),
        "which method leads depends on how many parameters are trained: docs/benchmarks.md, from few to many.",
        f"total: {results['seconds']:.0f} s, "
        + ("base model from the cache." if results["base_was_cached"] else "including pretraining of the base."),
    ]


def agrees(results: dict[str, Any]) -> bool:
    """Whether every reloaded adapter reproduces the logits of the trained one."""
    return all(record["reload"]["agree"] for record in results["runs"].values())
