"""The command `genft`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from genft_modules.cli.console import INTERRUPTED, UserError, is_first, one_line, quiet

_EXAMPLES = """\
examples:
  genft finetune                          the embedded demo: methods side by side, some minutes on two cores
  genft finetune --model ./llama --dataset notes.txt --method wegeft --r 64
  genft finetune --model ./llama --dataset dialogues.jsonl --method lora --epochs 2 --save-every 100
  genft finetune --model ./llama --dataset dialogues.jsonl --method lora --epochs 2 --save-every 100 --resume
  genft merge runs/wegeft/adapter --output merged
  genft export-lora runs/wegeft/adapter --output lora
  genft inspect runs/wegeft/adapter --plot norms.png
  genft tune --model ./llama              the fastest kernels for the model's shapes on this GPU, for all later runs
  genft doctor                            versions, device, the plan for one shape, a numerical self-check
"""

_FINETUNE = """\
Without --model and --dataset: the embedded demo. It pre-trains a small byte-level Llama on the source code of Python's
standard library (kept in a cache), adapts it to the prose of Python's documentation with several methods, and prints a
table. With both: the same job for your model and your data.

data: .txt (one long text), .jsonl with "text", or with "prompt" and "completion" (only the completion is learned),
or the name of a data set on the hub (needs: pip install datasets) with these columns.
"""

_MERGE = """\
The base model with the adapter's ΔW added to its weights, as a model directory like any other: no adapter, no genft.

examples:
  genft merge runs/wegeft/adapter --output merged
  genft merge runs/wegeft/adapter --model ./llama --dtype float32 --output merged
"""

_EXPORT = """\
The adapter as plain LoRA, for programs that know no other: exactly where ΔW has low rank, which is everywhere but in
GenFT with a non-linear outer activation, else cut off after --rank singular values, or as many as --max-error needs.

examples:
  genft export-lora runs/wegeft/adapter --output lora
  genft export-lora runs/genft-gelu/adapter --output lora --max-error 0.01
"""

_INSPECT = """\
Method, settings, counts and shared tensors of an adapter; with its base model, rank and norm of each layer's ΔW.

examples:
  genft inspect runs/wegeft/adapter
  genft inspect runs/wegeft/adapter --model ./llama --plot norms.svg
"""

_TUNE = """\
Measures how the layers of a model run fastest on this GPU with the method's adapter in them: every shape with every
number of rows, forward and backward. What is not right by a check against float64 is not taken. The plans go to a table
in ~/.cache/genft/plans ($GENFT_CACHE/plans where that is set), which every later run reads before the packaged one. Of
the model, only the configuration is read.

examples:
  genft tune --model ./llama
  genft tune --model ./llama --method lora --r 16 --target-modules q_proj v_proj --rows 2048,8192 --minutes 10
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="genft",
        description="Fine-tuning that generates the weight update from the pretrained weight.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    doctor = commands.add_parser(
        "doctor",
        help="versions, device, backend, the plan for one shape, and a numerical self-check",
        description="Print versions, devices, the backend in force and the plan for one shape, then compare the "
        "operations with float64 for some seconds. Exit code 1 if they disagree.",
    )
    doctor.add_argument("--seconds", type=float, default=10.0, metavar="S", help="how long to check (10)")
    _add_finetune(commands)
    _add_adapter_commands(commands)
    _add_tune(commands)
    return parser


def _add_finetune(commands: Any) -> None:
    # Options that are not given stay out of the namespace: the defaults live in finetune.Job and in recipes.
    sub = commands.add_parser(
        "finetune",
        help="fine-tune a model; without arguments, the embedded demo",
        description=_FINETUNE,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    what = sub.add_argument_group("what")
    what.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a local model directory, or its name on the hub")
    what.add_argument("--dataset", metavar="FILE_OR_HUB_ID", help=".txt, .jsonl, or a data set on the hub")
    what.add_argument("--dataset-split", metavar="NAME", help="which split of a data set on the hub (train)")
    what.add_argument("--eval-dataset", metavar="FILE_OR_HUB_ID", help="held-out data; else a part of --dataset")
    what.add_argument("--eval-fraction", type=float, metavar="F", help="share of --dataset that is held out (0.05)")
    what.add_argument("--evaluations", type=int, metavar="N", help="held-out measurements during training (4)")
    what.add_argument("--output", metavar="DIR", help="where everything goes (runs/METHOD; the demo: runs/demo)")
    what.add_argument("--byte-level", action="store_true", help="read text as bytes; for a model without tokenizer")
    what.add_argument("--cache-dir", metavar="DIR", help="the demo's cache (~/.cache/genft)")
    what.add_argument("--methods", nargs="+", metavar="NAME", help="the demo's rows (all)")

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
        help="rank (wegeft and gift 64, the others 16; genft and sas: half shared; grft: rows or columns); --rank "
        "behind torchrun, which takes --r as its own",
    )
    how.add_argument("--alpha", type=float, help="scale: the update is multiplied by alpha / r (twice the rank)")
    how.add_argument("--dropout", type=float, metavar="P", help="the method's own dropout (0)")
    how.add_argument("--target-modules", nargs="+", metavar="NAME", help="names of layers, or one regular expression")
    how.add_argument("--config", nargs="+", metavar="KEY=VALUE", help="further fields of the method's configuration")
    how.add_argument("--backend", choices=("auto", "triton", "reference"), help="kernels of the genft methods (auto)")
    how.add_argument(
        "--calibration-batches", type=int, metavar="N", help="batches whose gradients choose what grft trains (16)"
    )

    train = sub.add_argument_group("training")
    train.add_argument("--lr", type=float, help="peak learning rate, then cosine (2e-4; full 2e-5)")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--epochs", type=float, help="passes over the data (1)")
    train.add_argument("--batch-size", type=int, metavar="N", help="windows per batch (8)")
    train.add_argument("--grad-accumulation", type=int, metavar="N", help="batches per step (1)")
    train.add_argument("--seq-len", type=int, metavar="N", help="tokens per window (512, or what the model allows)")
    train.add_argument("--warmup", type=float, metavar="N", help="warm-up steps, or below 1 their share (0.05)")
    train.add_argument("--seed", type=int, help="of initialisation, order and dropout (0)")
    train.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16, float16 (auto: bfloat16 on a GPU)")
    train.add_argument("--device", metavar="NAME", help="auto, cuda, cpu")
    train.add_argument("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    train.add_argument("--save-every", type=int, metavar="N", help="checkpoint every N steps (never)")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    train.add_argument("--overwrite", action="store_true", help="replace an earlier run in --output")
    train.add_argument("--no-verify", dest="verify", action="store_false", help="do not reload what was saved")


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
        sub.add_argument("adapter", metavar="ADAPTER", help="directory with adapter_config.json and its weights")
        sub.add_argument("--model", metavar="PATH_OR_HUB_ID", help="the base model (where the adapter says it was)")
        sub.add_argument("--device", metavar="NAME", help="auto, cuda, cpu")
        return sub

    sub = add("merge", "write the base model with an adapter merged into it", _MERGE)
    sub.add_argument("--output", metavar="DIR", required=True, help="a new directory for the merged model")
    sub.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16, float16 (auto: as the base is stored)")
    sub = add("export-lora", "write an adapter as plain LoRA, which needs no genft", _EXPORT)
    sub.add_argument("--output", metavar="DIR", required=True, help="a new directory for the LoRA adapter")
    size = sub.add_mutually_exclusive_group()
    size.add_argument("--max-error", type=float, metavar="E", help="allowed ‖error‖/‖ΔW‖ of layers of full rank")
    size.add_argument("--rank", type=int, metavar="R", help="rank for layers of full rank")
    sub = add("inspect", "what is in an adapter, and how much it changes each layer", _INSPECT)
    sub.add_argument("--plot", metavar="FILE", help="draw the norms; .png, .svg, .pdf")


def _add_tune(commands: Any) -> None:
    sub = commands.add_parser(
        "tune",
        help="measure the fastest kernels for a model on this GPU",
        description=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    sub.add_argument("--model", metavar="PATH_OR_HUB_ID", required=True, help="a local model directory, or its name")
    sub.add_argument("--method", metavar="NAME", help="whose operations to measure, as in genft finetune (wegeft)")
    sub.add_argument("--r", "--rank", type=int, help="its rank (as in genft finetune)")
    sub.add_argument("--target-modules", nargs="+", metavar="NAME", help="names of layers, or one regular expression")
    sub.add_argument("--rows", metavar="N,N,...", help="tokens in a batch (1,8,64,2048,8192)")
    sub.add_argument("--dtype", metavar="NAME", help="of the model: bfloat16 (default), float16, float32")
    sub.add_argument("--minutes", type=float, metavar="T", help="how long to measure (5)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0 done, 1 a check failed, 2 a mistake of the user's, 130 interrupted."""
    try:
        return _main(arguments)
    except UserError as error:
        process = "" if is_first() else f"process {os.environ['RANK']}: "
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
        from genft_modules.cli import doctor

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
    from genft_modules.cli import bases
    from genft_modules.cli.demo import run as demo

    if bases.launched() > 1:
        raise UserError("torchrun: the demo is for one process; give --model and --dataset")

    cache = Path(options.get("cache_dir") or demo.default_cache()).expanduser()
    methods = demo.check_methods(options.get("methods", demo.Demo.methods))
    results = demo.run(demo.Demo(methods=methods), Path(options.get("output", "runs/demo")).expanduser(), cache)
    print(demo.report(results))
    print(f"\nsaved: {options.get('output', 'runs/demo')} (results.json, table.md, loss.png, one folder per method)")
    return 0 if demo.agrees(results) else 1


def _finetune(options: dict[str, Any]) -> int:
    from genft_modules.cli import finetune, recipes

    for name in ("model", "dataset"):
        if name not in options:
            raise UserError(f"--{name} is missing: give --model and --dataset, or neither for the demo")
    if "cache_dir" in options:
        raise UserError("--cache-dir: only the demo has a cache")
    if "methods" in options:
        raise UserError("--methods: only the demo has rows; one run has one --method")
    resume, overwrite = options.pop("resume", False), options.pop("overwrite", False)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
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
    from genft_modules.cli import tune

    if "rows" in options:
        try:
            options["rows"] = [int(word) for word in options["rows"].split(",")]
        except ValueError:
            raise UserError(f"--rows {options['rows']}: expected numbers with commas between them") from None
    print(tune.run(**options))
    return 0


def _adapter(command: str, options: dict[str, Any]) -> int:
    from genft_modules.cli import export, inspect, merge

    run: dict[str, Callable[..., str]] = {
        "merge": merge.merge,
        "export-lora": export.export,
        "inspect": inspect.inspect,
    }
    print(run[command](**options))
    return 0
