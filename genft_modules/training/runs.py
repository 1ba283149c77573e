"""The runs of a group of adapters that train together: their arguments, their data, and which samples come when."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, Dataset, Sampler, SequentialSampler

from genft_modules.methods.checks import check_number, check_rank, shown

COLUMN = "adapter_names"  # as the argument of the model


@dataclass
class AdapterRun:
    """How one adapter of a group trains. A field that is None is that of the `TrainingArguments`, which explain it.

    Args:
        train_dataset: with a length and items that are dicts, such as those of datasets.
        eval_dataset: likewise; None for no evaluation.
        seed: of the order of the samples and of the adapter's dropout.
    """

    train_dataset: Any
    eval_dataset: Any = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None
    per_device_train_batch_size: int | None = None
    seed: int | None = None

    def check(self, name: str) -> None:
        """Raises TypeError or ValueError, naming the run and the field."""
        for field in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, field)
            if dataset is None and field == "eval_dataset":
                continue
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise TypeError(f"runs: {name}: {field}: got {shown(dataset)}, expected a dataset with a length")
            if not len(dataset):
                raise ValueError(f"runs: {name}: {field}: got no samples, expected some")
        numbers = ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "num_train_epochs")
        for field in (*numbers, "max_steps", "per_device_train_batch_size", "seed"):
            value = getattr(self, field)
            if value is None:
                continue
            if field in numbers:
                check_number(f"runs: {name}: {field}", value)
            else:
                check_rank(f"runs: {name}: {field}", value, least=0 if field == "seed" else 1)
            if value < 0:
                raise ValueError(f"runs: {name}: {field}: got {value}, expected at least 0")

    def arguments(self, args: Any) -> Any:
        """The `TrainingArguments` of this run."""
        own = copy.copy(args)
        for field in fields(self)[2:]:
            if (value := getattr(self, field.name)) is not None:
                setattr(own, field.name, value)
        if self.seed is not None:
            own.data_seed = self.seed
        return own


class OfAdapter(Dataset[dict[str, Any]]):
    """A dataset whose samples also say which adapter they are for."""

    def __init__(self, dataset: Any, adapter: str) -> None:
        self.dataset = dataset
        self.adapter = adapter

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], COLUMN: self.adapter}


class GroupCollator:
    """A data collator for samples of several adapters: the batch has one adapter name per sample."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.tokenizer = getattr(collate, "tokenizer", None)  # the Trainer saves it

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = [sample.get(COLUMN) for sample in samples]
        batch = {}
        if samples:
            batch = dict(self.collate([{k: v for k, v in one.items() if k != COLUMN} for one in samples]))
        return batch if None in names else {**batch, COLUMN: names}


class Order:
    """Which samples of its own dataset an adapter takes in each update: those of a Trainer with the same arguments."""

    def __init__(self, dataset: Any, args: Any) -> None:
        self.accumulation = args.gradient_accumulation_steps
        sampler: Any = SequentialSampler(dataset)
        if args.train_sampling_strategy == "random":
            seed = args.seed if args.data_seed is None else args.data_seed
            sampler = SeedableRandomSampler(dataset, data_seed=seed)
        self.sampler = sampler
        self.batches = BatchSampler(sampler, args.per_device_train_batch_size, args.dataloader_drop_last)
        per_epoch = math.ceil(len(self.batches) / self.accumulation)
        self.updates: int = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)

    def __iter__(self) -> Iterator[list[list[int]]]:
        """For each update, up to `gradient_accumulation_steps` batches."""
        update = epoch = 0
        while update < self.updates:
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            batches = list(self.batches)
            for start in range(0, len(batches), self.accumulation):
                if update < self.updates:
                    yield batches[start : start + self.accumulation]
                update += 1
            epoch += 1


class GroupBatchSampler(Sampler[list[int]]):
    """The batches of all runs side by side, as indices into their concatenated datasets. Each update has
    `gradient_accumulation_steps` batches, of which the last are empty where every run is at the end of its epoch."""

    def __init__(self, orders: Sequence[Order], accumulation: int) -> None:
        self.orders = orders
        self.accumulation = accumulation

    def __len__(self) -> int:
        return self.accumulation * max(order.updates for order in self.orders)

    def __iter__(self) -> Iterator[list[int]]:
        first = [0]
        for order in self.orders:
            first.append(first[-1] + len(order.sampler))
        for updates in zip_longest(*self.orders, fillvalue=()):
            for place in range(self.accumulation):
                yield [
                    start + index
                    for start, batches in zip(first, updates, strict=False)
                    if place < len(batches)
                    for index in batches[place]
                ]
