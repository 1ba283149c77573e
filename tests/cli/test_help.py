"""What `genft` says of itself, and how soon."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from tests.cli.conftest import Genft

COMMANDS = (
    "finetune", "dpo", "grpo", "classify", "demo", "merge", "export-lora", "inspect", "generate", "score", "tune",
    "doctor",
)  # fmt: skip


@pytest.mark.parametrize("words", ["--version", "--help", "finetune --help", "classify --help", "score --help", ""])
def test_help_imports_neither_torch_nor_trl(words: str) -> None:
    code = (
        "import sys\nfrom genft_cli.main import main\n"
        f"try:\n    main({words.split()!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert time.perf_counter() - began < 5  # on a busy machine; 0.1 s on a quiet one


def test_the_version_is_that_of_the_package(genft: Genft) -> None:
    assert genft("--version").out == f"genft {version('genft')}\n"
    assert "examples:" in genft().out


def test_every_command_is_listed_and_has_help(genft: Genft, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        genft("--help")
    listed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in listed
        with contextlib.suppress(SystemExit):
            print(genft(command, "--help").out)
        assert f"usage: genft {command}" in capsys.readouterr().out


def test_all_options_come_from_the_dataclasses(genft: Genft) -> None:
    short = genft("finetune", "--help").out
    assert "one of" not in short
    assert "--checkpoint_minutes" in short
    assert "(default: 10.0)" in short
    full = genft("finetune", "--help-all", "--method", "sas").out
    for option in ("learning_rate", "packing", "load_in_4bit", "dataset_name", "r_shared", "checkpoint_minutes"):
        assert f"--{option} " in full
    assert "--lora_r " not in full
