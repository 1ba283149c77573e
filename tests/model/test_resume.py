"""Resuming is bit-exact on the CPU: a run that was killed at a random step and resumed ends as one that was not."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tests.support.killed_training import METHODS, SAVE_EVERY, STEPS


def assert_same(found, wanted, at: str) -> None:
    """Nested dicts and lists of tensors and numbers, bit for bit."""
    assert type(found) is type(wanted), at
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), at
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), at
        for key, value in wanted.items():
            assert_same(found[key], value, f"{at}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted), at
        for index, value in enumerate(wanted):
            assert_same(found[index], value, f"{at}.{index}")
    else:
        assert found == wanted, at


def test_resuming_is_bit_exact(tmp_path, pytestconfig, forks):
    """`--fuzz N`: N kills."""
    kills = pytestconfig.getoption("fuzz") or len(METHODS)
    done = forks.run("tests.support.killed_training", tmp_path, kills)
    assert done.returncode == 0, done.stderr[-3000:]
    compared = 0
    for case in METHODS:
        whole = tmp_path / case / "whole" / f"checkpoint-{STEPS}"
        start = load_file(tmp_path / case / "whole" / f"checkpoint-{SAVE_EVERY}" / "adapter_model.safetensors")
        wanted = load_file(whole / "adapter_model.safetensors")
        trained = {name for name, tensor in wanted.items() if tensor.is_floating_point()}  # the others are indices
        assert trained
        assert not any(torch.equal(start[name], wanted[name]) for name in trained)
        for killed in (tmp_path / case).glob("*, killed in step *"):
            resumed, at = killed / f"checkpoint-{STEPS}", f"{case} {killed.name}"
            assert_same(load_file(resumed / "adapter_model.safetensors"), wanted, f"{at}: parameters")
            for name in ("optimizer.pt", "scheduler.pt"):
                state = torch.load(whole / name, weights_only=True)
                assert state
                assert_same(torch.load(resumed / name, weights_only=True), state, f"{at}: {name}")
            compared += 1
    assert compared == kills
