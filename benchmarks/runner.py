"""What `python -m benchmarks.gpu` and `.cpu` share: parts in order of priority, a time budget, a short table last."""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import goals, results
from .comparison import Record
from .results import Run


class OutOfTime(BaseException):
    """The budget of a part, or of the run, is spent. Not an Exception: nothing on the way may swallow it."""


@dataclass(frozen=True)
class Part:
    """A part of a run: `seconds` is the most it may take, and it is not begun with less than a tenth of that left."""

    name: str
    what: str
    run: Callable[[Run], None]
    seconds: float


def add(run: Run, records: Iterable[Record]) -> None:
    """Takes in a comparison and prints a line for each of its records."""
    records = list(records)
    run.put(records)
    for record in records:
        print("  " + line(record), flush=True)


def line(record: Record) -> str:
    """A record in one line."""
    if "model" in record:
        where = f"{record['model']['name']} {record['model']['layers']} layers"
    else:
        where = f"{record['m']}x{'+'.join(map(str, record['n']))}x{record['k']} r{record['r']} {record['dtype']}"
    text = f"{record['mode']:8} {where:34} {record['contender']:26} "
    if "largest" in record:
        return text + str(record["largest"])
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


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block once `seconds` have passed."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def execute(run: Run, parts: Sequence[Part]) -> None:
    """Runs the parts while time is left. What a part has measured when it is cut off is kept."""
    log = run.data["run"]
    for part in parts:
        if run.left() < part.seconds / 10:
            log["left_out"][part.name] = f"{max(0.0, run.left()):.0f} s left, may need {part.seconds:.0f} s"
            continue
        print(f"{part.name}: {part.what}", flush=True)
        start = time.monotonic()
        try:
            with limited(min(part.seconds, run.left())):
                part.run(run)
        except OutOfTime:
            log["left_out"][part.name] = f"cut off after {time.monotonic() - start:.0f} s"
        except Exception as error:  # the other parts still have something to say
            log["left_out"][part.name] = f"{type(error).__name__}: {error}"[:400]
            print(f"  {log['left_out'][part.name]}", flush=True)
        log["parts"].append({"name": part.name, "seconds": round(time.monotonic() - start, 1)})
        run.flush()
    run.flush()


def summary(run: Run) -> str:
    """The short table: gate, ceilings, goals, what was left out."""
    log, gate, ceilings = run.data["run"], run.data["gate"], run.data["ceilings"]
    lines = ["", f"{log['device']['name']} · torch {log['torch']} · triton {log['triton']} · {log['commit']}"]
    if gate:
        lines.append(f"gate: {gate['checks'] - len(gate['failed'])} of {gate['checks']} green")
        lines += [
            f"  RED {failed['what']}: {failed.get('error', failed.get('worst'))}" for failed in gate["failed"][:8]
        ]
    if ceilings:
        products = ", ".join(f"{name} {value:g}" for name, value in ceilings["product_tflops"].items())
        lines.append(f"ceilings: copy {ceilings['copy_gb_per_s']:g} GB/s, product TFLOP/s {products}")
    for goal, findings in goals.table(run.records, log["device"]["type"]):
        for finding in findings:
            sign = "≥" if finding.least else "≤"
            verdict = "met" if finding.met else "MISSED"
            lines.append(
                f"{goal.id:4}{finding.what:48} {finding.value:8.3f}{finding.unit} "
                f"{sign} {finding.limit:g}  {verdict}  {finding.note}"
            )
    won: dict[str, int] = {}
    for entry in run.data["sweep"]:
        won[entry["best"]["algorithm"]] = won.get(entry["best"]["algorithm"], 0) + 1
    if won:
        lines.append("sweep won by " + ", ".join(f"{name} {count}" for name, count in sorted(won.items())))
    lines += [f"left out: {name}: {reason}" for name, reason in log["left_out"].items()]
    if run.path is not None:
        lines.append(f"results: {run.path.name}")
    return "\n".join(lines)


def main(
    argv: Sequence[str] | None,
    program: str,
    make_parts: Callable[[argparse.Namespace], Sequence[Part]],
    device_type: str,
    minutes: float,
) -> int:
    """The command line. `make_parts` returns all parts, in order of priority."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=__doc__)
    parser.add_argument("--parts", default="", help="which, comma-separated; all by default")
    parser.add_argument("--minutes", type=float, default=minutes, help="time budget (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for result files (benchmarks/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: a check of the command itself")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    parser.add_argument("--workers", type=int, default=-1, help="processes for gate and compilation (half the cores)")
    parser.add_argument("--commit", default="", help="commit of a checkout without .git")
    parser.add_argument("--profile", default="", metavar="MxNxK", help="only: where the time of this shape goes")
    parser.add_argument("--contenders", default="", help="with --profile: which, comma-separated")
    parser.add_argument("--rank", type=int, default=16, help="with --profile: the adapter's rank")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    gpu = device_type == "cuda" and not arguments.dry_run
    if gpu and not torch.cuda.is_available():
        parser.exit(3, "no GPU here: nothing measured. --dry-run checks the command on the CPU.\n")
    device = torch.device("cuda" if gpu else "cpu")
    workers = arguments.workers if arguments.workers >= 0 else (multiprocessing.cpu_count() // 2 if gpu else 0)
    out = arguments.out
    if out is None and not arguments.dry_run:
        out = results.FOLDER / results.slug(results.describe(device))
    run = Run(device, out, minutes=arguments.minutes, label=arguments.commit, tiny=arguments.dry_run, workers=workers)
    parts = make_parts(arguments)
    chosen = [name for name in arguments.parts.split(",") if name]
    unknown = set(chosen) - {part.name for part in parts}
    if unknown:
        parser.error(f"--parts: unknown {sorted(unknown)}, expected some of {[part.name for part in parts]}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        execute(run, [part for part in parts if not chosen or part.name in chosen])
    finally:
        run.flush()
        print(summary(run), flush=True)
    return 1 if run.data["gate"].get("failed") else 0
