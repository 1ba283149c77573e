"""`genft finetune` with several adapters: all of them in the same batches, each with options of its own."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from genft_cli import finetune, job, methods, runs
from genft_cli.arguments import Options, field_of, parsed
from genft_cli.bases import launched
from genft_cli.console import UserError, one_line, say, table
from genft_modules.disk.adapters import save_adapter
from genft_modules.files import added_files
from genft_modules.training.runs import AdapterRun

_OF_A_RUN = tuple(field.name for field in dataclasses.fields(AdapterRun))[2:]  # without its data
# In what adapters may differ, beside the fields of the method.
OWN = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset", "eval_fraction",
    "r", "alpha", "dropout", "target_modules", "calibration_batches", *_OF_A_RUN,
}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9_-]+")


def wanted(options: Options) -> bool:
    """Whether the options are of several adapters."""
    return options.run.runs is not None or options.run.learning_rates is not None


def run(options: Options) -> dict[str, Any]:
    """Train as the options say: OUTPUT/NAME gets each adapter and its record, OUTPUT the log, checkpoints and the
    records of all. Returns these.

    Raises:
        UserError: an option, the model or the data does not fit; nothing was written.
    """
    split = several(options)
    _check_group(options)
    jobs: dict[str, job.Job] = {}
    tokenizer: Any = None
    for name, own in split.items():
        try:
            jobs[name], tokenizer = finetune.check(own)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    where = runs.directory(
        options.training.output_dir, options.given, resume=options.run.resume, overwrite=options.run.overwrite
    )
    with where as (directory, resume_from):
        prepared = _prepared(jobs, tokenizer)
        if resume_from is None:
            for name, one in prepared.items():
                job.select(jobs[name], one, name)
        trainer = _trainer(jobs, prepared, tokenizer)
        first = next(iter(jobs.values()))
        say(
            f"{first.options.method.method}: training {len(jobs)} adapters of "
            f"{sum(one.trainable for one in jobs.values()):,} parameters in the same batches"
        )

        def save(place: Path) -> None:
            for name in jobs:
                save_adapter(trainer.model, place / name, name)
                with added_files(place / name) as partial:
                    tokenizer.save_pretrained(str(partial))

        facts = job.fit(first, trainer, directory, resume_from, save)
        return _recorded(jobs, trainer, prepared, tokenizer, directory, facts)


def several(options: Options) -> dict[str, Options]:
    """The options of each adapter by its name. Raises UserError."""
    runs_of, rates = options.run.runs, options.run.learning_rates
    if isinstance(runs_of, str):
        try:
            runs_of = json.loads(runs_of)
        except ValueError as error:
            raise UserError(f"--runs: not JSON ({one_line(error)})") from None
    if runs_of is not None and (not isinstance(runs_of, Mapping) or not runs_of):
        raise UserError("--runs: expected names of adapters, each with its options (name: value)")
    found: dict[str, dict[str, Any]] = {}
    for name, own in (runs_of or {"": None}).items():
        if not isinstance(name, str) or (runs_of and not NAME.fullmatch(name)):
            raise UserError(f"--runs: {name}: expected a name of letters, digits, - and _")
        if not isinstance(own, (Mapping, type(None))):
            raise UserError(f"--runs: {name}: expected options (name: value)")
        values = {field_of(str(key)): methods.number(value) for key, value in (own or {}).items()}
        if rates is None:
            found[name] = values
            continue
        if "learning_rate" in values:
            raise UserError(f"--runs: {name}: has a learning_rate beside --learning_rates")
        for rate in rates:
            found["-".join(filter(None, (name, f"lr{_short(rate)}")))] = {**values, "learning_rate": rate}
    if rates is not None and len(found) < len(rates) * len(runs_of or [""]):
        raise UserError("--learning_rates: expected different ones")
    common = {key: value for key, value in options.given.items() if key not in ("runs", "learning_rates")}
    fields = {key for key, _ in methods.fields(options.method.method, ())} - {"task_type", "target_parameters"}
    split = {}
    for name, values in found.items():
        for key in values:
            if key not in OWN | fields:
                raise UserError(f"--runs: {name}: {key} is the same for all; what may differ: {', '.join(sorted(OWN))}")
        try:
            split[name] = parsed(options.command, {**common, **values})
        except UserError as error:
            raise UserError(f"--runs: {name}: {error}") from None
    return split


def _short(rate: float) -> str:
    """Without a point, which names of modules must not have: 0.00025 is 25e-5."""
    _, digits, exponent = Decimal(str(rate)).normalize().as_tuple()
    return f"{''.join(map(str, digits))}e{exponent}"


def _check_group(options: Options) -> None:
    training, method = options.training, options.method.method
    if method in ("full", "peft-lora"):
        raise UserError(f"--method {method}: cannot train several adapters in the same batches; lora can")
    if launched() > 1:
        raise UserError("torchrun: several adapters train in one process; give each process its own")
    refused = {
        "packing": training.packing and training.packing_strategy != "wrapped",
        "padding_free": training.padding_free,
        "chat_template_path": training.chat_template_path is not None,
        "push_to_hub": training.push_to_hub,
        "early_stopping_patience": options.run.early_stopping_patience is not None,
        "dataset_streaming": options.script.dataset_streaming,
    }
    if chosen := [name for name, value in refused.items() if value]:
        raise UserError(f"--{chosen[0]}: not with several adapters")


def _config_of(one: job.Job) -> Any:
    """The method's configuration; of stock LoRA the same as ours, which trains in mixed batches."""
    from peft import LoraConfig

    from genft_modules import LoRAConfig

    config = one.peft_config
    if not isinstance(config, LoraConfig):
        return config
    known = {field.name for field in dataclasses.fields(LoRAConfig)}
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and field.name != "peft_type" and value != getattr(plain, field.name):
            raise UserError(f"--{field.name}: not with several adapters")
    kept = {name: getattr(config, name) for name in known & {field.name for field in dataclasses.fields(config)}}
    return LoRAConfig(**{name: value for name, value in kept.items() if name not in ("peft_type", "auto_mapping")})


def _prepared(jobs: Mapping[str, job.Job], tokenizer: Any) -> dict[str, Any]:
    """A trainer of TRL for each adapter, all with the same model: they prepare the data."""
    import transformers
    import trl
    from peft import get_peft_model, prepare_model_for_kbit_training

    base = job.load(next(iter(jobs.values())))
    if getattr(base, "is_quantized", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model: Any = None
    prepared = {}
    try:
        for name, one in jobs.items():
            transformers.set_seed(one.options.training.seed)  # of the initial parameters, as in TRL
            if model is None:
                model = get_peft_model(base, _config_of(one), adapter_name=name)
            else:
                model.add_adapter(name, _config_of(one))
        say("preparing the data")
        for name, one in jobs.items():
            prepared[name] = trl.SFTTrainer(
                model, one.options.training, train_dataset=one.train, eval_dataset=one.held_out,
                processing_class=tokenizer,
            )  # fmt: skip
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(one_line(error)) from None
    return prepared


def _trainer(jobs: Mapping[str, job.Job], prepared: Mapping[str, Any], tokenizer: Any) -> Any:
    from genft_modules import AdapterGroupTrainer

    one = next(iter(prepared.values()))
    one.args.remove_unused_columns = False  # TRL's collator takes what it needs
    adapters = {}
    for name, each in prepared.items():
        given = {field: getattr(each.args, field) for field in _OF_A_RUN}
        given["max_steps"] = given["max_steps"] if given["max_steps"] > 0 else None
        given["lr_scheduler_kwargs"] = given["lr_scheduler_kwargs"] or None
        adapters[name] = AdapterRun(each.train_dataset, each.eval_dataset, **given)
    try:
        return job.trainer_class(AdapterGroupTrainer)(
            one.model, one.args, adapters, one.data_collator, processing_class=tokenizer
        )
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from None


def _recorded(
    jobs: Mapping[str, job.Job],
    trainer: Any,
    prepared: Mapping[str, Any],
    tokenizer: Any,
    directory: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The records, of each adapter in its folder and of all, with the result of reloading them in a new process."""
    from genft_cli import plotting, verify

    records = {}
    for name, one in jobs.items():
        stopped = name in trainer.stopped
        last = [row["step"] for row in trainer.state.log_history if f"{name}/loss" in row]
        own = {"adapter_name": name, "stopped": stopped, "steps": max(last, default=0)}
        records[name] = {**job.record(one, trainer, name), **facts, **own}
        trainer.model.set_adapter(name)
        verify.save_probe(trainer.model, finetune.probe(prepared[name], tokenizer), directory / name / runs.PROBE)
        runs.write_json(directory / name / runs.RECORD, records[name])
    plotting.loss_curves(records, directory / "loss.png", "loss")
    first = next(iter(jobs.values()))
    if first.options.run.verify:
        folders = [directory / name for name in records]
        for name, reload in zip(records, verify.verify_in_new_process(folders), strict=True):
            records[name]["reload"] = reload
            runs.write_json(directory / name / runs.RECORD, records[name])
    agree = all(record.get("reload", {}).get("agree", True) for record in records.values())
    record = {"command": "finetune", "runs": records, **facts, "reload": {"agree": agree}}
    runs.write_json(directory / runs.RECORD, record)
    return record


def summary(record: Mapping[str, Any], output: str) -> str:
    """A table of the adapters, the best held-out loss first, and what the training cost."""
    records = record["runs"]
    order = sorted(records, key=lambda name: (records[name]["stopped"], records[name]["held_out_after"] or 0.0))

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    rows = [
        [
            name,
            f"{one['learning_rate']:g}",
            f"{one['trainable_parameters']:,}",
            f"{one['steps']}{' (stopped)' if one['stopped'] else ''}",
            figure(one["held_out_before"]),
            figure(one["held_out_after"]),
        ]
        for name, one in ((name, records[name]) for name in order)
    ]
    step = record["seconds_per_step"]
    lines = [
        table(("adapter", "learning rate", "trainable", "steps", "held out, before", "after"), rows),
        "",
        f"time       {'' if step is None else f'{step:.3f} s per step of all, '}{record['seconds']:.0f} s in total",
        f"memory     {record['peak_memory_mib']:.0f} MiB peak during training",
        f"saved      {output}/{{{','.join(order)}}}",
    ]
    if wrong := [name for name in order if not records[name].get("reload", {}).get("agree", True)]:
        lines.append(f"reloaded   LOGITS DIFFER: {', '.join(wrong)}")
    elif "reload" in records[order[0]]:
        lines.append("reloaded   in a new process: logits agree")
    return "\n".join(lines)
