"""Settings for all tests. Without a GPU, Triton interprets the kernels on CPU tensors; on a GPU it compiles them."""

from __future__ import annotations

import gc
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["GENFT_CACHE"] = os.devnull  # plans that were measured on this machine are no business of the tests

from collections.abc import Iterator
from pathlib import Path

import pytest
import triton  # noqa: F401 - its own functions are interpreted or compiled as the variable says when it is imported

from tests.support import interpreter
from tests.support.forks import Forks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.lighten()


# What takes longest begins first, so that no process waits for another at the end.
LONG = ("test_cross_compile", "tests/benchmarks", "tests/cli", "test_long_sums")
FORKS = ("tests/distributed", "test_resume", "two_writers")  # before all, in one worker, which then has one `forks`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="run N cases of each campaign instead of a few")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first: list[pytest.Item] = []
    long: list[pytest.Item] = []
    rest: list[pytest.Item] = []
    for item in items:
        named = [any(name in item.nodeid for name in names) for names in (FORKS, LONG)]
        (first if named[0] else long if named[1] else rest).append(item)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # each begins with a part of the list
    cuts = [len(rest) * worker // workers for worker in range(workers + 1)]
    items[:] = first + [
        item for worker in range(workers) for item in (*long[worker::workers], *rest[cuts[worker] : cuts[worker + 1]])
    ]


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: collections need not look at it


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs modules in forks of one process."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for tables of measured plans, which this process reads."""
    from genft_kernels import plan

    monkeypatch.setenv("GENFT_CACHE", str(tmp_path / "cache"))
    cached = (plan.choose_plan, plan.plan_table, plan.resolve)
    for function in cached:
        function.cache_clear()
    yield plan.user_tables()
    for function in cached:
        function.cache_clear()


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN: a tile that a kernel forgot to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
