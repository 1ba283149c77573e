"""A small Llama with a byte tokenizer, small data, and a way to run the command in this process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub.constants
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from genft_cli import main as cli
from genft_cli import plotting
from genft_cli.demo.bytes import byte_tokenizer

PROSE = "".join(
    f"Paragraph {i}: the {a} of the {b} is {i * 7 % 13}.\n\n"
    for i, (a, b) in enumerate(itertools.product(("colour", "weight", "length", "age"), ("cat", "dog", "tree", "sea")))
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Genft = Callable[..., Result]


@pytest.fixture
def genft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Genft:
    """Run `genft ARGUMENTS` in an empty directory; its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-datasets")

    # Drawing takes half of a small run's time. The demo's test draws, and tests/benchmarks/test_charts.py looks.
    monkeypatch.setattr(plotting, "loss_curves", lambda runs, path, unit: path.write_bytes(b"\x89PNG"))

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


def _save_llama(directory: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(str(directory))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer."""
    directory = tmp_path_factory.mktemp("llama")
    _save_llama(directory, 259)
    byte_tokenizer().save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def mute_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without a tokenizer."""
    directory = tmp_path_factory.mktemp("mute_llama")
    _save_llama(directory, 259)
    return directory


@pytest.fixture(scope="session")
def narrow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer of more tokens than the model has."""
    directory = tmp_path_factory.mktemp("narrow_llama")
    _save_llama(directory, 100)
    byte_tokenizer().save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 128 positions, without a head for classification."""
    directory = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=130,
    )
    RobertaForMaskedLM(config).save_pretrained(str(directory))
    byte_tokenizer().save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer for images of 16×16, without a head."""
    directory = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    ViTModel(config).save_pretrained(str(directory))
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of sixteen paragraphs."""
    path = tmp_path_factory.mktemp("data") / "prose.txt"
    path.write_text(PROSE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of texts."""
    return _jsonl(tmp_path_factory, "texts", [{"text": p} for p in PROSE.split("\n\n") if p])


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of prompts and completions."""
    rows = [
        {"prompt": p.partition(" is ")[0] + " is", "completion": p.partition(" is")[2]} for p in PROSE.split("\n\n")
    ]
    return _jsonl(tmp_path_factory, "pairs", [row for row in rows if row["completion"]])


def _jsonl(factory: pytest.TempPathFactory, name: str, rows: list[dict[str, str]]) -> Path:
    path = factory.mktemp("data") / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
