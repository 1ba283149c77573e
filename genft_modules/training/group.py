"""AdapterGroupTrainer: many adapters of one base model trained at once, each as it would be trained alone."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator, get_scheduler
from transformers.data.data_collator import DataCollatorWithPadding
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_utils import seed_worker

from genft_modules.layer.mixed import MixedBatch
from genft_modules.methods.checks import shown
from genft_modules.model.tuner import GenFTModel
from genft_modules.training.runs import COLUMN, AdapterRun, GroupBatchSampler, GroupCollator, OfAdapter, Order

STOPPED = "/stopped"  # in the log, after an adapter's name


class AdapterGroupTrainer(Trainer):
    """transformers' Trainer for many adapters of one base model: their batches go through the base model together, and
    each adapter is trained as by a Trainer of its own, by its own samples.

        runs = {"low": AdapterRun(data, learning_rate=1e-4), "high": AdapterRun(data, learning_rate=1e-3)}
        AdapterGroupTrainer(model, args, runs).train()

    Each adapter has its own loss, optimizer state, learning rate schedule, gradient clipping, order of samples and
    dropout. Losses, gradient norms and learning rates are logged as "<adapter>/loss" and so on, evaluations as
    "eval_<adapter>_loss". Checkpoints have a folder for each adapter, as peft writes them. An adapter whose loss or
    gradient is not finite stops with the parameters it had before, which is logged as "<adapter>/stopped"; the others
    go on. An adapter that has done its steps waits for the others.

    Args:
        model: `peft.PeftModel` with the adapters, of any methods of genft_modules, `LoRAConfig` included.
        args: `TrainingArguments`. What an `AdapterRun` does not set is the same for all. Sizes of batches are per
            adapter. The steps of the whole are those of the longest run and count as one epoch.
        runs: adapter name → `AdapterRun`.
        data_collator, processing_class, compute_loss_func, compute_metrics, callbacks, optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics: as in `Trainer`. The loss function is called for each adapter.

    Raises:
        ValueError, TypeError: an adapter does not exist or trains biases of the base model; or an argument does not
            suit a group: several processes (give each its own adapters: they need no communication), fp16 (one loss
            scale for all), strategies "epoch", `load_best_model_at_end`, `auto_find_batch_size`, `group_by_length`.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        runs: Mapping[str, AdapterRun],
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        _check(model, args, runs)
        self.runs = dict(runs)
        self.own = {name: run.arguments(args) for name, run in self.runs.items()}
        self.parameters = _parameters(model, list(runs))
        self.stopped: set[str] = set()
        self.orders = {name: Order(run.train_dataset, self.own[name]) for name, run in self.runs.items()}
        self.updates = {name: order.updates for name, order in self.orders.items()}
        self._reports = {name: _Report() for name in self.runs}
        self._batches: Counter[str] = Counter()  # of each adapter in this update
        self._place = 0  # of the next batch in this update
        if data_collator is None:
            can_pad = hasattr(processing_class, "pad")
            data_collator = DataCollatorWithPadding(processing_class) if can_pad else default_data_collator
        args = copy.copy(args)
        args.max_grad_norm = 0.0  # each adapter's gradient is clipped on its own, see `training_step`
        evaluated = {
            name: OfAdapter(run.eval_dataset, name) for name, run in self.runs.items() if run.eval_dataset is not None
        }
        super().__init__(
            model,
            args,
            GroupCollator(data_collator),
            train_dataset=ConcatDataset([OfAdapter(run.train_dataset, name) for name, run in self.runs.items()]),
            eval_dataset=evaluated or None,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=[_Resume(self), *(callbacks or ())],
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.loss_is_scaled_for_ga = True
        self._unfreeze()

    # ---- data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of all adapters side by side, for the whole training."""
        args = self.args
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=GroupBatchSampler([*self.orders.values()], args.gradient_accumulation_steps),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=functools.partial(seed_worker, num_workers=args.dataloader_num_workers, rank=0),
        )
        return cast("DataLoader[Any]", self.accelerator.prepare(loader))

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """As in `Trainer`; the whole training is one epoch."""
        accumulation = args.gradient_accumulation_steps
        sizes = {name: own.per_device_train_batch_size * accumulation for name, own in self.own.items()}
        updates = max(self.updates.values())
        samples = sum(self.updates[name] * size for name, size in sizes.items())
        examples = len(cast(Any, self.train_dataset))
        return 1, updates, examples, samples, sum(sizes.values()), updates * accumulation, updates

    # ---- optimizer and schedules

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """One optimizer with groups of parameters for each adapter: optimizers of transformers keep their state by
        parameter, so that it works as one for each adapter."""
        if self.optimizer is not None:
            return self.optimizer
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or {
            "params",
            "model",
            "optimizer_dict",
        } & set(options):
            raise ValueError(
                f"optim: got {self.args.optim}, which wants the whole model, expected an optimizer of parameter groups "
                "such as adamw_torch"
            )
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = []
        for adapter, parameters in self.parameters.items():
            own = self.own[adapter]
            for weight_decay, names in (
                (own.weight_decay, [name for name in parameters if name in decayed]),
                (0.0, [name for name in parameters if name not in decayed]),
            ):
                if names:
                    params = [parameters[name] for name in names]
                    settings = {"lr": own.learning_rate, "weight_decay": weight_decay, "adapter": adapter}
                    groups.append({"params": params, **settings})
        self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule for each adapter, over its own steps."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        schedules = {}
        for name, own in self.own.items():
            one = get_scheduler(
                own.lr_scheduler_type,
                optimizer=torch.optim.SGD([torch.zeros(())], lr=own.learning_rate),
                num_warmup_steps=own.get_warmup_steps(self.updates[name]),
                num_training_steps=self.updates[name],
                scheduler_specific_kwargs=own.lr_scheduler_kwargs,
            )
            if not isinstance(one, LambdaLR):
                raise ValueError(
                    f"lr_scheduler_type: got {own.lr_scheduler_type}, expected a schedule of the steps, such as linear"
                )
            schedules[name] = one.lr_lambdas[0]
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(optimizer, [schedules[group["adapter"]] for group in optimizer.param_groups])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- a step

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """The batches of an update, and adapter → the number of its labels in them, see `_labels`."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._batches = Counter(name for batch in batches for name in set(batch[COLUMN]))
        self._place = 0
        return batches, self._labels(batches)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As in `Trainer`; returns the mean loss of the adapters that go on. In the last batch of an update, the
        gradient of each adapter is clipped."""
        self._losses: dict[str, Tensor] = {}
        inputs = _without(self.stopped, inputs)
        if inputs[COLUMN]:
            super().training_step(model, inputs, num_items_in_batch)
        self._place += 1
        for name, loss in self._losses.items():
            self._reports[name].add(loss)
        if self.accelerator.sync_gradients:
            self._clip_or_stop()
        kept = [loss for name, loss in self._losses.items() if name not in self.stopped]
        return torch.stack(kept).mean() if kept else torch.zeros((), device=self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the sum of the adapters' losses, whose gradient is that of each for its own parameters; in
        evaluation their mean. A batch without adapter names is for the active adapter, as in `Trainer`."""
        if COLUMN not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        names, base = inputs[COLUMN], self._base()
        targets = {key: inputs[key] for key in self.label_names if key in inputs}
        if not targets:
            raise ValueError(f"train_dataset: got samples without {' and '.join(self.label_names)}, expected them")
        # The decoder of an encoder-decoder reads the labels, shifted.
        read = {key: inputs[key] for key in inputs if base.config.is_encoder_decoder or key not in targets}
        seeds = {}
        if model.training:
            place = self.state.global_step * self.args.gradient_accumulation_steps + self._place
            seeds = {name: (self.own[name].seed << 32) + place for name in set(names)}
        outputs = model(**{**read, COLUMN: MixedBatch(tuple(names), seeds=seeds)})
        counts = num_items_in_batch if model.training else self._labels([inputs])
        losses = {}
        for name, places in _places(names).items():
            mine = ModelOutput({key: _take(one, places) for key, one in outputs.items() if _is_batched(one, names)})
            loss = self._loss(mine, {key: _take(one, places) for key, one in targets.items()}, counts.get(name))
            # A mean over a batch is divided by the number of batches, as in Trainer.
            losses[name] = loss / self._batches[name] if model.training and name not in counts else loss
        self._losses = {name: loss.detach() for name, loss in losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        if not model.training:
            loss = loss / len(losses)
        return (loss, outputs) if return_outputs else loss

    def _base(self) -> Any:
        return cast(PeftModel, self.model).get_base_model()

    def _loss_function(self) -> Any:
        # Encoder-decoders compute their loss without a shift, whatever the class of loss that they are listed with.
        return ForMaskedLMLoss if self._base().config.is_encoder_decoder else self._base().loss_function

    def _labels(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Adapter → the number of its labels, by which the sum of its losses is divided; {} if losses are means."""
        counts: dict[str, Tensor] = {}
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return counts
        for batch in batches:
            labels = batch.get("labels")
            if isinstance(labels, Tensor):
                labels = labels[..., 1:] if self._loss_function() is ForCausalLMLoss else labels
                for name, places in _places(batch[COLUMN]).items():
                    count = _take(labels, places).ne(-100).sum().to(self.args.device)
                    counts[name] = counts[name] + count if name in counts else count
        return counts

    def _loss(self, outputs: ModelOutput, targets: dict[str, Tensor], count: Tensor | None) -> Tensor:
        """The loss of one adapter as its model computes it: the mean, or the sum divided by `count`."""
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, targets.get("labels"), num_items_in_batch=count)
        elif self.label_smoother is not None and "labels" in targets:
            shift = self._loss_function() is ForCausalLMLoss
            loss = self.label_smoother(outputs, targets["labels"], shift_labels=shift, num_items_in_batch=count)
        else:
            options = {} if count is None else {"num_items_in_batch": count}
            if "logits" in outputs:
                # under the names that classifiers and language models use
                options = {**options, "pooled_logits": outputs["logits"], "vocab_size": outputs["logits"].shape[-1]}
            loss = self._loss_function()(**outputs, **targets, **options, config=self._base().config)
        return cast(Tensor, loss)

    def _clip_or_stop(self) -> None:
        """Clip the gradient of each adapter. If it or the loss is not finite, discard it and stop the adapter."""
        norms, found = {}, []
        for name, parameters in self.parameters.items():
            gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
            if gradients:
                norms[name] = torch.nn.utils.get_total_norm(gradients).to(self.args.device)
                found.append(torch.stack([norms[name], self._reports[name].loss.to(norms[name])]))
        values = torch.stack(found).tolist() if found else []  # one synchronisation for all
        rates = {group["adapter"]: float(group["lr"]) for group in self.optimizer.param_groups}
        for (name, norm), (size, loss) in zip(norms.items(), values, strict=True):
            if not math.isfinite(size + loss):
                self._stop(name, f"its gradient norm is {size} and its loss {loss}")
            elif self.own[name].max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters[name].values(), self.own[name].max_grad_norm, norm)
            report = self._reports[name]
            report.updates, report.norm, report.rate = report.updates + 1, size, rates[name]
        going = [name for name in self.runs if name not in self.stopped]
        if all(self.updates[name] <= self.state.global_step + 1 for name in going):
            self.control.should_training_stop = True

    def _stop(self, name: str, reason: str) -> None:
        for parameter in self.parameters[name].values():
            parameter.grad = None
        self.stopped.add(name)
        step = self.state.global_step
        warnings.warn(
            f"{name}: stopped after {step} steps, because {reason}. The other adapters go on.",
            RuntimeWarning,
            stacklevel=2,
        )
        self.log({f"{name}{STOPPED}": 1.0})

    # ---- logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the figures of each adapter beside those of the training."""
        if "loss" in logs:
            for name, report in self._reports.items():
                if report.updates and name not in self.stopped:
                    logs[f"{name}/loss"] = float(report.loss) / report.updates
                    logs[f"{name}/grad_norm"] = report.norm
                    logs[f"{name}/learning_rate"] = report.rate
                self._reports[name] = _Report()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """As in `Trainer`; 0 for an empty batch."""
        return cast(int, super().floating_point_ops(inputs)) if inputs[COLUMN] else 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._unfreeze()  # all but the active adapter are frozen by it

    def _unfreeze(self) -> None:
        for parameters in self.parameters.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)


@dataclass
class _Report:
    """What an adapter did since the last log."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))  # the sum
    updates: int = 0
    norm: float = math.nan
    rate: float = math.nan

    def add(self, loss: Tensor) -> None:
        self.loss = self.loss.to(loss) + loss


class _Resume(TrainerCallback):
    """Adapters that stopped before an interruption stay so: the log, which is part of a checkpoint, says which."""

    def __init__(self, trainer: AdapterGroupTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = {key for entry in state.log_history for key in entry}
        self.trainer.stopped = {name for name in self.trainer.runs if f"{name}{STOPPED}" in logged}


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _take(tensor: Tensor, places: list[int]) -> Tensor:
    """The samples at these places; a view if they are neighbours."""
    if places[-1] - places[0] + 1 == len(places):
        return tensor[places[0] : places[-1] + 1]
    return tensor[torch.tensor(places, device=tensor.device)]


def _is_batched(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(names)


def _without(adapters: set[str], inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch without the samples of some adapters."""
    names = inputs[COLUMN]
    places = [place for place, name in enumerate(names) if name not in adapters]
    if len(places) == len(names):
        return inputs
    if not places:
        return {COLUMN: []}
    kept = {key: _take(one, places) if _is_batched(one, names) else one for key, one in inputs.items()}
    return {**kept, COLUMN: [names[place] for place in places]}


def _parameters(model: PeftModel, adapters: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Adapter → its trainable parameters by name, which are what peft trains if it is the active one."""
    before = model.active_adapters
    found = {}
    for adapter in adapters:
        model.set_adapter(adapter)
        found[adapter] = {name: one for name, one in model.named_parameters() if one.requires_grad}
    model.base_model.set_adapter(before)
    return found


def _check(model: Any, args: Any, runs: Any) -> None:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, GenFTModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a PeftModel with adapters of genft_modules (or LoRAConfig)"
        )
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args: got {type(args).__name__}, expected TrainingArguments")
    if not isinstance(runs, Mapping) or not runs or not all(isinstance(run, AdapterRun) for run in runs.values()):
        raise TypeError(f"runs: got {shown(runs)}, expected a dict of adapter names and AdapterRun")
    for name, run in runs.items():
        if name not in model.peft_config:
            raise ValueError(f"runs: got {shown(name)}, expected adapters of the model: {list(model.peft_config)}")
        config = model.peft_config[name]
        if config.bias != "none":
            raise ValueError(f"runs: {name} has bias={config.bias!r}, expected 'none': all adapters share the biases")
        if getattr(config, "penalty", 0):
            raise ValueError(f"runs: {name} has a penalty, expected 0: the loss of a group has none")
        run.check(name)
    refused = {
        "several processes": (args.world_size > 1, "one: give each process its own adapters"),
        "several GPUs": (args.n_gpu > 1, "one: set CUDA_VISIBLE_DEVICES"),
        "fp16": (args.fp16, "bf16 or float32: adapters would share the scale of their losses"),
        "eval_strategy='epoch'": (args.eval_strategy == "epoch", "'steps': adapters have epochs of their own"),
        "save_strategy": (args.save_strategy in ("epoch", "best"), "'steps': adapters have epochs of their own"),
        "load_best_model_at_end": (args.load_best_model_at_end, "False: adapters are best at different steps"),
        "auto_find_batch_size": (args.auto_find_batch_size, "False"),
        "use_liger_kernel": (args.use_liger_kernel, "False: it computes one loss for all samples"),
        "train_sampling_strategy": (
            args.train_sampling_strategy not in ("random", "sequential"),
            "'random' or 'sequential'",
        ),
    }
    for what, (is_set, expected) in refused.items():
        if is_set:
            raise ValueError(f"args: got {what}, expected {expected}")
    if getattr(model.get_base_model().config, "output_router_logits", False):
        raise ValueError(
            "model: its config has output_router_logits, expected False: the loss that balances experts depends on all "
            "samples of a batch"
        )
