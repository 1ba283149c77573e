"""`genft doctor` and the command's own options."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch

import genft_kernels
from genft_kernels.formulas import OPERATIONS
from tests.cli.conftest import Genft


def test_doctor(genft: Genft) -> None:
    done = genft("doctor", "--seconds", 0)
    assert done.code == 0, done.out
    for word in (version("torch"), version("peft"), "python", "device", "backend", '"algorithm"', "self-check"):
        assert word in done.out
    for name, operation in OPERATIONS.items():
        assert (name in done.out) == bool(operation.trained)
    assert "all operations are correct" in done.out


@pytest.mark.parametrize("broken", ["gradient", "output", "nan"])
def test_doctor_sees_a_wrong_operation(genft: Genft, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = genft_kernels.input_edit

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(*args, **kwargs)
        if broken == "gradient":
            return y.detach() + 1.01 * (y - y.detach())
        return y * (1.01 if broken == "output" else float("nan"))

    monkeypatch.setattr(genft_kernels, "input_edit", wrong)
    done = genft("doctor", "--seconds", 0)
    assert done.code == 1
    assert [line.split()[1] for line in done.out.splitlines() if "WRONG |" in line] == ["input_edit"] * done.out.count(
        "WRONG |"
    )
    assert "AN OPERATION IS WRONG" in done.out


def test_console_script_has_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "genft_cli", "finetune", "--dataset", "./nothing.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "genft: error: --model is missing: a local model directory, or a model on the Hub\n"
