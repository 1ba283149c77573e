"""`genft classify`: texts and images, with transformers' Trainer and genft's methods."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genft_cli import data, job, runs
from genft_cli.arguments import ClassifyArguments, Options
from genft_cli.bases import place
from genft_cli.console import UserError, one_line, say
from genft_cli.images import Crop, Images, Pairs, classes, is_image_folder, lists, read_images, size_of, splits
from genft_cli.metrics import GLUE, check_metrics, metric_function
from genft_cli.tables import SUFFIXES
from genft_modules.card import write_card

MAX_LENGTH = 512  # default, if the model allows it
NAMED = 20  # classes that the model card names
Part = tuple[Sequence[Any], list[Any]]  # images and their labels
# Where texts are usually found; the first that fits counts.
TEXTS = (*dict.fromkeys(task.columns for task in GLUE.values()), ("text",))


@dataclass
class Labels:
    """The labels of a task: the names of the classes, in order; none for a regression."""

    values: list[Any]
    names: list[str]

    @property
    def regression(self) -> bool:
        return not self.values

    def numbers(self, found: Sequence[Any]) -> list[Any]:
        """Class numbers, or floats for a regression."""
        if self.regression:
            return [float(value) for value in found]
        index = {value: number for number, value in enumerate(self.values)}
        return [index[value] for value in found]


@dataclass
class Task:
    """The checked data: what the Trainer gets, and how its results are measured."""

    train: Any
    held_out: Any  # or None
    labels: Labels
    metrics: list[str]
    processor: Any  # tokenizer or image processor
    collator: Any


def run(options: Options) -> dict[str, Any]:
    """Train as the options say. Returns the record of the run; empty on all ranks but the first.

    Raises:
        UserError: an option, the model or the data does not fit; nothing was written.
    """
    checked, task, head = check(options)
    where = runs.directory(
        options.training.output_dir, options.given, resume=options.run.resume, overwrite=options.run.overwrite
    )
    with where as (directory, resume_from):
        trainer = _trainer(checked, task, head)
        record = job.train(checked, trainer, directory, resume_from, _probe(trainer))
        if record and checked.peft_config is not None:
            write_card(directory, note=_note(task.labels), loading=_head_arguments(task.labels))
        return record


# --- checks ------------------------------------------------------------------------------------------------------


def check(options: Options) -> tuple[job.Job, Task, list[str]]:
    """(the checked run, its data, the names of the head's modules). Raises UserError."""
    arguments: ClassifyArguments = options.extra
    if arguments.glue is not None and arguments.glue not in GLUE:
        raise UserError(f"--glue {arguments.glue}: choose from {', '.join(GLUE)}")
    for name, given in (
        ("dataset_streaming", options.script.dataset_streaming),
        ("datasets", options.mixture.datasets),
    ):
        if given:
            raise UserError(f"--{name}: genft classify reads the data as a whole from --dataset")
    job.check_numbers(options)
    base_config = job.base_of(options)
    kind, images = _class_of(options, base_config)
    task_type = None if images else "SEQ_CLS"
    job.peft_config_of(options, task_type)
    say("reading the data")
    task = _images(options, base_config) if images else _texts(options, base_config)
    _label(base_config, task.labels)
    _choose_best(options, task)
    head = _head(kind, base_config, options)
    _fit_head(options, head)
    options.training.label_names = ["labels"]  # peft hides the model's own names from the Trainer
    options.training.remove_unused_columns = False  # there are none
    if options.training.ddp_find_unused_parameters is None and options.method.method != "full":
        options.training.ddp_find_unused_parameters = False  # all adapters and the head are used
    checked = job.check(options, kind, base_config, task_type, task.train, task.held_out)
    checked.loading |= _loading(task, None if images else base_config.pad_token_id)
    checked.facts = {"labels": task.labels.names}
    return checked, task, head


def _class_of(options: Options, base_config: Any) -> tuple[Any, bool]:
    """(the transformers class, whether it takes images)."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    for kind in (AutoModelForSequenceClassification, AutoModelForImageClassification):
        if type(base_config) in kind._model_mapping:
            return kind, kind is AutoModelForImageClassification
    raise UserError(
        f"--model {options.model.model_name_or_path}: transformers has no class for classification with "
        f"{base_config.model_type}"
    )


def _choose_best(options: Options, task: Task) -> None:
    """The best checkpoint is that with the best value of the first metric, unless the options say otherwise."""
    training = options.training
    if training.load_best_model_at_end and "metric_for_best_model" not in options.given:
        training.metric_for_best_model, training.greater_is_better = task.metrics[0], True


def _label(base_config: Any, labels: Labels) -> None:
    base_config.num_labels = max(1, len(labels.values))
    base_config.problem_type = "regression" if labels.regression else "single_label_classification"
    if not labels.regression:
        base_config.id2label = dict(enumerate(labels.names))
        base_config.label2id = {name: number for number, name in enumerate(labels.names)}


def _head_arguments(labels: Labels) -> dict[str, Any]:
    """What from_pretrained needs to build the head."""
    return {"num_labels": max(1, len(labels.values)), "ignore_mismatched_sizes": True}


def _loading(task: Task, pad_token_id: int | None) -> dict[str, Any]:
    """What from_pretrained needs to build the same model again."""
    problem = "regression" if task.labels.regression else "single_label_classification"
    found = {**_head_arguments(task.labels), "problem_type": problem}
    return found if pad_token_id is None else {**found, "pad_token_id": pad_token_id}


def _note(labels: Labels) -> str:
    """A sentence for the model card."""
    if labels.regression:
        return "It contains the head of a regression."
    names = " ".join(", ".join(labels.names[:NAMED]).split())
    rest = f" and {len(labels.names) - NAMED} more" if len(labels.names) > NAMED else ""
    return f"It contains a head of {len(labels.names)} classes, in this order: {names}{rest}."


def _head(kind: Any, base_config: Any, options: Options) -> list[str]:
    """The modules beside the model's body, such as classifier or score."""
    model = job.adapted_on_meta(base_config, None, f"--model {options.model.model_name_or_path}", kind)
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and next(child.parameters(), None) is not None
    ]


def _fit_head(options: Options, head: list[str]) -> None:
    """The head is new: it is trained and saved as a whole, and no method adapts it."""
    if options.method.method == "full":
        return
    options.fields.setdefault("modules_to_save", head)
    if options.method.target_modules == ["all-linear"]:
        options.fields.setdefault("exclude_modules", rf"(.*\.)?({'|'.join(map(re.escape, head))})(\..*)?")


def _splits(options: Options, found: Any, option: str) -> tuple[Any, Any]:
    """(training data, held-out data or None) of `datasets`' splits."""
    arguments, run, script = options.extra, options.run, options.script
    if script.dataset_train_split not in found:
        raise UserError(f"{option}: has no split {script.dataset_train_split}; it has {', '.join(found)}")
    train = found[script.dataset_train_split]
    if not _evaluates(options):
        return train, None
    if run.eval_dataset is not None:
        other = data.read(run.eval_dataset, f"--eval_dataset {run.eval_dataset}")
        return train, next(other[name] for name in (script.dataset_test_split, *other) if name in other)
    names = [script.dataset_test_split, "validation", "eval", "dev"]
    if arguments.glue is not None and "dataset_test_split" not in options.given:
        names = [GLUE[arguments.glue].split, "validation"]  # the labels of GLUE's test splits are not public
    for name in names:
        if name in found:
            return train, found[name]
    if "dataset_test_split" in options.given:
        raise UserError(f"{option}: has no split {script.dataset_test_split}; it has {', '.join(found)}")
    parts = train.train_test_split(test_size=_held_out_rows(options, len(train), option), seed=options.training.seed)
    return parts["train"], parts["test"]


def _evaluates(options: Options) -> bool:
    strategy = options.training.eval_strategy
    if str(getattr(strategy, "value", strategy)) != "no":
        return True
    if options.run.eval_dataset is not None:
        raise UserError("--eval_dataset: --eval_strategy no does not use it")
    return False


def _held_out_rows(options: Options, rows: int, option: str) -> int:
    fraction = options.run.eval_fraction
    if not 0 <= fraction < 1:
        raise UserError(f"--eval_fraction {fraction:g}: must be at least 0 and below 1")
    if rows < 2 or not fraction:
        raise UserError(f"{option}: too small for a held-out part; use --eval_dataset, or --eval_strategy no")
    return max(1, round(fraction * rows))


def _labels(
    arguments: ClassifyArguments, train: Sequence[Any], held_out: Sequence[Any], names: Sequence[str] | None
) -> Labels:
    """Classes from the data; a regression if there are numbers with a decimal point."""
    column = arguments.label_column
    for part, values in (("training", train), ("held-out", held_out)):
        if any(value is None for value in values):
            raise UserError(f"--label_column {column}: row {list(values).index(None) + 1} of the {part} data has none")
    everything = [*train, *held_out]
    if any(isinstance(value, float) for value in everything):
        return Labels([], [])
    if (names is not None or arguments.glue is not None) and -1 in everything:
        raise UserError(f"--label_column {column}: has -1, which stands for labels that are not public")
    if names is not None:
        return Labels(list(range(len(names))), list(names))
    found = classes(everything)
    if len(found) < 2:
        raise UserError(f"--label_column {column}: has only the label {found[0]}; expected at least two")
    return Labels(found, [str(value) for value in found])


def _metrics(arguments: ClassifyArguments, labels: Labels) -> list[str]:
    default = ["pearson", "spearman"] if labels.regression else ["accuracy"]
    if arguments.glue is not None:
        default = list(GLUE[arguments.glue].metrics)
    names = arguments.metrics or default
    check_metrics(names, labels.regression)
    return names


# --- texts -------------------------------------------------------------------------------------------------------


def _texts(options: Options, base_config: Any) -> Task:
    from transformers import AutoTokenizer, DataCollatorWithPadding

    arguments, name = options.extra, options.model.model_name_or_path
    source = options.script.dataset_name
    if not source:
        raise UserError("--dataset is missing: a file (.jsonl, .csv, .parquet), a folder or a data set on the Hub")
    option = f"--dataset {source}"
    train, held_out = _splits(options, data.read(source, option, config=options.script.dataset_config), option)
    columns = _text_columns(arguments, train, option)
    for part in (train, held_out) if held_out is not None else (train,):
        for column in (*columns, arguments.label_column):
            if column not in part.column_names:
                raise UserError(f"{option}: has no column {column}; it has {', '.join(part.column_names)}")
    feature = train.features[arguments.label_column]
    values = list(train[arguments.label_column]), [] if held_out is None else list(held_out[arguments.label_column])
    labels = _labels(arguments, *values, getattr(feature, "names", None))
    try:
        tokenizer = AutoTokenizer.from_pretrained(place(name), revision=options.model.model_revision)
    except Exception as error:  # transformers raises many types
        raise UserError(f"--model {name}: its tokenizer cannot be read ({one_line(error)[:200]})") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not _positions_follow_padding(base_config):
        base_config.pad_token_id = tokenizer.pad_token_id  # a decoder classifies the last token before the padding
    length = _length(arguments, base_config, tokenizer)

    def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
        texts = [[str(text or "") for text in rows[column]] for column in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=length)
        return {**encoded, "labels": labels.numbers(rows[arguments.label_column])}

    def prepared(part: Any) -> Any:
        return part.map(encode, batched=True, remove_columns=part.column_names, load_from_cache_file=False)

    return Task(
        train=prepared(train),
        held_out=None if held_out is None else prepared(held_out),
        labels=labels,
        metrics=_metrics(arguments, labels),
        processor=tokenizer,
        collator=DataCollatorWithPadding(tokenizer),
    )


def _text_columns(arguments: ClassifyArguments, rows: Any, option: str) -> list[str]:
    found = rows.column_names
    if arguments.text_columns:
        if len(arguments.text_columns) > 2:
            raise UserError(f"--text_columns {' '.join(arguments.text_columns)}: expected one or two")
        return arguments.text_columns
    if arguments.glue is not None:
        return list(GLUE[arguments.glue].columns)
    for columns in sorted(TEXTS, key=len, reverse=True):
        if set(columns) <= set(found):
            return list(columns)
    texts = [name for name in found if getattr(rows.features[name], "dtype", "") in ("string", "large_string")]
    texts = [name for name in texts if name != arguments.label_column]
    if len(texts) == 1:
        return texts
    raise UserError(f"{option}: has the columns {', '.join(found)}; name those with text by --text_columns")


def _positions_follow_padding(base_config: Any) -> bool:
    """Whether positions begin after the number of the padding token, as in RoBERTa."""
    return "roberta" in base_config.model_type and base_config.pad_token_id is not None


def _length(arguments: ClassifyArguments, base_config: Any, tokenizer: Any) -> int:
    limit = getattr(base_config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH
    if _positions_follow_padding(base_config):
        limit -= base_config.pad_token_id + 1
    limit = min(limit, tokenizer.model_max_length)
    length = arguments.max_text_length
    if length is not None and not 1 <= length <= limit:
        raise UserError(f"--max_text_length {length}: must be at least 1 and at most {limit}, the model's limit")
    return length or min(MAX_LENGTH, limit)


# --- images ------------------------------------------------------------------------------------------------------


def _images(options: Options, base_config: Any) -> Task:
    from transformers import AutoImageProcessor, default_data_collator

    arguments, name = options.extra, options.model.model_name_or_path
    if arguments.glue is not None:
        raise UserError(f"--glue {arguments.glue}: --model {name} takes images")
    train, held_out, names = _image_parts(options)
    values = train[1], [] if held_out is None else held_out[1]
    labels = _labels(arguments, *values, names)
    if labels.regression:
        raise UserError(f"--label_column {arguments.label_column}: the labels of images must be classes")
    try:
        processor = AutoImageProcessor.from_pretrained(place(name), revision=options.model.model_revision)
    except Exception as error:  # transformers raises many types
        raise UserError(f"--model {name}: its image processor cannot be read ({one_line(error)[:200]})") from None

    def prepared(part: Part, training: bool) -> Images:
        change = Crop(size_of(processor), training) if arguments.crop else None
        return Images(part[0], labels.numbers(part[1]), processor, change)

    images = prepared(train, True)
    _check_size(images, base_config)
    return Task(
        train=images,
        held_out=None if held_out is None else prepared(held_out, False),
        labels=labels,
        metrics=_metrics(arguments, labels),
        processor=processor,
        collator=default_data_collator,
    )


def _image_parts(options: Options) -> tuple[Part, Part | None, list[str] | None]:
    """(training part, held-out part or None, names of the classes or None)."""
    arguments, script, source = options.extra, options.script, options.script.dataset_name
    if not source:
        raise UserError("--dataset is missing: a folder, a .txt list, a .csv or .jsonl file, or a data set on the Hub")
    path, option = Path(source).expanduser(), f"--dataset {source}"
    listed = lists(path) if path.is_dir() else None
    if path.is_dir() and listed is None and not is_image_folder(path):
        return _decoded(options, source, option)
    if not path.exists() and path.suffix not in (".txt", *SUFFIXES):
        return _decoded(options, source, option)
    given = {"root": arguments.image_root, "column": arguments.image_column, "label": arguments.label_column}
    if listed is not None:
        return _listed(options, path, listed, given)
    parts = splits(path) if path.is_dir() else []
    if parts and script.dataset_train_split not in parts:
        raise UserError(f"{option}: has no split {script.dataset_train_split}; it has {', '.join(parts)}")
    train = read_images("--dataset", str(path / script.dataset_train_split) if parts else source, **given)
    if not _evaluates(options):
        return _apart(train), None, None
    if options.run.eval_dataset is not None:
        return _apart(train), _apart(read_images("--eval_dataset", options.run.eval_dataset, **given)), None
    for name in (script.dataset_test_split, "validation", "val", "eval"):
        if name in parts:
            return _apart(train), _apart(read_images("--dataset", str(path / name), **given)), None
    count = _held_out_rows(options, len(train), option)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.training.seed)).tolist()
    return _apart([train[i] for i in order[count:]]), _apart([train[i] for i in order[:count]]), None


def _listed(
    options: Options, path: Path, listed: tuple[Path, Path], given: dict[str, Any]
) -> tuple[Part, Part | None, list[str] | None]:
    """The parts of a folder with lists of its training and test images."""
    given = {**given, "root": given["root"] or str(path)}
    train = _apart(read_images("--dataset", str(listed[0]), **given))
    if not _evaluates(options):
        return train, None, None
    if options.run.eval_dataset is not None:
        return train, _apart(read_images("--eval_dataset", options.run.eval_dataset, **given)), None
    return train, _apart(read_images("--dataset", str(listed[1]), **given)), None


def _apart(pairs: Pairs) -> Part:
    return [source for source, _ in pairs], [label for _, label in pairs]


class _Column(Sequence[Any]):
    """A column of `datasets`' rows, whose images are decoded when they are needed."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index][self.name]


def _decoded(options: Options, source: str, option: str) -> tuple[Part, Part | None, list[str] | None]:
    """The parts of a data set of `datasets` with a column of images."""
    train, held_out = _splits(options, data.read(source, option, config=options.script.dataset_config), option)
    label = options.extra.label_column
    columns = [name for name, feature in train.features.items() if type(feature).__name__ == "Image"]
    if len(columns) != 1 or label not in train.features:
        found = ", ".join(train.features)
        raise UserError(f"{option}: expected one column of images and a column {label}; it has {found}")
    names = getattr(train.features[label], "names", None)
    parts = [None if part is None else (_Column(part, columns[0]), list(part[label])) for part in (train, held_out)]
    assert parts[0] is not None
    return parts[0], parts[1], names


def _check_size(images: Images, base_config: Any) -> None:
    """Prepare the first image, and compare its size with the model's."""
    shape = images[0]["pixel_values"].shape
    size = getattr(base_config, "image_size", None)
    if isinstance(size, int) and tuple(shape[-2:]) != (size, size):
        raise UserError(
            f"--model: its image processor makes images of {shape[-2]}×{shape[-1]}, the model takes {size}×{size}"
        )


# --- training ----------------------------------------------------------------------------------------------------


def _trainer(checked: job.Job, task: Task, head: list[str]) -> Any:
    import transformers
    from peft import get_peft_model

    options = checked.options
    model = job.load(checked, config=checked.base_config, found_elsewhere=head, ignore_mismatched_sizes=True)
    if checked.peft_config is not None:
        model = get_peft_model(model, checked.peft_config)
    kind = job.trainer_class(transformers.Trainer)
    return kind(
        model=model,
        args=options.training,
        train_dataset=checked.train,
        eval_dataset=checked.held_out,
        data_collator=task.collator,
        processing_class=task.processor,
        compute_metrics=metric_function(task.metrics, task.labels.regression),
    )


def _probe(trainer: Any) -> dict[str, torch.Tensor]:
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    batch = trainer.data_collator([rows[i] for i in range(min(2, len(rows)))])
    return {name: value for name, value in batch.items() if name != "labels" and isinstance(value, torch.Tensor)}
