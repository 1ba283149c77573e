"""Labelled images: class folders, tables of paths and labels, VTAB's lists, FGVC's mappings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from genft_cli.console import UserError, one_line
from genft_cli.tables import SUFFIXES, check_columns, read_rows

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
RESIZE = 256 / 224  # VPT's loader for FGVC: the shorter side becomes 256, of which 224 are cropped
# Files of the training and the test images in a folder: those of VTAB-1k and FGVC come first.
LISTS = (("train800val200.txt", "test.txt"), *((f"train{end}", f"test{end}") for end in (".txt", *SUFFIXES)))
Pairs = list[tuple[Path, Any]]


def read_images(
    option: str, name: str, *, root: str | None = None, column: str = "path", label: str = "label"
) -> Pairs:
    """The (file, label) pairs of a local data set.

    Args:
        option: the option that named it, for messages.
        name: a folder with one subfolder of images per class; a .txt file of lines "path label", as in VTAB-1k; a .json
            file {path: label}, as in FGVC; or a table (.csv, .tsv, .jsonl, .json, .parquet).
        root: where relative paths begin; default: the folder of the file.
        column, label: columns of a table.

    Raises:
        UserError: there is no such file or folder, it has another format, or an image is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(option, path)
    if not path.is_file():
        raise UserError(f"{option} {name}: no such file or folder")
    base = Path(root).expanduser() if root else path.parent
    if path.suffix == ".txt":
        pairs = _list(option, path)
    elif path.suffix in SUFFIXES:
        pairs = _mapping(path) or _table(option, name, column, label)
    else:
        raise UserError(f"{option} {name}: expected a folder, .txt or a file ending in {', '.join(SUFFIXES)}")
    found = [(base / image, value) for image, value in pairs]
    for number, (image, _) in enumerate(found, 1):
        if not image.is_file():
            raise UserError(f"{option} {name}: image {number} is missing: {image}; see --image_root")
    return found


def is_image_folder(path: Path) -> bool:
    """Whether a folder has subfolders with images, which are classes, or splits of classes."""
    return any(
        _is_image(image) or (image.is_dir() and any(map(_is_image, image.iterdir())))
        for part in _folders(path)
        for image in part.iterdir()
    )


def lists(path: Path) -> tuple[Path, Path] | None:
    """The files in a folder that list its training and test images; None if there are none."""
    found = ((path / train, path / test) for train, test in LISTS)
    return next((pair for pair in found if pair[0].is_file() and pair[1].is_file()), None)


def splits(path: Path) -> list[str]:
    """The splits of an image folder: subfolders that have class folders, such as train and test."""
    return [part.name for part in _folders(path) if is_image_folder(part)]


def _folders(path: Path) -> list[Path]:
    return sorted(part for part in path.iterdir() if part.is_dir())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _folder(option: str, path: Path) -> Pairs:
    pairs = [(image, part.name) for part in _folders(path) for image in sorted(part.iterdir()) if _is_image(image)]
    if not pairs:
        raise UserError(f"{option} {path}: expected one subfolder of images per class; endings: {' '.join(ENDINGS)}")
    return pairs


def _list(option: str, path: Path) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            words = line.strip().rsplit(maxsplit=1)
            if len(words) != 2 or not words[1].removeprefix("-").isdecimal():
                raise UserError(f"{option} {path}: line {number}: expected a path and a number, such as images/1.jpg 7")
            pairs.append((words[0], int(words[1])))
    if not pairs:
        raise UserError(f"{option} {path}: has no lines")
    return pairs


def _mapping(path: Path) -> list[tuple[str, Any]]:
    """The pairs of a .json file {path: label}; none if it is something else."""
    if path.suffix != ".json":
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    return list(found.items()) if isinstance(found, dict) else []


def _table(option: str, name: str, column: str, label: str) -> list[tuple[str, Any]]:
    rows = read_rows(option, name)
    check_columns("--image_column", name, rows, column, name)
    check_columns("--label_column", name, rows, label, name)
    return [(str(row[column]), row[label]) for row in rows]


def open_image(source: Any) -> Any:
    """An RGB image from a file, or from an image that is already decoded. Raises UserError if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        return (Image.open(source) if isinstance(source, Path) else source).convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise UserError(f"--dataset: {source} cannot be read as an image ({one_line(error)[:200]})") from None


class Images(Dataset[dict[str, Any]]):
    """Images and class numbers as the model's inputs. Images are read when they are needed.

    Args:
        sources: files, or decoded images.
        labels: class numbers.
        processor: transformers' image processor of the model.
        change: applied to each image before the processor.
    """

    def __init__(
        self, sources: Sequence[Any], labels: Sequence[int], processor: Any, change: Callable[[Any], Any] | None
    ) -> None:
        self.sources, self.labels, self.processor, self.change = sources, labels, processor, change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = open_image(self.sources[index])
        if self.change is not None:
            image = self.change(image)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[index]}


class Crop:
    """VPT's crops for FGVC: the shorter side is resized to 256 for a crop of 224. In training the crop is random, and
    mirrored at random; in evaluation it is central.

    Args:
        size: (height, width) of the crop.
    """

    def __init__(self, size: tuple[int, int], training: bool) -> None:
        self.size, self.training = size, training

    def __call__(self, image: Any) -> Any:
        from PIL import Image

        height, width = self.size
        scale = RESIZE * max(height / image.height, width / image.width)
        resized = image.resize(
            (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
            Image.Resampling.BILINEAR,
        )
        left, top = (self._start(room) for room in (resized.width - width, resized.height - height))
        cropped = resized.crop((left, top, left + width, top + height))
        if self.training and torch.rand(()) < 0.5:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return cropped

    def _start(self, room: int) -> int:
        return int(torch.randint(room + 1, ())) if self.training else room // 2


def size_of(processor: Any) -> tuple[int, int]:
    """The (height, width) of the images that the processor makes. Raises UserError if it has none."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else processor.size
    if size and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    raise UserError("--crop: the model's image processor has no height and width")


def classes(values: Iterable[Any]) -> list[Any]:
    """The distinct labels: numbers in their order, else texts in theirs."""
    distinct = set(values)
    try:
        return sorted(distinct, key=int)
    except (TypeError, ValueError):
        return sorted(distinct, key=str)
