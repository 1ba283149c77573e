"""`genft classify` on small models: every form of data, the metrics, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import EvalPrediction

from genft_cli.console import UserError
from genft_cli.images import Crop, read_images
from genft_cli.metrics import metric_function
from genft_cli.verify import verify
from tests.cli.conftest import Genft

QUICK = (
    "--max_steps", 2, "--per_device_train_batch_size", 4, "--use_cpu", "--output", "out", "--no_verify",
    "--eval_strategy", "epoch", "--eval_on_start", "false", "--r", 4,
)  # fmt: skip
COLOURS = ("red", "green", "blue")
SENTENCES = [(f"the {c} house {i}", f"a {c} thing", n) for i in range(6) for n, c in enumerate(COLOURS)]


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _image(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), colour).save(path)
    return path


def _done(genft: Genft, *arguments: object) -> dict[str, Any]:
    done = genft("classify", *arguments, *QUICK)
    assert done.code == 0, done.err
    record: dict[str, Any] = json.loads(Path("out/run.json").read_text())
    for name, value in record["metrics"].items():
        assert f"{value:.4f}" in done.out, name
    return record


TEXTS: dict[str, tuple[list[dict[str, Any]], tuple[object, ...], list[str], list[str]]] = {
    # rows, options, names of the classes, metrics
    "pair": (
        [{"sentence1": a, "sentence2": b, "label": n} for a, b, n in SENTENCES],
        (), ["0", "1", "2"], ["accuracy"],
    ),
    "text": (
        [{"id": 1, "comment": a, "label": COLOURS[n]} for a, _, n in SENTENCES],
        ("--metrics", "f1", "mean_per_class_accuracy"), sorted(COLOURS), ["f1", "mean_per_class_accuracy"],
    ),
    "columns": (
        [{"a": a, "b": b, "c": b, "class": 10 * n} for a, b, n in SENTENCES],
        ("--text_columns", "a", "b", "--label_column", "class"), ["0", "10", "20"], ["accuracy"],
    ),
    "regression": (
        [{"sentence1": a, "sentence2": b, "label": n / 2} for a, b, n in SENTENCES],
        (), [], ["pearson", "spearman"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(genft: Genft, roberta: Path, tmp_path: Path, kind: str) -> None:
    rows, options, names, metrics = TEXTS[kind]
    data = _jsonl(tmp_path / "data.jsonl", rows)
    record = _done(genft, "--model", roberta, "--dataset", data, *options)
    assert list(record["metrics"]) == metrics
    assert record["labels"] == names
    head = load_file("out/adapter_model.safetensors")
    assert head["base_model.model.classifier.out_proj.weight"].shape == (max(1, len(names)), 32)
    assert not any("classifier" in name and "wegeft" in name for name in head)
    assert verify(Path("out"))["agree"]
    if kind == "pair":  # the commands for adapters know the head, too
        done = genft("merge", "out", "--output", "merged")
        assert done.code == 0, done.err
        assert load_file("merged/model.safetensors")["classifier.out_proj.weight"].shape == (3, 32)


def test_a_decoder(genft: Genft, llama: Path, tmp_path: Path) -> None:
    """A causal model classifies the last token before the padding; GRFT selects by the gradients of this loss."""
    data = _jsonl(tmp_path / "data.jsonl", TEXTS["pair"][0])
    record = _done(genft, "--model", llama, "--dataset", data, "--method", "grft", "--calibration_batches", 2)
    assert record["kind"] == "AutoModelForSequenceClassification"
    assert verify(Path("out"))["agree"]


@pytest.mark.parametrize(
    ("task", "row", "metrics"),
    [
        ("mrpc", {"sentence1": "a", "sentence2": "b", "label": 0}, {"accuracy", "f1"}),
        ("cola", {"sentence": "a", "label": 0}, {"matthews_correlation"}),
    ],
)
def test_glue(genft: Genft, roberta: Path, tmp_path: Path, task: str, row: dict[str, Any], metrics: set[str]) -> None:
    """The columns, the metrics and the validation split of a task; the labels of the test split are not public."""
    for split in ("train", "validation"):
        _jsonl(tmp_path / f"glue/{split}.jsonl", [{**row, "idx": i, "label": i % 2} for i in range(8)])
    _jsonl(tmp_path / "glue/test.jsonl", [{**row, "idx": i, "label": -1} for i in range(8)])
    record = _done(
        genft, "--model", roberta, "--dataset", tmp_path / "glue", "--glue", task, "--save_strategy", "epoch",
        "--load_best_model_at_end", "true",
    )  # fmt: skip
    assert set(record["metrics"]) == metrics
    state = json.loads(next(Path("out").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["best_metric"] is not None


def _folders(root: Path, splits: tuple[str, ...]) -> Path:
    for split in splits:
        for colour in COLOURS:
            for i in range(4 if split == "train" else 1):
                _image(root / split / colour / f"{i}.png", colour)
    return root


def _vtab(root: Path) -> tuple[Path, tuple[object, ...]]:
    for split, name in (("train", "train800val200.txt"), ("test", "test.txt")):
        _folders(root / "images", (split,))
        lines = [f"images/{split}/{c}/0.png {n}" for n, c in enumerate(COLOURS)]
        (root / name).write_text("\n".join(lines) + "\n")
    return root, ()


def _fgvc(root: Path) -> tuple[Path, tuple[object, ...]]:
    _folders(root / "images", ("train", "test"))
    for split in ("train", "test"):
        pairs = {f"{split}/{c}/0.png": 7 * n + 1 for n, c in enumerate(COLOURS)}
        (root / f"{split}.json").write_text(json.dumps(pairs))
    return root, ("--image_root", root / "images", "--crop")


def _table(root: Path) -> tuple[Path, tuple[object, ...]]:
    _folders(root, ("train",))
    rows = [f"train/{c}/{i}.png,{c}" for c in COLOURS for i in range(4)]
    (root / "data.csv").write_text("file,kind\n" + "\n".join(rows) + "\n")
    return root / "data.csv", ("--image_column", "file", "--label_column", "kind")


def _decoded(root: Path) -> tuple[Path, tuple[object, ...]]:
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as Column

    def part(split: str) -> Any:
        rows = {"image": [str(_image(root / f"{split}{c}.png", c)) for c in COLOURS], "label": [0, 1, 2]}
        return Dataset.from_dict(rows, Features({"image": Column(), "label": ClassLabel(names=list(COLOURS))}))

    DatasetDict(train=part("train"), test=part("test")).save_to_disk(str(root / "saved"))
    return root / "saved", ()


IMAGES = {
    "splits": lambda root: (_folders(root, ("train", "test")), ()),
    "classes": lambda root: (_folders(root, ("train",)) / "train", ()),
    "vtab": _vtab,
    "fgvc": _fgvc,
    "table": _table,
    "decoded": _decoded,
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(genft: Genft, vit: Path, tmp_path: Path, kind: str) -> None:
    data, options = IMAGES[kind](tmp_path / "data")
    record = _done(genft, "--model", vit, "--dataset", data, "--metrics", "mean_per_class_accuracy", *options)
    assert 0 <= record["metrics"]["mean_per_class_accuracy"] <= 1
    names = {"vtab": ["0", "1", "2"], "fgvc": ["1", "8", "15"], "decoded": list(COLOURS)}
    assert record["labels"] == names.get(kind, sorted(COLOURS))
    assert verify(Path("out"))["agree"]
    card = Path("out/README.md").read_text()
    assert "ViTForImageClassification.from_pretrained(" in card
    assert "num_labels=3, ignore_mismatched_sizes=True)" in card


@pytest.mark.parametrize(
    ("names", "classes", "labels", "found", "expected"),
    [
        (["accuracy"], 2, [0, 1, 1, 0], [0, 1, 0, 0], {"accuracy": 0.75}),
        (["f1"], 2, [0, 1, 1, 0], [0, 1, 0, 0], {"f1": 2 / 3}),  # precision 1, recall 1/2
        (["f1"], 3, [0, 1, 2], [0, 1, 1], {"f1": (1 + 2 / 3 + 0) / 3}),
        (["matthews_correlation"], 2, [0, 1, 1, 0], [0, 1, 0, 0], {"matthews_correlation": 1 / 3**0.5}),
        (["mean_per_class_accuracy"], 2, [0, 0, 0, 1], [0, 0, 1, 1], {"mean_per_class_accuracy": (2 / 3 + 1) / 2}),
        (["mean_per_class_accuracy"], 3, [0, 0, 1], [2, 0, 1], {"mean_per_class_accuracy": 0.75}),
        (["pearson"], 1, [0.0, 1.0, 2.0], [0.0, 1.0, 4.0], {"pearson": 4 / (2 * 26 / 3) ** 0.5}),
        (["spearman"], 1, [0.0, 1.0, 2.0], [0.0, 1.0, 4.0], {"spearman": 1.0}),
        (["pearson"], 1, [0.0, 1.0, 2.0], [3.0, 3.0, 3.0], {"pearson": 0.0}),
    ],
)
def test_metrics(
    names: list[str], classes: int, labels: list[Any], found: list[Any], expected: dict[str, float]
) -> None:
    regression = classes == 1
    logits = np.array(found)[:, None] if regression else np.eye(classes)[found]
    values = metric_function(names, regression)(EvalPrediction(predictions=logits, label_ids=np.array(labels)))
    assert values == pytest.approx(expected)


def test_crop() -> None:
    image = Image.new("RGB", (32, 64))
    image.putpixel((16, 32), (255, 0, 0))
    middle = Crop((8, 8), False)(image)
    assert middle.size == (8, 8)
    assert np.asarray(middle)[3:5, 3:5, 0].any()
    torch.manual_seed(0)
    many = {Crop((8, 8), True)(image).tobytes() for _ in range(20)}
    assert len(many) > 3


def test_what_no_model_is_loaded_for(genft: Genft, roberta: Path, vit: Path, tmp_path: Path) -> None:
    pairs = _jsonl(tmp_path / "pairs.jsonl", TEXTS["pair"][0])
    many = _jsonl(tmp_path / "many.jsonl", [{"a": "x", "b": "y", "label": 0}, {"a": "x", "b": "y", "label": 1}])
    alone = _jsonl(tmp_path / "alone.jsonl", [{"text": "x", "label": 0}, {"text": "y", "label": 0}])
    holes = _jsonl(tmp_path / "holes.jsonl", [{"text": "x", "label": 0}, {"text": "y", "label": None}] * 4)
    glue = tmp_path / "glue"
    for split in ("train", "test"):
        _jsonl(glue / f"{split}.jsonl", [{**row, "label": -1 if split == "test" else 0} for row in TEXTS["pair"][0]])
    folder = _folders(tmp_path / "images", ("train",))
    (tmp_path / "list.txt").write_text("images/train/red/0.png 0\nimages/train/red/none.png 1\n")
    (tmp_path / "words.txt").write_text("images/train/red/0.png red\n")
    text, image = ("--model", roberta, "--dataset"), ("--model", vit, "--dataset")
    for arguments, message in (
        ((*text, pairs, "--glue", "mrcp"), "--glue mrcp: choose from cola, sst2"),
        ((*text, pairs, "--glue", "sst2"), "has no column sentence; it has sentence1, sentence2, label"),
        ((*text, pairs, "--label_column", "class"), "has no column class; it has"),
        ((*text, pairs, "--metrics", "pearson"), "--metrics pearson: the labels are classes; choose from accuracy"),
        ((*text, pairs, "--text_columns", "a", "b", "c"), "--text_columns a b c: expected one or two"),
        ((*text, pairs, "--max_text_length", 600), "--max_text_length 600: must be at least 1 and at most 128"),
        ((*text, pairs, "--eval_fraction", 1), "--eval_fraction 1: must be at least 0 and below 1"),
        ((*text, many), "has the columns a, b, label; name those with text by --text_columns"),
        ((*text, alone), "--label_column label: has only the label 0; expected at least two"),
        ((*text, holes), "of the training data has none"),
        ((*text, tmp_path / "no.jsonl"), "no.jsonl: no such file"),
        (("--model", roberta), "--dataset is missing"),
        ((*text, pairs, "--dataset_streaming"), "--dataset_streaming: genft classify reads the data as a whole"),
        ((*text, glue, "--glue", "rte", "--dataset_test_split", "test"), "has -1, which stands for labels"),
        ((*image, tmp_path / "list.txt"), "image 2 is missing: "),
        ((*image, tmp_path / "words.txt"), "words.txt: line 1: expected a path and a number"),
        ((*image, pairs), "--image_column path: "),
        ((*image, folder, "--dataset_train_split", "test"), "has no split test; it has train"),
        ((*image, folder / "train", "--glue", "sst2"), "--glue sst2: --model "),
        ((*image, folder / "train", "--target_modules", "query_proj"), "--target_modules query_proj: no such module"),
    ):
        done = genft("classify", *arguments, "--output", "out", "--use_cpu")
        assert done.code == 2, (arguments, done.err)
        assert message in done.err.splitlines()[-1], done.err
        assert not Path("out").exists()


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    with pytest.raises(UserError, match="expected one subfolder of images per class"):
        read_images("--dataset", str(tmp_path))
