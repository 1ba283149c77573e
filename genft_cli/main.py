"""The `genft` command: options and help texts."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from genft_cli.console import INTERRUPTED, RunError, UserError, is_first, quiet, say, told

_EXAMPLES = """\
examples:
  genft demo                              compare the methods on a small model, in three minutes on two cores
  genft finetune --model ./llama --dataset notes.txt --method wegeft --r 64
  genft finetune --model ./llama --dataset dialogues.jsonl --num_train_epochs 2 --packing
  genft finetune --config run.yaml --resume
  genft classify --model ./roberta --dataset reviews.csv
  genft classify --config recipes/genft-vtab1k.yaml --dataset ./vtab-1k/cifar
  genft generate runs/wegeft --prompt "The colour of the cat is"
  genft generate runs/wegeft --dataset test.jsonl --output answers.jsonl
  genft score answers.jsonl --scorer gsm8k
  genft merge runs/wegeft --output merged
  genft export-lora runs/wegeft --output lora
  genft inspect runs/wegeft --plot norms.png
  genft tune --model ./llama              find the fastest kernels for the model's shapes on this GPU
  genft doctor                            versions, devices, the plan for one shape, a numerical self-check
"""

# The commands that train: one line for `genft --help`, and what `genft COMMAND --help` begins and ends with.
_TRAIN = {
    "finetune": (
        "fine-tune a model (TRL's SFTTrainer)",
        """\
Fine-tune a language model and save the adapter. Training is TRL's SFTTrainer: chat templates, packing, evaluation,
checkpoints, 4-bit base models, report_to and push_to_hub work as they do there.

data: .jsonl, .json, .csv, .parquet, a folder or a data set on the Hub, with "messages", "prompt" and "completion",
"instruction" and "output" (Alpaca) or "text"; or .txt, one long text. Without --eval_dataset and without a test split,
a part of the data is held out.
""",
        """\
examples:
  genft finetune --model ./llama --dataset dialogues.jsonl
  genft finetune --model ./llama --dataset notes.txt --method lora --r 16 --num_train_epochs 3 --learning_rate 1e-4
  genft finetune --model ./llama --dataset chat.jsonl --assistant_only_loss --packing --max_length 2048
  genft finetune --config run.yaml --output runs/second --per_device_train_batch_size 4
  genft finetune --config run.yaml --resume
  genft finetune --model ./llama --dataset notes.txt --learning_rates 1e-4 3e-4 1e-3
""",
    ),
    "dpo": (
        "train on preferences (TRL's DPOTrainer)",
        """\
Train on preferences with TRL's DPOTrainer and save the adapter. The reference model is the base model, with the adapter
disabled.

data: rows with "chosen" and "rejected", and "prompt" if these do not begin with it.
""",
        """\
examples:
  genft dpo --model ./llama --dataset preferences.jsonl --beta 0.1
""",
    ),
    "grpo": (
        "train on rewards (TRL's GRPOTrainer)",
        """\
Train on rewards with TRL's GRPOTrainer and save the adapter.

data: rows with "prompt", and any columns that the reward functions read.
""",
        """\
examples:
  genft grpo --model ./llama --dataset problems.jsonl --reward_funcs accuracy_reward
  genft grpo --model ./llama --dataset problems.jsonl --reward_funcs rewards.short_answers
""",
    ),
    "classify": (
        "classify texts or images (transformers' Trainer)",
        """\
Train a classifier of texts or images, or a regression on texts, with transformers' Trainer, and save the adapter with
the new head. The model decides between texts and images. The classes come from the data; labels with a decimal point
make a regression.

texts: .jsonl, .csv, .parquet, a folder or a data set on the Hub, with one or two columns of text and the labels.
images: a folder with one subfolder per class, or with such folders in train and test; .csv or .jsonl with paths and
labels; a .txt list of lines "path label", or a folder with train800val200.txt and test.txt, as in VTAB-1k; a folder
with train.json and test.json of the form {path: label}, as in FGVC; or a data set on the Hub.
""",
        """\
examples:
  genft classify --model ./roberta --dataset reviews.csv
  genft classify --model ./roberta --dataset ./glue/mrpc --glue mrpc --method genft
  genft classify --model ./vit --dataset ./flowers --crop --metrics accuracy mean_per_class_accuracy
  genft classify --config recipes/genft-vtab1k.yaml --model ./vit --dataset ./vtab-1k/cifar
""",
    ),
}

# One of these is needed.
_WITH_MODEL = {"--model", "--model_name_or_path", "--model-name-or-path", "--config", "--help-all"}

_DEMO = """\
Pretrain a small byte-level Llama on the source code of Python's standard library (cached), fine-tune it on Python's
documentation with several methods, and print a table, row by row.
"""

_GENERATE = """\
Generate text with the base model and with the adapter, side by side.

examples:
  genft generate runs/wegeft --prompt "The colour of the cat is"
  genft generate runs/wegeft --prompt "Who are you?" --chat --max-new-tokens 100
"""

_MERGE = """\
Merge an adapter into its base model and save the result as a standard model directory, which does not need genft.

examples:
  genft merge runs/wegeft --output merged
  genft merge runs/wegeft --model ./llama --dtype float32 --output merged
"""

_EXPORT = """\
Convert an adapter to LoRA. The conversion is exact if ΔW has low rank, which holds for all methods except GenFT with a
nonlinear outer activation. Otherwise ΔW is truncated to --rank singular values, or as many as --max-error requires.

examples:
  genft export-lora runs/wegeft --output lora
  genft export-lora runs/genft-gelu --output lora --max-error 0.01
"""

_INSPECT = """\
Show method, settings, parameter counts and shared tensors of an adapter; with its base model, also the rank and norm of
each layer's ΔW.

examples:
  genft inspect runs/wegeft
  genft inspect runs/wegeft --model ./llama --plot norms.svg
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


_SCORE = """\
Compare generated answers with references, print the accuracy and write it as JSON.

scorers:
  commonsense  the first of true/false, answer1 to answer5, ending1 to ending4, option1/option2 or solution1/solution2
               in the answer, as in LLM-Adapters; the reference decides which of these
  gsm8k        the number after "####", else the last number, without commas and units
  letter       the first of the letters A to E, as LLM-Adapters scores AQuA
  exact        the same text, apart from spaces at both ends

examples:
  genft score answers.jsonl --scorer gsm8k
  genft score answers.jsonl --scorer commonsense --by task
  genft score outputs.json --scorer exact --generated-column output_pred --reference-column label
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
    _add_demo(commands)
    _add_training(commands)
    _add_adapter_commands(commands)
    _add_score(commands)
    _add_tune(commands)
    doctor = commands.add_parser(
        "doctor",
        help="print versions, devices, backend and a plan, and run a numerical self-check",
        description="Print versions, devices, the selected backend and the plan for one shape, then check the "
        "operations against float64. The exit code is 1 if the check fails.",
    )
    doctor.add_argument("--seconds", type=float, default=10.0, metavar="S", help="duration of the check (default: 10)")
    return parser


def _add_training(commands: Any) -> None:
    for name, (summary, _, _) in _TRAIN.items():
        commands.add_parser(name, help=summary, add_help=False)


def _add_demo(commands: Any) -> None:
    from genft_cli.demo.run import Demo

    sub = commands.add_parser("demo", help="compare the methods on a small model, in three minutes", description=_DEMO)
    sub.add_argument("--output", metavar="DIR", default="runs/demo", help="directory of the results (%(default)s)")
    sub.add_argument("--cache-dir", metavar="DIR", help="directory of the pretrained model (default: ~/.cache/genft)")
    sub.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"methods to compare, or all (default: {' '.join(Demo.methods)})"
    )


def _add(commands: Any, name: str, summary: str, description: str) -> Any:
    """A command whose options are absent from the namespace unless they are given."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )


def _add_adapter_commands(commands: Any) -> None:
    def add(name: str, summary: str, description: str) -> Any:
        sub = _add(commands, name, summary, description)
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
    sub = add("generate", "generate text with the base model and with an adapter", _GENERATE)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    what.add_argument("--dataset", metavar="FILE", help="file with one prompt per row (.jsonl, .json, .csv, .parquet)")
    sub.add_argument("--output", metavar="FILE", help="the rows of --dataset with the answers, as .jsonl")
    sub.add_argument("--prompt-column", metavar="NAME", help="column of the prompts (default: prompt)")
    sub.add_argument("--batch-size", type=int, metavar="N", help="prompts per batch (default: 8)")
    sub.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="length of an answer (default: 64)")
    sub.add_argument("--temperature", type=float, metavar="T", help="sample with this temperature (default: greedy)")
    sub.add_argument("--seed", type=int, metavar="N", help="random seed of sampling (default: 0)")


def _add_score(commands: Any) -> None:
    sub = _add(commands, "score", "compare generated answers with references", _SCORE)
    sub.add_argument("answers", metavar="ANSWERS", help="file with one answer per row (.jsonl, .json, .csv)")
    sub.add_argument("--scorer", metavar="NAME", required=True, help="commonsense, gsm8k, letter, exact")
    sub.add_argument("--generated-column", metavar="NAME", help="column of the answers (default: generated)")
    sub.add_argument("--reference-column", metavar="NAME", help="column of the references (default: answer)")
    sub.add_argument("--by", metavar="COLUMN", help="also the accuracy for each value of this column, and their mean")
    sub.add_argument("--output", metavar="FILE", help="the result as JSON (default: ANSWERS with .score.json)")


def _add_tune(commands: Any) -> None:
    sub = _add(commands, "tune", "find the fastest kernels for a model on this GPU", _TUNE)
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
    """Run the command. Returns the exit code: 0 success, 1 a check failed or the run broke off, 2 user error, 130
    interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    process = "" if is_first() else f"rank {os.environ['RANK']}: "
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 # until the process ends
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a name of a file that is not UTF-8
    try:
        try:
            return _main(words)
        finally:
            sys.stdout.flush()  # here, not when Python ends
    except KeyboardInterrupt:
        print("genft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone
        _drop_output()
        return 1
    except Exception as error:
        if debug and not isinstance(error, (UserError, RunError)):
            raise
        _drop_output()
        print(f"genft: {process}{told(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _drop_output() -> None:
    """What is left in stdout's buffer goes nowhere if it cannot be written; Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(words: list[str]) -> int:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory is gone") from None
    if words and words[0] in _TRAIN:
        return _train(words[0], words[1:])
    options = vars(_parser().parse_args(words))
    command = options.pop("command")
    if options.pop("version"):
        from importlib.metadata import version

        print(f"genft {version('genft')}")
        return 0
    if command == "doctor":
        from genft_cli import doctor

        return doctor.run(options["seconds"])
    if command == "demo":
        return _demo(options)
    if command == "score":
        from genft_cli import scorers

        print(scorers.report(scorers.score(**options)))
        return 0
    if command == "tune":
        quiet()
        return _tune(options)
    if command is not None:
        quiet()
        return _adapter(command, options)
    _parser().print_help()
    return 0


def _train(command: str, words: list[str]) -> int:
    from genft_cli import arguments

    _, about, examples = _TRAIN[command]
    if {"-h", "--help"} & set(words):
        print(arguments.short_help(command, about, examples, arguments.kinds_of(command)))
        return 0
    if not {word.partition("=")[0] for word in words} & _WITH_MODEL:
        raise UserError("--model is missing: a local model directory, or a model on the Hub")
    if "trl" not in sys.modules:
        say("importing torch, transformers and TRL")
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"genft {command} needs TRL and datasets: pip install 'genft[train]' ({error})") from None
    quiet()
    if "--help-all" in words:
        rest = [word for word in words if word != "--help-all"]
        print(arguments.full_help(command, rest, arguments.EXTRA.get(command)))
        return 0
    from genft_cli import bases, classify, finetune, group, job

    bases.join()
    options = arguments.parse(command, words, arguments.EXTRA.get(command))
    if group.wanted(options):
        if command != "finetune":
            raise UserError(f"--runs and --learning_rates are options of genft finetune, not of genft {command}")
        record = group.run(options)
        print(group.summary(record, options.training.output_dir))
        return 0 if record["reload"]["agree"] else 1
    record = classify.run(options) if command == "classify" else finetune.run(options)
    if not is_first():
        return 0
    print(job.summary(record, options.training.output_dir))
    return 0 if record.get("reload", {}).get("agree", True) else 1


def _demo(options: dict[str, Any]) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun: the demo runs in one process; use genft finetune")
    from genft_cli.demo import run as demo

    cache = Path(options["cache_dir"] or demo.default_cache()).expanduser()
    methods = demo.check_methods(options["methods"] or demo.Demo.methods)
    results = demo.run(demo.Demo(methods=methods), Path(options["output"]).expanduser(), cache)
    print(demo.closing(results))
    print(f"\nsaved: {options['output']} (results.json, table.md, loss.png, one folder per method)")
    return 0 if demo.agrees(results) else 1


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
    from genft_cli import export, generate, inspect, merge

    if command == "generate":
        _check_generate(options)
    run: dict[str, Callable[..., str]] = {
        "merge": merge.merge,
        "export-lora": export.export,
        "inspect": inspect.inspect,
        "generate": generate.run_file if "dataset" in options else generate.run,
    }
    print(run[command](**options))
    return 0


def _check_generate(options: dict[str, Any]) -> None:
    """Refuse options of the other form of the command."""
    file = "dataset" in options
    for name in ("chat", "temperature", "seed") if file else ("output", "prompt_column", "batch_size"):
        if options.get(name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: is for {'--prompt' if file else '--dataset'} only")
