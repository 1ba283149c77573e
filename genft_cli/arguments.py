"""The options of the commands that train: fields of TRL's and transformers' dataclasses, of our own, and of the method.

Importing this module imports neither torch nor TRL; `parse` does.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from genft_cli import methods
from genft_cli.console import UserError, one_line
from genft_cli.metrics import GLUE

# The commands, and the dataclass and the trainer of each.
COMMANDS = {
    "finetune": ("trl", "SFTConfig", "SFTTrainer"),
    "dpo": ("trl", "DPOConfig", "DPOTrainer"),
    "grpo": ("trl", "GRPOConfig", "GRPOTrainer"),
    "classify": ("transformers", "TrainingArguments", "Trainer"),
}
# The other commands have these names, too.
SHORT = {"--model": "--model_name_or_path", "--dataset": "--dataset_name", "--output": "--output_dir"}


@dataclass
class MethodArguments:
    """The method and what all methods have in common."""

    method: str = field(default="wegeft", metadata={"help": f"{', '.join(methods.names())}"})
    r: int | None = field(
        default=None,
        metadata={
            "aliases": ["--rank"],
            "help": "rank (default: 64 for wegeft and gift, else 16); genft and sas: half of it shared between layers; "
            "grft: number of rows or columns; under torchrun use --rank, because torchrun parses --r itself",
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "the update is scaled by alpha / r (default: twice the rank)"}
    )
    dropout: float | None = field(default=None, metadata={"help": "dropout probability of the method (default: 0)"})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "module names, or one regular expression"}
    )
    backend: str = field(
        default="auto",
        metadata={"help": "kernels of the genft methods", "choices": ["auto", "triton", "reference"]},
    )
    calibration_batches: int = field(
        default=16, metadata={"help": "number of batches for grft's gradient-based selection"}
    )


@dataclass
class RunArguments:
    """What surrounds the training: held-out data, the run's directory, the checks."""

    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "held-out data: a file, a folder or a dataset on the Hub (default: the test split of --dataset, or "
            "a part of it)"
        },
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "held-out share of --dataset if it has no test split"})
    resume: bool = field(default=False, metadata={"help": "resume from the newest whole checkpoint in --output"})
    overwrite: bool = field(default=False, metadata={"help": "replace the run in --output"})
    checkpoint_minutes: float = field(
        default=10.0, metadata={"help": "save a checkpoint at least this often, beside --save_steps; 0: never"}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "train an adapter with each of these, all in the same batches (finetune)"}
    )
    runs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "several adapters in the same batches (finetune), in a --config file: names of the adapters, each "
            "with the options in which it differs"
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations without a better held-out loss"}
    )
    verify: bool = field(
        default=True, metadata={"help": "reload the saved adapter in a new process and compare the logits"}
    )


@dataclass
class ClassifyArguments:
    """The data of a classification or regression."""

    glue: str | None = field(default=None, metadata={"help": f"columns, metrics and split of {', '.join(GLUE)}"})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "one or two columns of text (default: those of GLUE's tasks, or text)"}
    )
    label_column: str = field(default="label", metadata={"help": "column of the labels"})
    image_column: str = field(default="path", metadata={"help": "column of the paths of images"})
    image_root: str | None = field(
        default=None, metadata={"help": "folder where the paths of images begin (default: that of the file)"}
    )
    crop: bool = field(
        default=False,
        metadata={"help": "crop images, at random and mirrored in training; without it, they are resized as a whole"},
    )
    max_text_length: int | None = field(
        default=None, metadata={"help": "tokens per text or pair (default: 512 or the model's limit)"}
    )
    metrics: list[str] | None = field(
        default=None,
        metadata={
            "help": "accuracy, f1, matthews_correlation, mean_per_class_accuracy (default: accuracy); for a regression "
            "pearson, spearman (default: both)"
        },
    )


OURS = (MethodArguments, RunArguments)
EXTRA = {"classify": ClassifyArguments}  # the options of one command only


def kinds_of(command: str) -> tuple[type, ...]:
    """The dataclasses with our own options for the command."""
    extra = EXTRA.get(command)
    return OURS if extra is None else (*OURS, extra)


@dataclass
class Options:
    """All options of a run."""

    command: str
    training: Any  # SFTConfig, DPOConfig, GRPOConfig or TrainingArguments
    model: Any  # trl.ModelConfig; its use_peft and lora_* are not used
    script: Any  # trl.ScriptArguments
    mixture: Any  # trl.DatasetMixtureConfig
    method: MethodArguments
    run: RunArguments
    fields: dict[str, Any]  # of the method's configuration, as given
    extra: Any  # the command's own dataclass, or None
    given: dict[str, Any]  # what the user set, by name: everything else has its default


# --- parsing -----------------------------------------------------------------------------------------------------


def parse(command: str, arguments: Sequence[str], extra: type | None = None) -> Options:
    """Parse the options of a training command: `--config run.yaml`, overridden by the command line.

    Args:
        extra: another dataclass whose fields are options.

    Raises:
        UserError: an option is unknown, or its value does not fit.
    """
    words = _normal(arguments)
    config, words = _config(words)
    return parsed(command, config, words, extra)


def parsed(command: str, config: Mapping[str, Any], words: Sequence[str] = (), extra: type | None = None) -> Options:
    """The options of `config`, overridden by the words of a command line. Raises UserError as `parse` does."""
    import trl

    method = _method(words, config)
    kinds = _kinds(command, method, extra)
    parser = _Parser(list(kinds.values()), prog=f"genft {command}", allow_abbrev=False, add_help=False)
    parser.set_defaults_with_config(**_defaults(command, method))
    if unknown := [name for name in config if name not in _names(parser)]:
        raise UserError(f"--config: unknown {unknown[0]}{_close(unknown[0], _names(parser))}")
    parser.set_defaults_with_config(**copy.deepcopy(dict(config)))  # TRL changes nested values in place
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(one_line(error)) from None
    if rest:
        name = rest[0].partition("=")[0]
        raise UserError(f"unknown option {name}{_close(name, [f'--{known}' for known in _names(parser)])}")
    found = dict(zip(kinds, parsed, strict=True))
    given = {
        **config,
        **{name: _stored(getattr(_holder(found.values(), name), name)) for name in _named(parser, words)},
    }
    fields = {
        f.name: _plain(getattr(found["fields"], f.name)) for f in dataclasses.fields(found["fields"]) if f.name in given
    }
    model = {f.name: getattr(found["model"], f.name) for f in dataclasses.fields(found["model"])}
    return Options(
        command=command,
        training=found["training"],
        model=trl.ModelConfig(**model),
        script=found["script"],
        mixture=found["mixture"],
        method=found["method"],
        run=found["run"],
        fields=fields,
        extra=found.get("extra"),
        given=given,
    )


def _parser_class() -> type:
    from trl import TrlParser

    class Parser(TrlParser):
        """Raises UserError instead of printing the usage."""

        def error(self, message: str) -> NoReturn:
            raise UserError(message.removeprefix("argument "))

    return Parser


def _Parser(kinds: list[Any], **options: Any) -> Any:
    return _parser_class()(kinds, **options)


def _kinds(command: str, method: str, extra: type | None) -> dict[str, Any]:
    """The dataclasses whose fields are the options, by the name of their place in `Options`."""

    import trl

    if command == "classify":
        from transformers import TrainingArguments as training
    else:
        training = getattr(trl, COMMANDS[command][1])
    script: Any = trl.ScriptArguments
    if command == "grpo":
        from trl.scripts.grpo import GRPOScriptArguments

        script = GRPOScriptArguments
    kinds: dict[str, Any] = {
        "training": training,
        "model": _without(trl.ModelConfig, ("use_peft", "use_rslora", "use_dora", "lora_")),
        "script": script,
        "mixture": trl.DatasetMixtureConfig,
        "method": MethodArguments,
        "run": RunArguments,
    }
    if extra is not None:
        kinds["extra"] = extra
    taken = {f.name for kind in kinds.values() for f in dataclasses.fields(kind)}
    kinds["fields"] = dataclasses.make_dataclass(
        "MethodFields",
        [
            (name, str | None, field(default=None, metadata={"help": text}))
            for name, text in methods.fields(method, taken)
        ],
    )
    return kinds


def _without(kind: Any, prefixes: tuple[str, ...]) -> Any:
    """The dataclass without the fields whose names begin with one of these."""
    return dataclasses.make_dataclass(
        kind.__name__,
        [
            (f.name, f.type, field(default=f.default, metadata=f.metadata))
            if f.default_factory is dataclasses.MISSING
            else (f.name, f.type, field(default_factory=f.default_factory, metadata=f.metadata))
            for f in dataclasses.fields(kind)
            if not f.name.startswith(prefixes)
        ],
    )


def _defaults(command: str, method: str) -> dict[str, Any]:
    """Where ours differ from TRL's and transformers'. The learning rate follows later: it depends on the model."""
    import torch

    gpu = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    defaults: dict[str, Any] = {
        "output_dir": f"runs/{method}",
        "dtype": "auto" if gpu and method != "full" else "float32",
        "eval_strategy": "steps",
        "eval_steps": 0.25,
        "eval_on_start": True,
        "save_total_limit": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "logging_nan_inf_filter": False,
        "report_to": "none",
    }
    if not gpu:
        defaults |= {"bf16": False, "use_cpu": True}  # without use_cpu, several processes would all train on all data
    return defaults


def _normal(arguments: Sequence[str]) -> list[str]:
    words = []
    for word in arguments:
        name, equals, value = word.partition("=")
        words.append(f"{SHORT.get(name, name)}{equals}{value}" if word.startswith("--") else word)
    return words


def _take(words: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """(the last value of the option, the other words)."""
    value, rest, position = None, [], 0
    while position < len(words):
        word = words[position]
        if word == name:
            if position + 1 == len(words):
                raise UserError(f"{name}: expected one argument")
            value, position = words[position + 1], position + 1
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
        position += 1
    return value, rest


def _config(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(the values of the file named by --config, the other words)."""
    import os

    import yaml

    name, rest = _take(words, "--config")
    if name is None:
        return {}, rest
    try:
        values = yaml.safe_load(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {name}: {error.strerror or one_line(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {name}: not YAML ({one_line(error)})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"--config {name}: expected lines of the form name: value")
    environment = values.pop("env", {})  # as in TRL
    if not isinstance(environment, dict):
        raise UserError(f"--config {name}: env must be a mapping")
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    return {field_of(key): methods.number(value) for key, value in values.items()}, rest


def field_of(key: str) -> str:
    """The field that a key of a YAML file stands for: dataset is dataset_name."""
    return SHORT.get(f"--{key}", f"--{key}")[2:].replace("-", "_")


def _method(words: Sequence[str], config: Mapping[str, Any]) -> str:
    method = _take(words, "--method")[0] or config.get("method", MethodArguments.method)
    if method not in methods.names():
        raise UserError(f"--method {method}: unknown; choose from {', '.join(methods.names())}")
    return str(method)


def _names(parser: argparse.ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions]


def _named(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The options that stand on the command line."""
    used = {word.partition("=")[0] for word in words}
    return [action.dest for action in parser._actions if used & set(action.option_strings)]


def _holder(found: Iterable[Any], name: str) -> Any:
    return next(one for one in found if hasattr(one, name))


def _stored(value: Any) -> Any:
    """What a YAML file holds of it."""
    return value.value if isinstance(value, Enum) else value


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _plain(value: Any) -> Any:
    """A value from the command line, read as in a YAML file: numbers, true and false, [lists], {mappings}, text."""
    import yaml

    if not isinstance(value, str):
        return value
    try:
        return methods.number(yaml.safe_load(value))
    except yaml.YAMLError:
        return value


# --- help --------------------------------------------------------------------------------------------------------


def short_help(command: str, summary: str, examples: str, kinds: Sequence[Any] = OURS) -> str:
    """Our own options, and where to find TRL's."""
    lines = [f"usage: genft {command} [--config FILE.yaml] [--OPTION VALUE ...]", "", summary.strip(), ""]
    lines += ["  --config FILE           read options from a YAML file; the command line overrides them"]
    lines += ["  --model PATH_OR_HUB_ID  the base model (--model_name_or_path)"]
    lines += ["  --dataset PATH_OR_ID    a file, a folder or a dataset on the Hub (--dataset_name)"]
    lines += ["  --output DIR            the run's directory (--output_dir; default: runs/METHOD)"]
    for kind in kinds:
        for f in dataclasses.fields(kind):
            default = " ".join(f.default_factory()) if callable(f.default_factory) else f.default
            choices = f": {', '.join(f.metadata['choices'])}" if "choices" in f.metadata else ""
            text = f.metadata["help"] + choices + ("" if default in (None, False) else f" (default: {default})")
            name = f"--no_{f.name}" if default is True else f"--{f.name}"
            text = f"do not {f.metadata['help']}" if default is True else text
            first, *more = textwrap.wrap(text, 72)
            lines += [f"  {name:<23} {first}" if len(name) < 24 else f"  {name}\n{'':26}{first}"]
            lines += [f"{'':26}{line}" for line in more]
    package, config, _ = COMMANDS[command]
    lines += [
        "",
        f"Every field of {package}.{config} and of the method's configuration is an option, too; all of them:",
    ]
    lines += [f"  genft {command} --help-all [--method NAME]", "", examples.strip()]
    return "\n".join(lines)


def full_help(command: str, arguments: Sequence[str], extra: type | None = None) -> str:
    """All options, with the defaults of this command."""
    method = _method(list(arguments), {})
    parser = _Parser(list(_kinds(command, method, extra).values()), prog=f"genft {command}", allow_abbrev=False)
    parser.set_defaults_with_config(**_defaults(command, method))
    return str(parser.format_help())
