"""Settings for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.forks import Forks

if TYPE_CHECKING:
    import torch

os.environ["GENFT_CACHE"] = os.devnull  # plans that were measured on this machine are no business of the tests

# What takes longest begins first, so that no process waits for another at the end.
LONG = ("test_cross_compile", "tests/benchmarks", "tests/cli", "test_long_sums")
# Before all, and in one worker, so that one process is started for `forks`.
FORKS = ("tests/distributed", "test_resume", "two_writers", "pytest_benchmarks")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from tests.support import device  # noqa: F401 - before any test is; who only hands them out imports no torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="run N cases of each campaign instead of a few")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def within(names: tuple[str, ...], item: pytest.Item) -> int:
        """The place of the first that names the item, or behind all."""
        return next((place for place, name in enumerate(names) if name in item.nodeid), len(names))

    first = sorted((item for item in items if within(FORKS, item) < len(FORKS)), key=lambda item: within(FORKS, item))
    others = [item for item in items if within(FORKS, item) == len(FORKS)]
    long = [item for item in others if within(LONG, item) < len(LONG)]
    rest = [item for item in others if within(LONG, item) == len(LONG)]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # each begins with a part of the list
    cuts = [len(rest) * worker // workers for worker in range(workers + 1)]
    items[:] = first + [
        item for worker in range(workers) for item in (*long[worker::workers], *rest[cuts[worker] : cuts[worker + 1]])
    ]


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: collections need not look at it


@pytest.fixture(scope="session")
def device() -> torch.device:
    import torch

    from tests.support.device import DEVICE

    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs modules in forks of one process."""
    started = Forks()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    from tests.support import device

    device.seed(0)


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
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
