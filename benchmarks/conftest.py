"""`pytest benchmarks` measures (the tests of the project run with --benchmark-skip); ratios to the floor come last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import results
from benchmarks.measure.part import line
from benchmarks.measure.replay import Board
from benchmarks.measure.timing import ceilings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for a result file of this session")


def pytest_configure(config: pytest.Config) -> None:
    # pytest-benchmark reads these when it configures itself, which is after every conftest.
    config.option.benchmark_skip = False
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    config.option.benchmark_sort = "median"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def session_run(device: torch.device, request: pytest.FixtureRequest) -> results.Run:
    run = results.Run(device, request.config.getoption("--results"))
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    run.data["ceilings"] = ceilings(device, dtypes)
    request.config.stash[_RUN] = run
    return run


@pytest.fixture(scope="session")
def board(request: pytest.FixtureRequest) -> Board:
    return request.config.stash[_BOARD]


_BOARD: pytest.StashKey[Board] = pytest.StashKey()
_RUN: pytest.StashKey[results.Run] = pytest.StashKey()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes which contenders of each comparison are left after -k and the like."""
    board = session.config.stash[_BOARD] = Board()
    for item in session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "contender" in parameters and "group" in parameters:
            board.select(parameters["group"], parameters["contender"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(_RUN, None)
    if run is not None:
        run.data["records"] = session.config.stash[_BOARD].records
        run.flush()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    board = terminalreporter.config.stash.get(_BOARD, None)
    if board and board.records:
        terminalreporter.section("interleaved, over the frozen layer")
        for record in board.records:
            terminalreporter.write_line(line(record))
