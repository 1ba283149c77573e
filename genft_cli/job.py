"""What all training commands share: the checks before, training, saving, and the proof that the run can be reloaded."""

from __future__ import annotations

import copy
import gc
import math
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from genft_cli import methods, runs
from genft_cli.arguments import Options
from genft_cli.bases import launched, load_base, model_config, place
from genft_cli.console import UserError, one_line, say
from genft_cli.measure import PeakMemory
from genft_cli.training import End, Keeper, Progress, Trained, TrainerMixin, flat, held_out_losses
from genft_modules.disk.adapters import save_adapter
from genft_modules.files import added_files, writing
from genft_modules.model import distributed
from genft_modules.model.targets import target_names


@dataclass
class Job:
    """A checked run; the weights are not loaded and nothing is written yet."""

    options: Options
    kind: Any  # the transformers class of the model
    base_config: Any
    peft_config: Any  # None: full fine-tuning
    train: Any
    held_out: Any  # or None
    trainable: int
    total: int
    loading: dict[str, Any] = field(default_factory=dict)  # what from_pretrained needs beside the dtype
    facts: dict[str, Any] = field(default_factory=dict)  # for the record


# --- checks ------------------------------------------------------------------------------------------------------


def base_of(options: Options) -> Any:
    """The base model's configuration. Raises UserError if there is none."""
    name = options.model.model_name_or_path
    if not name:
        raise UserError("--model is missing: a local model directory, or a model on the Hub")
    return model_config(name, revision=options.model.model_revision, trust_remote_code=_trust(options))


def _trust(options: Options) -> bool:
    return bool(getattr(options.training, "trust_remote_code", False))


def peft_config_of(options: Options, task_type: str | None) -> Any:
    """The peft configuration that the options describe; None for full fine-tuning."""
    given = options.method
    config = methods.peft_config(
        given.method,
        r=given.r,
        alpha=given.alpha,
        dropout=given.dropout,
        target_modules=given.target_modules,
        extra=options.fields,
        backend=given.backend,
        task_type=task_type,
    )
    if given.calibration_batches < 1:
        raise UserError(f"--calibration_batches {given.calibration_batches}: must be at least 1")
    if "calibration_batches" in options.given and getattr(config, "selection", None) != "gradient":
        raise UserError(f"--calibration_batches: {given.method} does not select by gradients")
    return config


def check(options: Options, kind: Any, base_config: Any, task_type: str | None, train: Any, held_out: Any) -> Job:
    """Check the method against the model and the machine, and fill in the learning rate. Raises UserError."""
    check_numbers(options)
    config = peft_config_of(options, task_type)
    what = f"--method {options.method.method} on {options.model.model_name_or_path}"
    trainable, total = rehearse(base_config, config, what, kind)
    _check_backend(options.method.backend, options.training.device)
    if "learning_rate" not in options.given:
        options.training.learning_rate = methods.learning_rate(options.method.method, total)
    checked = Job(options, kind, base_config, config, train, held_out, trainable, total)
    if _trust(options):
        checked.loading["trust_remote_code"] = True
    if config is not None and options.model.model_revision != "main":
        checked.loading["revision"] = options.model.model_revision
    return checked


def check_numbers(options: Options) -> None:
    """Raises UserError for a number out of its range that transformers would only notice later, or never."""
    least = {
        "num_train_epochs": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1, "max_length": 8, "learning_rate": 0, "seed": 0, "save_total_limit": 1,
        "warmup_steps": 0,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(options.training, name, None)
        strict = name in {"num_train_epochs", "learning_rate"}
        if value is not None and (not math.isfinite(value) or value < bound or (strict and value == bound)):
            raise UserError(f"--{name} {value:g}: must be {'above' if strict else 'at least'} {bound}")
    if "max_steps" in options.given and options.training.max_steps < 1:
        raise UserError(f"--max_steps {options.training.max_steps}: must be at least 1")
    if not math.isfinite(options.run.checkpoint_minutes) or options.run.checkpoint_minutes < 0:
        raise UserError(f"--checkpoint_minutes {options.run.checkpoint_minutes:g}: must be at least 0")
    patience = options.run.early_stopping_patience
    if patience is not None and patience < 1:
        raise UserError(f"--early_stopping_patience {patience}: must be at least 1")


def _check_backend(name: str, device: torch.device) -> None:
    """Check the backend by running the smallest possible operation."""
    from genft_kernels import input_edit

    one = torch.ones(1, 1, device=device)
    try:
        input_edit(one, one, one, backend=name)
    except ValueError as error:
        raise UserError(f"--backend {name}: {one_line(error)}") from None


def rehearse(model_config: Any, peft_config: Any, what: str, kind: Any) -> tuple[int, int]:
    """Count (trainable, all) parameters of the adapted model on the meta device.

    Raises UserError if a target module does not exist or the method does not support the model.
    """
    model = adapted_on_meta(model_config, peft_config, what, kind)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def adapted_on_meta(model_config: Any, peft_config: Any, what: str, kind: Any) -> Any:
    """Build the model on the meta device, with its adapter unless `peft_config` is None.

    Args:
        what: the user's options, for the error message.
        kind: the transformers class of the model.

    Raises:
        UserError: a target module does not exist, or the method does not support the model.
    """
    from peft import get_peft_model

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # raised by the methods if a pattern matches no layer
            # The Auto classes have from_config, the others _from_config.
            build = getattr(kind, "from_config", None) or kind._from_config
            model: Any = build(copy.deepcopy(model_config))
            if peft_config is not None:
                _check_targets(model, peft_config)
                model = get_peft_model(model, copy.deepcopy(peft_config))
    except UserError:
        raise
    except Exception as error:  # peft and transformers raise many types for options that do not fit
        raise UserError(f"{what}: {one_line(error)[:300]}") from None
    return model


def _check_targets(model: torch.nn.Module, peft_config: Any) -> None:
    """Raise UserError for a target that matches no module; peft only requires one match over all targets."""
    targets = getattr(peft_config, "target_modules", None)
    if targets is None or targets == "all-linear":
        return
    names = target_names(model)
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    for target in wanted:
        if isinstance(targets, str):
            found = any(re.fullmatch(target, name) for name in names)
        else:
            found = any(name == target or name.endswith("." + target) for name in names)
        if not found:
            linear = {
                n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2
            }
            raise UserError(f"--target_modules {target}: no such module; the model has {', '.join(sorted(linear))}")


# --- the run -----------------------------------------------------------------------------------------------------


def load(job: Job, **details: Any) -> Any:
    """The base model, in the dtype and quantisation of the options."""
    from trl import get_quantization_config

    options = job.options
    name = options.model.model_name_or_path
    say(f"loading {name}")
    # Full fine-tuning keeps fp32 weights and uses mixed precision: 16-bit weights would lose small updates.
    given: dict[str, Any] = {"dtype": options.model.dtype, "trust_remote_code": _trust(options)}
    if options.model.attn_implementation:
        given["attn_implementation"] = options.model.attn_implementation
    if quantization := get_quantization_config(options.model):
        given["quantization_config"] = quantization
    given |= getattr(options.training, "model_init_kwargs", None) or {}
    if hasattr(options.training, "model_init_kwargs"):
        options.training.model_init_kwargs = None  # used here; the trainer gets the loaded model
    return load_base(name, kind=job.kind, revision=options.model.model_revision, **given, **details)


def trainer_class(base: Any) -> Any:
    """The trainer with what ours add to it."""
    return type(f"Genft{base.__name__}", (TrainerMixin, base), {})


def train(
    job: Job, trainer: Any, directory: Path, resume_from: Path | None, probe: Mapping[str, Any]
) -> dict[str, Any]:
    """Train, save and verify. Returns the record that is written to OUTPUT/run.json.

    Args:
        job: from `check`.
        trainer: made of `trainer_class`, with the adapted model.
        directory, resume_from: from `runs.directory`.
        probe: inputs of the model on whose outputs the saved adapter is compared after reloading.

    Raises:
        RunError: the loss or a parameter is no longer finite.
        KeyboardInterrupt: after a signal, with a checkpoint saved.
    """
    if job.peft_config is not None:
        methods.apply_fused(trainer.model, job.options.method.method, job.options.method.backend)
        if resume_from is None:  # else the selection comes from the checkpoint
            select(job, trainer)
        distributed.align_adapters(trainer.model)
    say(_announcement(job, trainer))
    facts = fit(job, trainer, directory, resume_from, lambda place: _save(job, trainer, _unwrapped(trainer), place))
    if distributed.rank() != 0:
        return {}  # only rank 0 logs and verifies
    return _proved(job, trainer, directory, {**record(job, trainer), **facts}, probe)


def fit(
    job: Job, trainer: Any, directory: Path, resume_from: Path | None, save: Callable[[Path], None]
) -> dict[str, Any]:
    """Train and save, with what surrounds a training: the progress bar and the log, checkpoints in time and on signals,
    memory. Returns what was measured. Arguments and errors as in `train`; `save` writes what was trained."""
    from transformers import EarlyStoppingCallback, ProgressCallback
    from transformers.trainer_callback import PrinterCallback

    options, training = job.options, trainer.args
    began = time.perf_counter()
    progress, keeper = Progress(options.method.method, directory), Keeper(options.run.checkpoint_minutes)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(progress)
    trainer.add_callback(keeper)
    if patience := options.run.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=patience))
    if trainer.eval_dataset is None or resume_from is not None:  # or the evaluation is in the checkpoint's history
        training.eval_on_start = False
    memory = PeakMemory(training.device)
    idle = memory.now()
    memory.start()
    try:
        with keeper.listening():
            _train(trainer, resume_from)
            if keeper.stopped_by is not None:
                raise KeyboardInterrupt
            peak = memory.peak()
            _evaluate_last(trainer)
        say("saving")
        if training.push_to_hub:
            trainer.push_to_hub()
        runs.check_there(directory)
        save(directory)
    except OSError:
        _rescue(trainer, directory, save)
        raise
    finally:
        progress.close()
    return {
        "seconds_per_step": progress.seconds_per_step(),
        "peak_memory_mib": peak,
        "idle_memory_mib": idle,
        "seconds": time.perf_counter() - began,
    }


def _unwrapped(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _train(trainer: Any, resume_from: Path | None) -> None:
    if resume_from is None:
        trainer.train()
        return
    trainer.add_callback(End())
    try:
        trainer.train(resume_from_checkpoint=str(resume_from))
    except Trained:  # the checkpoint is loaded
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()


def select(job: Job, trainer: Any, adapter_name: str = "default") -> None:
    """For methods that select by gradients before training."""
    from genft_modules.model.slices import needs_slices, select_slices

    if not needs_slices(trainer.model, adapter_name):
        return
    options, rows = job.options, trainer.train_dataset
    size = options.training.per_device_train_batch_size
    count = options.method.calibration_batches * size
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.training.seed))[:count].tolist()
    known = set(trainer._signature_columns or ()) or None
    picked = [{k: v for k, v in rows[i].items() if known is None or k in known} for i in order]
    batches = [trainer.data_collator(picked[start : start + size]) for start in range(0, len(picked), size)]
    if "labels" not in batches[0]:
        raise UserError(
            f"--method {options.method.method}: selects by the loss on labels, which {options.command} lacks"
        )
    try:
        # The factor does not change the selection and prevents fp16 gradients from underflowing.
        select_slices(
            trainer.model, batches, loss=lambda model, batch: 4096 * model(**batch).loss, adapter_name=adapter_name
        )
    except ValueError as error:
        raise UserError(f"--calibration_batches {len(batches)}: {one_line(error)}") from None


def _announcement(job: Job, trainer: Any) -> str:
    held = "none" if trainer.eval_dataset is None else f"{len(trainer.eval_dataset):,}"
    rows = f"{len(trainer.train_dataset):,}" if hasattr(trainer.train_dataset, "__len__") else "a stream of"
    return (
        f"{job.options.method.method}: training {job.trainable:,} of {job.total:,} parameters "
        f"({job.trainable / job.total:.2%}) on {rows} sequences, held out: {held}, learning rate "
        f"{trainer.args.learning_rate:g}"
    )


def _evaluate_last(trainer: Any) -> None:
    """Evaluate after the last step, unless the Trainer did."""
    history = trainer.state.log_history
    done = any(held_out_losses(row) and row["step"] == trainer.state.global_step for row in history)
    done = done and not trainer.args.load_best_model_at_end  # the best checkpoint may be an earlier one
    if trainer.eval_dataset is not None and not done:
        trainer.evaluate()


def _save(job: Job, trainer: Any, model: Any, directory: Path) -> None:
    if job.peft_config is None:
        if launched() > 1:
            trainer.save_model(str(directory))
        else:
            with added_files(directory) as partial:
                trainer.save_model(str(partial))
        return
    save_adapter(model, directory)
    if distributed.rank() == 0 and trainer.processing_class is not None:
        with added_files(directory) as partial:
            trainer.processing_class.save_pretrained(str(partial))


def _rescue(trainer: Any, directory: Path, save: Callable[[Path], None]) -> None:
    """The run cannot go on: what no checkpoint contains of it is saved where the system keeps temporary files."""
    step = trainer.state.global_step
    newest = runs.checkpoints(directory)[-1:]
    if launched() > 1 or step == 0 or (newest and newest[0].name == f"checkpoint-{step}"):
        return
    place = Path(tempfile.mkdtemp(prefix="genft-"))
    try:
        save(place)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)
    else:
        say(f"what was trained until step {step} is saved in {place}")


def record(job: Job, trainer: Any, adapter: str = "") -> dict[str, Any]:
    """What a run's record holds beside what `fit` measures; `adapter`: one of a group."""
    options, history = job.options, trainer.state.log_history
    loss, prefix = (f"{adapter}/loss", f"eval_{adapter}_") if adapter else ("loss", "eval_")
    held_out_loss = f"{prefix}loss"
    held_out = [(row["step"], row[held_out_loss]) for row in history if held_out_loss in row]
    quantization = getattr(getattr(trainer.model, "config", None), "quantization_config", None)
    return {
        "command": options.command,
        "method": options.method.method,
        "base": place(options.model.model_name_or_path),
        "kind": job.kind.__name__,
        "load": job.loading,
        **job.facts,
        "adapter": job.peft_config is not None,
        "device": str(trainer.args.device),
        "processes": launched(),
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "quantization": None if quantization is None else quantization.to_dict(),
        "trainable_parameters": job.trainable,
        "all_parameters": job.total,
        "learning_rate": options.training.learning_rate,
        "steps": trainer.state.global_step,
        "held_out_before": held_out[0][1] if held_out and held_out[0][0] == 0 else None,
        "held_out_after": held_out[-1][1] if held_out else None,
        "metrics": next((_metrics(row, prefix) for row in reversed(history) if held_out_loss in row), {}),
        "training_curve": [(row["step"], row[loss]) for row in history if loss in row],
        "held_out_curve": held_out,
    }


def _metrics(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """What an evaluation found beside the loss."""
    other = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    names = [name.removeprefix(prefix) for name in row if name.startswith(prefix)]
    return {name: row[f"{prefix}{name}"] for name in names if name not in other}


def _proved(
    job: Job, trainer: Any, directory: Path, record: dict[str, Any], probe: Mapping[str, Any]
) -> dict[str, Any]:
    """The record, with the result of reloading in a new process."""
    from genft_cli import plotting, verify

    model = _unwrapped(trainer)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded:
        say("the saved adapter is not reloaded and compared: the model is sharded")
    else:
        with writing(directory):
            verify.save_probe(model, probe, directory / runs.PROBE)
    runs.write_json(directory / runs.RECORD, record)
    plotting.loss_curves({record["method"]: record}, directory / "loss.png", "loss")
    if warning := flat(record["training_curve"]):
        say(f"warning: {warning}")
    if job.options.run.verify and not sharded:
        trainer.model = trainer.model_wrapped = None
        del model
        gc.collect()
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()  # for the verifying process
        record["reload"] = verify.verify_in_new_process([directory])[0]
        runs.write_json(directory / runs.RECORD, record)
    return record


def summary(record: dict[str, Any], output: str) -> str:
    """A readable summary of a run."""
    share = record["trainable_parameters"] / record["all_parameters"]
    before, after = record["held_out_before"], record["held_out_after"]
    step = record["seconds_per_step"]
    lines = [
        ("method", f"{record['method']}, {record['steps']} steps, learning rate {record['learning_rate']:g}"),
        ("trainable", f"{record['trainable_parameters']:,} of {record['all_parameters']:,} parameters ({share:.2%})"),
    ]
    if after is not None:
        lines.append(
            (
                "held out",
                f"loss {after:.4f} after" if before is None else f"loss {before:.4f} before, {after:.4f} after",
            )
        )
    for name, value in record["metrics"].items():
        lines.append((name, f"{value:.4f}"))
    lines += [
        ("time", f"{'' if step is None else f'{step:.3f} s per step, '}{record['seconds']:.0f} s in total"),
        ("memory", f"{record['peak_memory_mib']:.0f} MiB peak during training"),
        ("saved", output),
    ]
    if reload := record.get("reload"):
        lines.append(("reloaded", reload_line(reload)))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def reload_line(reload: dict[str, Any]) -> str:
    """One line with the result of `verify`."""
    merged = "" if reload["merged"] is None else f", {reload['merged']:.1e} merged"
    verdict = "logits agree" if reload["agree"] else "LOGITS DIFFER"
    return (
        f"in a new process: {verdict}; max |difference| {reload['loaded']:.1e} as loaded{merged} "
        f"(largest logit {reload['largest_logit']:.1f})"
    )
