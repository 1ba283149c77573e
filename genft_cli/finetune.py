"""`genft finetune --model ... --dataset ...`: check the options, train, save, and verify the saved adapter."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from genft_cli import recipes
from genft_cli.bases import DTYPES, check_device, launched, load_base, model_config, place
from genft_cli.console import UserError, one_line, say
from genft_cli.data import Windows, byte_tokenizer, collate, encode, read_records, split_records
from genft_cli.measure import PeakMemory
from genft_modules.disk.adapters import save_adapter
from genft_modules.files import new_directory
from genft_modules.model import distributed

SEQ_LEN = 512  # default, if the model allows it
CALIBRATION_BATCHES = 16  # default, for methods that select by gradients before training
LAUNCH = ".launch"  # in OUTPUT during the run: identifies the torchrun that started it
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Settings that may change between an interrupted run and its continuation.
_FREE_ON_RESUME = {"output", "save_every", "verify"}


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of one run, named as on the command line."""

    model: str
    dataset: str
    output: str
    method: str = "wegeft"
    eval_dataset: str | None = None
    dataset_split: str = "train"
    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    backend: str = "auto"
    lr: float | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    grad_accumulation: int = 1
    seq_len: int | None = None
    warmup: float = 0.05
    eval_fraction: float = 0.05
    evaluations: int = 4
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    byte_level: bool = False
    calibration_batches: int | None = None
    save_every: int = 0
    verify: bool = True


@dataclasses.dataclass
class Checked:
    """A checked job; the model is not loaded and nothing is written yet."""

    job: Job
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    peft_config: Any  # None: full fine-tuning
    train: Windows
    held_out: Windows
    steps: int
    trainable: int
    total: int

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0)


# --- checks ------------------------------------------------------------------------------------------------------


def check(job: Job) -> Checked:
    """Check all options before any heavy work. Raises UserError."""
    _check_numbers(job)
    config = recipes.peft_config(
        job.method,
        r=job.r,
        alpha=job.alpha,
        dropout=job.dropout,
        target_modules=job.target_modules,
        extra=job.config,
        backend=job.backend,
    )
    if job.calibration_batches is not None and getattr(config, "selection", None) != "gradient":
        raise UserError(f"--calibration-batches: {job.method} does not select by gradients")
    device = check_device(job.device)
    dtype = _dtype(job.dtype, device)
    _check_backend(job.backend, device, dtype)
    records = read_records(job.dataset, job.dataset_split)
    if job.eval_dataset is None:
        train_records, held_records = split_records(records, job.eval_fraction)
    else:
        train_records, held_records = records, read_records(job.eval_dataset, job.dataset_split)
    base_config = model_config(job.model)
    tokenizer = _tokenizer(job, base_config)
    seq_len = _seq_len(job, base_config)
    trainable, total = rehearse(base_config, config, f"--method {job.method} on {job.model}")
    train = encode(train_records, tokenizer, seq_len, title="training text")
    held_out = encode(held_records, tokenizer, seq_len, title="held-out text")
    per_step = job.batch_size * job.grad_accumulation * launched()
    steps = job.steps or max(1, math.ceil(job.epochs * len(train) / per_step))
    return Checked(job, device, dtype, tokenizer, config, train, held_out, steps, trainable, total)


def _check_numbers(job: Job) -> None:
    least = {
        "steps": 1, "epochs": 0, "batch_size": 1, "grad_accumulation": 1, "seq_len": 8,
        "warmup": 0, "lr": 0, "save_every": 0, "seed": 0, "evaluations": 1, "calibration_batches": 1,
    }  # fmt: skip
    for name, bound in least.items():
        value = getattr(job, name)
        strict = name in {"epochs", "lr"}
        if value is not None and (not math.isfinite(value) or value < bound or (strict and value == bound)):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {'above' if strict else 'at least'} {bound}")
    if not 0 < job.eval_fraction < 1:
        raise UserError(f"--eval-fraction {job.eval_fraction}: must be between 0 and 1")
    if job.dtype != "auto" and job.dtype not in DTYPES:
        raise UserError(f"--dtype {job.dtype}: choose from auto, {', '.join(DTYPES)}")


def _check_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check the backend by running the smallest possible operation."""
    from genft_kernels import input_edit

    one = torch.ones(1, 1, device=device, dtype=dtype)
    try:
        input_edit(one, one, one, backend=name)
    except ValueError as error:
        raise UserError(f"--backend {name}: {one_line(error)}") from None


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "float16" and device.type == "cpu":
        raise UserError("--dtype float16: needs a GPU; on the CPU use float32 or bfloat16")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return DTYPES[name]


def _tokenizer(job: Job, model_config: Any) -> Any:
    from transformers import AutoTokenizer

    vocabulary = model_config.get_text_config().vocab_size
    path = Path(job.model).expanduser()
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        if not job.byte_level:
            raise UserError(f"--model {job.model}: has no tokenizer; use --byte-level to read the text as bytes")
        tokenizer = byte_tokenizer()
    elif job.byte_level:
        raise UserError(f"--byte-level: the model {job.model} has a tokenizer of its own")
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place(job.model))
        except Exception as error:  # missing packages, broken files, errors of the Hub
            raise UserError(f"--model {job.model}: its tokenizer cannot be read ({one_line(error)[:200]})") from None
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"--model {job.model}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {vocabulary}"
        )
    return tokenizer


def _seq_len(job: Job, model_config: Any) -> int:
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if job.seq_len is not None and limit is not None and job.seq_len > limit:
        raise UserError(f"--seq-len {job.seq_len}: the model accepts at most {limit} tokens")
    return job.seq_len or min(SEQ_LEN, limit or SEQ_LEN)


def rehearse(model_config: Any, peft_config: Any, what: str) -> tuple[int, int]:
    """Count (trainable, all) parameters of the adapted model on the meta device.

    Raises UserError if a target module does not exist or the method does not support the model.
    """
    from transformers import AutoModelForCausalLM

    model = adapted_on_meta(model_config, peft_config, what, AutoModelForCausalLM)
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
            model: Any = kind.from_config(model_config)
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
    names = [name for name, _ in model.named_modules()]
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
            raise UserError(f"--target-modules {target}: no such module; the model has {', '.join(sorted(linear))}")


# --- the run -----------------------------------------------------------------------------------------------------


def run(job: Job, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run the job. Returns the record that is written to OUTPUT/run.json.

    OUTPUT contains adapter/ (or model/), run.json, loss.png, and the logits that `verify` compares with. If the job
    fails before its first checkpoint, OUTPUT is removed.

    Under torchrun, each process trains on its share of every batch and only rank 0 logs and saves. After a restart by
    torchrun, training resumes from the last checkpoint.
    """
    checked = check(job)
    with _together(job, checked.device), _directory(job, resume, overwrite) as (directory, resume_from):
        record = _train(checked, directory, resume_from)
    return record


@contextmanager
def _together(job: Job, device: torch.device) -> Iterator[None]:
    """Initialise the process group of torchrun and check that all processes have the same options."""
    if launched() == 1:
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    # After a restart, torchrun's store may still contain addresses of the previous attempt, so each has its own prefix.
    store, rank, size = next(rendezvous("env://"))
    store = torch.distributed.PrefixStore(  # type: ignore[attr-defined] # torch's own list of exports lacks it
        f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
    )
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size
    )
    try:
        distributed.agree("options", {f"--{k}": repr(v) for k, v in dataclasses.asdict(job).items()})
    except (ValueError, RuntimeError) as error:
        raise UserError(one_line(error)) from None
    yield
    torch.distributed.destroy_process_group()


def _launch() -> str | None:
    """An identifier of this torchrun, the same after its restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {os.getppid()}"


def _started_again(directory: Path) -> bool:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (directory / LAUNCH).is_file():
        return False
    return (directory / LAUNCH).read_text(encoding="utf-8") == _launch()


@contextmanager
def _directory(job: Job, resume: bool, overwrite: bool) -> Iterator[tuple[Path, Path | None]]:
    """(output directory, checkpoint to resume from); the directory is removed if the run fails without a checkpoint."""
    from genft_cli.training import checkpoints, drop_checkpoints

    directory, resume_from = distributed.from_first(lambda: _prepared(job, resume, overwrite))
    try:
        yield directory, resume_from
    except BaseException:
        if distributed.rank() != 0 or (directory / "run.json").exists():
            pass  # rank 0 cleans up; a complete run is kept
        elif checkpoints(directory):
            say(f"stopped; to resume, add --resume to the same command (last: {checkpoints(directory)[-1].name})")
        else:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    if distributed.rank() == 0:
        drop_checkpoints(directory)
        (directory / LAUNCH).unlink(missing_ok=True)


def _prepared(job: Job, resume: bool, overwrite: bool) -> tuple[Path, Path | None]:
    from genft_cli.training import checkpoints

    directory = Path(job.output).expanduser()
    settings = directory / "job.json"
    if _started_again(directory):
        resume = bool(checkpoints(directory))
        overwrite = not resume
    resume_from = None
    if resume:
        if not settings.is_file():
            raise UserError(f"--resume: no run to resume in {directory}")
        if (directory / "run.json").exists():
            raise UserError(f"--resume: the run in {directory} is finished")
        _check_same(job, json.loads(settings.read_text(encoding="utf-8")))
        found = checkpoints(directory)
        if not found:
            raise UserError(f"--resume: no complete checkpoint in {directory} (see --save-every)")
        resume_from = found[-1]
    elif directory.exists():
        if not directory.is_dir():
            raise UserError(f"--output {directory}: is a file")
        if any(directory.iterdir()):
            if not (overwrite and settings.is_file()):
                hint = "use another, --resume or --overwrite" if settings.is_file() else "use another"
                raise UserError(f"--output {directory}: exists and is not empty; {hint}")
            shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(settings, dataclasses.asdict(job))
        if launch := _launch():
            (directory / LAUNCH).write_text(launch, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {directory}: {error.strerror or one_line(error)}") from None
    return directory, resume_from


def _check_same(job: Job, before: dict[str, Any]) -> None:
    now = json.loads(json.dumps(dataclasses.asdict(job)))
    for name, value in now.items():
        if name not in _FREE_ON_RESUME and before.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise UserError(f"--resume: the run was started with {option} {before.get(name)}, not {value}")


def _train(checked: Checked, directory: Path, resume_from: Path | None) -> dict[str, Any]:
    from transformers import set_seed

    from genft_cli import plotting, verify
    from genft_cli.training import Schedule, bits_per_byte, train

    job = checked.job
    began = time.perf_counter()
    memory = PeakMemory(checked.device)
    idle = memory.now()
    set_seed(job.seed)
    # Full fine-tuning keeps fp32 weights and uses mixed precision: 16-bit weights would lose small updates.
    stored = torch.float32 if checked.peft_config is None else checked.dtype
    model = load_base(job.model, stored).to(checked.device)
    batch = job.batch_size
    before = bits_per_byte(model, checked.held_out, batch, checked.pad_id, "held out, before")
    # When resuming, the selection comes from the checkpoint.
    model = adapt(model, checked.peft_config, _calibration(checked) if resume_from is None else ())
    distributed.align_adapters(model)
    schedule = Schedule(
        steps=checked.steps,
        lr=job.lr or recipes.recipe(job.method).lr,
        batch_size=batch,
        grad_accumulation=job.grad_accumulation,
        warmup=job.warmup,
        seed=job.seed,
        save_every=job.save_every,
        evaluations=job.evaluations,
        dtype=checked.dtype,
        gradient_checkpointing=job.gradient_checkpointing,
    )
    outcome = train(
        model, checked.train, schedule, directory,
        held_out=checked.held_out, pad_id=checked.pad_id, title=job.method, resume_from=resume_from,
        device=checked.device,
    )  # fmt: skip
    adapter = checked.peft_config is not None
    _save(model, checked.tokenizer, directory, adapter)
    if distributed.rank() != 0:
        return {}  # only rank 0 logs and verifies
    verify.save_probe(model, checked.held_out[0]["input_ids"][None], directory / "probe.safetensors")
    record: dict[str, Any] = {
        "method": job.method,
        "base": place(job.model),
        "adapter": adapter,
        "device": str(checked.device),
        "processes": launched(),
        "dtype": str(stored).removeprefix("torch."),
        "trainable_parameters": checked.trainable,
        "all_parameters": checked.total,
        "learning_rate": schedule.lr,
        "steps": checked.steps,
        "bits_per_byte_before": before,
        "bits_per_byte_after": outcome.held_out[-1][1],
        "seconds_per_step": outcome.seconds_per_step,
        "peak_memory_mib": outcome.peak_mib,
        "idle_memory_mib": idle,
        "seconds": time.perf_counter() - began,
        "training_curve": outcome.train,
        "held_out_curve": [(0, before), *outcome.held_out],
    }
    _write_json(directory / "run.json", record)
    plotting.loss_curves({job.method: record}, directory / "loss.png")
    del model
    gc.collect()
    if job.verify:
        if checked.device.type == "cuda":
            torch.cuda.empty_cache()  # for the verifying process
        record["reload"] = verify.verify_in_new_process([directory])[0]
        _write_json(directory / "run.json", record)
    return record


def adapt(model: Any, peft_config: Any, calibration: Collection[Mapping[str, torch.Tensor]] = ()) -> Any:
    """Add a new adapter to the model; without a configuration, return the model itself (full fine-tuning). A method
    that selects by gradients uses the loss on the `calibration` batches, if there are any."""
    from peft import get_peft_model

    from genft_modules.model.slices import needs_slices, select_slices

    if peft_config is None:
        return model
    model = get_peft_model(model, copy.deepcopy(peft_config))
    if calibration and needs_slices(model):
        try:
            # The factor does not change the selection and prevents fp16 gradients from underflowing.
            select_slices(model, calibration, loss=lambda model, batch: 4096 * model(**batch).loss)
        except ValueError as error:
            raise UserError(f"--calibration-batches {len(calibration)}: {one_line(error)}") from None
    return model


def _calibration(checked: Checked) -> list[Mapping[str, torch.Tensor]]:
    """Random batches of the training text."""
    job, train = checked.job, checked.train
    count = (job.calibration_batches or CALIBRATION_BATCHES) * job.batch_size
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(job.seed))[:count].tolist()
    starts = range(0, len(order), job.batch_size)
    return [collate([train[i] for i in order[start : start + job.batch_size]], checked.pad_id) for start in starts]


def _save(model: Any, tokenizer: Any, directory: Path, adapter: bool) -> None:
    """Write adapter/ or model/ atomically."""
    if adapter:
        save_adapter(model, directory / "adapter")
        return
    if distributed.rank() != 0:
        return
    shutil.rmtree(directory / "model", ignore_errors=True)
    with new_directory(directory / "model") as partial:
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def summary(record: dict[str, Any], output: str) -> str:
    """A readable summary of a run."""
    share = record["trainable_parameters"] / record["all_parameters"]
    lines = [
        ("method", f"{record['method']}, {record['steps']} steps, learning rate {record['learning_rate']:g}"),
        ("trainable", f"{record['trainable_parameters']:,} of {record['all_parameters']:,} parameters ({share:.2%})"),
        (
            "held out",
            f"{record['bits_per_byte_before']:.4f} bits per byte before, {record['bits_per_byte_after']:.4f} after",
        ),
        ("time", f"{record['seconds_per_step'] or math.nan:.3f} s per step, {record['seconds']:.0f} s in total"),
        ("memory", f"{record['peak_memory_mib']:.0f} MiB peak during training"),
        ("saved", str(Path(output) / ("adapter" if record["adapter"] else "model"))),
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
