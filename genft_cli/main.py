"""The `genft` command: options and help texts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from genft_cli.console import INTERRUPTED, UserError, is_first, one_line, quiet

_EXAMPLES = """\
examples:
  genft finetune                          the built-in demo: compares the methods, a few minutes on two cores
  genft finetune --model ./llama --dataset notes.txt --method wegeft --r 64
  genft finetune --model ./llama --dataset dialogues.jsonl --method lora --epochs 2 --save-every 100
  genft finetune --model ./llama --dataset dialogues.jsonl --method lora --epochs 2 --save-every 100 --resume
  genft merge runs/wegeft/adapter --output merged
  genft export-lora runs/wegeft/adapter --output lora
  genft inspect runs/wegeft/adapter --plot norms.png
  genft tune --model ./llama              find the fastest kernels for the model's shapes on this GPU
  genft doctor                            versions, devices, the plan for one shape, a numerical self-check
"""

_FINETUNE = """\
Fine-tune a model on a dataset and save the adapter. Without --model and --dataset, run the built-in demo: it pretrains
a small byte-level Llama on the source code of Python's standard library (cached), fine-tunes it on Python's
documentation with several methods, and prints a table.

data: .txt (one long text), .jsonl with "text" or with "prompt" and "completion" (loss on the completion only), or the
name of a dataset on the Hub with these columns (needs: pip install datasets).
"""

_MERGE = """\
Merge an adapter into its base model and save the result as a standard model directory, which does not need genft.

examples:
  genft merge runs/wegeft/adapter --output merged
  genft merge runs/wegeft/adapter --model ./llama --dtype float32 --output merged
"""

_EXPORT = """\
Convert an adapter to LoRA. The conversion is exact if ΔW has low rank, which holds for all methods except GenFT with a
nonlinear outer activation. Otherwise ΔW is truncated to --rank singular values, or as many as --max-error requires.

examples:
  genft export-lora runs/wegeft/adapter --output lora
  genft export-lora runs/genft-gelu/adapter --output lora --max-error 0.01
"""

_INSPECT = """\
Show method, settings, parameter counts and shared tensors of an adapter; with its base model, also the rank and norm of
each layer's ΔW.

examples:
  genft inspect runs/wegeft/adapter
  genft inspect runs/wegeft/adapter --model ./llama --plot norms.svg
"""

_TUNE = """\
Find the fastest kernels for a model's adapted layers on this GPU: every shape with every number of rows, forward and
backward. Plans that fail a check against float64 are discarded. The results are saved in ~/.cache/genft/plans
($GENFT_CACHE/plans if set); later runs use them in preference to the packaged table. Only the model's configuration is
read.

examples:
  genft tune --model ./llama
  genft tune --model ./llama --method lora --r 16 --target-modules q_proj v_proj --rows 2048,8192 --minutes 10
"""


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="genft",
        description="Parameter-efficient fine-tuning with weight updates generated from the pretrained weights.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    doctor = commands.add_parser(
        "doctor",
        help="print versions, devices, backend and a plan, and run a numerical self-check",
        description="Print versions, devices, the selected backend and the plan for one shape, then check the "
        "operations against float64. The exit code is 1 if the check fails.",
    )
    doctor.add_argument("--seconds", type=float, default=10.0, metavar="S", help="duration of the check (default: 10)")
    _add_finetune(commands)
    _add_adapter_commands(commands)
    _add_tune(commands)
    return parser


def _add_finetune(commands: Any) -> None:
    # Options that are not given are absent from the namespace; the defaults are in finetune.Job and recipes.
    sub = commands.add_parser(
        "finetune",
        help="fine-tune a model; without arguments, run the built-in demo",
        description=_FINETUNE,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    what = sub.add_argument_group("model and data")
    what.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a local model directory, or a model on the Hub")
    what.add_argument("--dataset", metavar="FILE_OR_HUB_ID", help=".txt, .jsonl, or a dataset on the Hub")
    what.add_argument("--dataset-split", metavar="NAME", help="split of a dataset on the Hub (default: train)")
    what.add_argument("--eval-dataset", metavar="FILE_OR_HUB_ID", help="held-out data (default: a part of --dataset)")
    what.add_argument("--eval-fraction", type=float, metavar="F", help="held-out share of --dataset (default: 0.05)")
    what.add_argument("--evaluations", type=int, metavar="N", help="number of evaluations during training (default: 4)")
    what.add_argument("--output", metavar="DIR", help="output directory (default: runs/METHOD; the demo: runs/demo)")
    what.add_argument("--byte-level", action="store_true", help="use bytes as tokens, for a model without a tokenizer")
    what.add_argument("--cache-dir", metavar="DIR", help="cache directory of the demo (default: ~/.cache/genft)")
    what.add_argument("--methods", nargs="+", metavar="NAME", help="methods of the demo (default: all)")

    how = sub.add_argument_group("method")
    how.add_argument(
        "--method",
        metavar="NAME",
        help="wegeft (default), gift, genft, genft-gelu, grft, sas, peanut, lora, peft-lora, full",
    )
    how.add_argument(
        "--r",
        "--rank",
        type=int,
        help="rank (default: 64 for wegeft and gift, else 16); genft and sas: half of it shared between layers; grft: "
        "number of rows or columns; under torchrun use --rank, because torchrun parses --r itself",
    )
    how.add_argument("--alpha", type=float, help="the update is scaled by alpha / r (default: twice the rank)")
    how.add_argument("--dropout", type=float, metavar="P", help="dropout probability of the method (default: 0)")
    how.add_argument("--target-modules", nargs="+", metavar="NAME", help="module names, or one regular expression")
    how.add_argument("--config", nargs="+", metavar="KEY=VALUE", help="other fields of the method's configuration")
    how.add_argument(
        "--backend", choices=("auto", "triton", "reference"), help="kernels of the genft methods (default: auto)"
    )
    how.add_argument(
        "--calibration-batches",
        type=int,
        metavar="N",
        help="number of batches for grft's gradient-based selection (default: 16)",
    )

    train = sub.add_argument_group("training")
    train.add_argument("--lr", type=float, help="peak learning rate, cosine decay (default: 2e-4; full: 2e-5)")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="number of optimizer steps")
    length.add_argument("--epochs", type=float, help="number of epochs (default: 1)")
    train.add_argument("--batch-size", type=int, metavar="N", help="sequences per batch and process (default: 8)")
    train.add_argument("--grad-accumulation", type=int, metavar="N", help="batches per optimizer step (default: 1)")
    train.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens per sequence (default: 512 or the model's limit)"
    )
    train.add_argument(
        "--warmup", type=float, metavar="N", help="warmup steps, or their share if below 1 (default: 0.05)"
    )
    train.add_argument("--seed", type=int, help="random seed for initialisation, data order and dropout (default: 0)")
    train.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16, float16 (auto: bfloat16 on a GPU)")
    train.add_argument("--device", metavar="NAME", help="auto, cuda, cpu")
    train.add_argument("--gradient-checkpointing", action="store_true", help="save memory at about a third more time")
    train.add_argument("--save-every", type=int, metavar="N", help="save a checkpoint every N steps (default: never)")
    train.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --output")
    train.add_argument("--overwrite", action="store_true", help="overwrite an existing run in --output")
    train.add_argument("--no-verify", dest="verify", action="store_false", help="skip the check of the saved adapter")


def _add_adapter_commands(commands: Any) -> None:
    def add(name: str, summary: str, description: str) -> Any:
        sub = commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        sub.add_argument("adapter", metavar="ADAPTER", help="adapter directory, with adapter_config.json and weights")
        sub.add_argument("--model", metavar="PATH_OR_HUB_ID", help="base model (default: from adapter_config.json)")
        sub.add_argument("--device", metavar="NAME", help="auto, cuda, cpu")
        return sub

    sub = add("merge", "merge an adapter into its base model", _MERGE)
    sub.add_argument("--output", metavar="DIR", required=True, help="new directory for the merged model")
    sub.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16, float16 (auto: as the base is stored)")
    sub = add("export-lora", "convert an adapter to LoRA, which does not need genft", _EXPORT)
    sub.add_argument("--output", metavar="DIR", required=True, help="new directory for the LoRA adapter")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--max-error", type=float, metavar="E", help="allowed ‖error‖/‖ΔW‖ for layers with full-rank ΔW")
    size.add_argument("--rank", type=int, metavar="R", help="LoRA rank for layers with full-rank ΔW")
    sub = add("inspect", "show an adapter's contents and the size of each layer's ΔW", _INSPECT)
    sub.add_argument("--plot", metavar="FILE", help="plot the norms to a .png, .svg or .pdf file")


def _add_tune(commands: Any) -> None:
    sub = commands.add_parser(
        "tune",
        help="find the fastest kernels for a model on this GPU",
        description=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    sub.add_argument(
        "--model", metavar="PATH_OR_HUB_ID", required=True, help="a local model directory, or a model on the Hub"
    )
    sub.add_argument("--method", metavar="NAME", help="method, as in genft finetune (default: wegeft)")
    sub.add_argument("--r", "--rank", type=int, help="rank, as in genft finetune")
    sub.add_argument("--target-modules", nargs="+", metavar="NAME", help="module names, or one regular expression")
    sub.add_argument("--rows", metavar="N,N,...", help="numbers of tokens per batch (default: 1,8,64,2048,8192)")
    sub.add_argument("--dtype", metavar="NAME", help="dtype of the model: bfloat16 (default), float16, float32")
    sub.add_argument("--minutes", type=float, metavar="T", help="time budget in minutes (default: 5)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 success, 1 a check failed, 2 user error, 130 interrupted."""
    try:
        return _main(arguments)
    except UserError as error:
        process = "" if is_first() else f"rank {os.environ['RANK']}: "
        print(f"genft: error: {process}{one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("genft: interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if options.pop("version"):
        from importlib.metadata import version

        print(f"genft {version('genft')}")
        return 0
    if command == "doctor":
        from genft_cli import doctor

        return doctor.run(options["seconds"])
    if command == "finetune":
        quiet()
        return _finetune(options) if options.keys() - {"output", "cache_dir", "methods"} else _demo(options)
    if command == "tune":
        quiet()
        return _tune(options)
    if command is not None:
        quiet()
        return _adapter(command, options)
    parser.print_help()
    return 0


def _demo(options: dict[str, Any]) -> int:
    from genft_cli import bases
    from genft_cli.demo import run as demo

    if bases.launched() > 1:
        raise UserError("torchrun: the demo runs in one process; use --model and --dataset")

    cache = Path(options.get("cache_dir") or demo.default_cache()).expanduser()
    methods = demo.check_methods(options.get("methods", demo.Demo.methods))
    results = demo.run(demo.Demo(methods=methods), Path(options.get("output", "runs/demo")).expanduser(), cache)
    print(demo.report(results))
    print(f"\nsaved: {options.get('output', 'runs/demo')} (results.json, table.md, loss.png, one folder per method)")
    return 0 if demo.agrees(results) else 1


def _finetune(options: dict[str, Any]) -> int:
    from genft_cli import finetune, recipes

    for name in ("model", "dataset"):
        if name not in options:
            raise UserError(f"--{name} is missing: use --model and --dataset, or neither for the demo")
    if "cache_dir" in options:
        raise UserError("--cache-dir: is for the demo only")
    if "methods" in options:
        raise UserError("--methods: is for the demo only; use --method")
    resume, overwrite = options.pop("resume", False), options.pop("overwrite", False)
    if resume and overwrite:
        raise UserError("--resume and --overwrite are mutually exclusive")
    try:
        options["config"] = dict(recipes.parse_field(text) for text in options.get("config", ()))
    except ValueError as error:
        raise UserError(f"--config {error}") from None
    if "target_modules" in options:
        options["target_modules"] = tuple(options["target_modules"])
    options.setdefault("output", f"runs/{options.get('method', 'wegeft')}")
    job = finetune.Job(**options)
    record = finetune.run(job, resume=resume, overwrite=overwrite)
    if not is_first():
        return 0
    print(finetune.summary(record, job.output))
    return 0 if record.get("reload", {"agree": True})["agree"] else 1


def _tune(options: dict[str, Any]) -> int:
    from genft_cli import tune

    if "rows" in options:
        try:
            options["rows"] = [int(word) for word in options["rows"].split(",")]
        except ValueError:
            raise UserError(f"--rows {options['rows']}: expected comma-separated integers") from None
    print(tune.run(**options))
    return 0


def _adapter(command: str, options: dict[str, Any]) -> int:
    from genft_cli import export, inspect, merge

    run: dict[str, Callable[..., str]] = {
        "merge": merge.merge,
        "export-lora": export.export,
        "inspect": inspect.inspect,
    }
    print(run[command](**options))
    return 0
