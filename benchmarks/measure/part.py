"""A part of a run and what it uses: records are shown as they come, and work is spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure.results import Record, Run


@dataclass(frozen=True)
class Part:
    """A part of a run: `seconds` is the most it may take, `least` what its first figure needs (a tenth of that): with
    less left it is not begun."""

    name: str
    what: str
    run: Callable[[Run], None]
    seconds: float
    least: float = 0.0

    @property
    def needs(self) -> float:
        return self.least or self.seconds / 10


def show(records: Iterable[Record]) -> None:
    """Prints a line for each record."""
    for record in records:
        print("  " + line(record), flush=True)


def add(run: Run, records: Sequence[Record]) -> None:
    """Takes in a whole comparison, and shows it."""
    run.put(records)
    show(records)


def line(record: Record) -> str:
    """A record in one line."""
    if "model" in record:
        where = f"{record['model']['name']} {record['model']['layers']} layers"
    else:
        where = f"{record['m']}x{'+'.join(map(str, record['n']))}x{record['k']} r{record['r']} {record['dtype']}"
    text = f"{record['mode']:8} {where:34} {record['contender']:26} "
    if "largest" in record:
        return text + str(record["largest"])
    if "gains" in record:
        return text + ", ".join(f"{at}: y {gain['y']:.3f}, dX {gain['dx']:.3f}" for at, gain in record["gains"].items())
    if "ms" not in record:
        return text + f"withheld: {record.get('withheld', '')}"
    text += f"{record['ms']['median']:10.4f} ms"
    if "ratio" in record:
        text += f" {record['ratio']['median']:7.3f} x frozen [{record['ratio']['q1']:.3f}, {record['ratio']['q3']:.3f}]"
    if "percent_of_product" in record:
        text += f" {record['percent_of_product']:5.1f} %"
    if "memory" in record:
        text += f" peak {record['memory']['peak'] / 2**20:.1f} MiB"
    return text


def spread(function: Callable[..., Any], items: Sequence[Any], run: Run) -> Iterator[tuple[Any, Any]]:
    """(item, function(item, device)) for every item, in worker processes where the run has them: kernels compile in
    parallel, and one that kills its process does not kill the run. An exception is returned in place of a result."""
    if run.workers < 2:
        for item in items:
            yield item, attempt(function, item, run.device)
        return
    pool = ProcessPoolExecutor(run.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        futures = {pool.submit(attempt, function, item, run.device): item for item in items}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else error
    finally:
        # A worker may sit in a kernel that never ends: do not wait for it.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def attempt(function: Callable[..., Any], item: Any, device: torch.device) -> Any:
    """function(item, device), or what went wrong as an exception that travels between processes."""
    try:
        return function(item, device)
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}"[:400])
