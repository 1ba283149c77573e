"""The tests' device, set up before Triton is imported: without a GPU, Triton interprets the kernels on CPU tensors."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: F401 - its own functions are interpreted or compiled as the variable says when it is imported

from tests.support import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.lighten()


def seed(number: int) -> None:
    """torch.manual_seed, which formats the stack of its caller for each kind of device that was not used yet."""
    (torch.default_generator if DEVICE == "cpu" else torch).manual_seed(number)
