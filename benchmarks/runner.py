"""What `python -m benchmarks.gpu` and `.cpu` share: parts in order of priority, a time budget, a short table last."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import STARTED
from benchmarks.measure import results
from benchmarks.measure.part import Part
from benchmarks.measure.results import Run
from benchmarks.report import goals


class OutOfTime(BaseException):
    """The budget of a part, or of the run, is spent. Not an Exception: nothing on the way may swallow it."""


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
        run.part, run.until = part.name, run.deadline
        if run.left() < part.needs:
            run.leave_out(part.name, f"{max(0.0, run.left()):.0f} s left, needs {part.needs:.0f} s")
            continue
        print(f"{part.name}: {part.what}", flush=True)
        start = time.monotonic()
        run.until = min(run.deadline, start + part.seconds)
        try:
            with limited(run.left()):
                part.run(run)
        except OutOfTime:
            run.leave_out(part.name, f"cut off after {time.monotonic() - start:.0f} s")
        except Exception as error:  # the other parts still have something to say
            run.leave_out(part.name, f"{type(error).__name__}: {error}"[:400])
        run.until = run.deadline
        log["parts"].append({"name": part.name, "seconds": round(time.monotonic() - start, 1)})
        run.flush()
    run.flush()


@contextmanager
def ended_after(seconds: float, run: Run) -> Iterator[None]:
    """Ends the process, its file written, `seconds` from now: a kernel that never returns cannot be interrupted."""

    def end() -> None:
        run.leave_out(run.part, "did not return when its time was over")
        run.flush()
        print(summary(run), flush=True)
        os._exit(124)

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def summary(run: Run) -> str:
    """The short table: gate, ceilings, goals, what was left out."""
    log, gate, ceilings = run.data["run"], run.data["gate"], run.data["ceilings"]
    lines = ["", versions(run)]
    if run.data["memcheck"]:
        lines.append(f"memcheck: {run.data['memcheck']['result']}")
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
    for slow in run.data["slow_kernels"]:
        lines.append(
            f"slow: {slow['kernel']} at {slow['shape']} r{slow['r']} in {slow['contender']}: {slow['us']:g} µs, "
            f"{slow['times']:g} x its bytes over the copy ceiling"
        )
    lines += [f"left out: {name}: {reason}" for name, reason in log["left_out"].items()]
    if run.path is not None:
        lines.append(f"results: {run.path.name}")
    return "\n".join(lines)


def versions(run: Run) -> str:
    """What is measured, with what, on what."""
    log = run.data["run"]
    words = [log["device"]["name"], *(f"{name} {log[name]}" for name in ("torch", "triton", "cuda", "peft", "python"))]
    return " · ".join([*words, f"driver {log['device']['driver']}", log["commit"]])


GRACE = 12.0  # seconds between the end of a run's time and of its process


def main(
    argv: Sequence[str] | None,
    program: str,
    make_parts: Callable[[argparse.Namespace], Sequence[Part]],
    device_type: str,
    minutes: float,
    stages: Mapping[str, str] | None = None,
    last: Callable[[Run, argparse.Namespace], str] | None = None,
) -> int:
    """The command line. `make_parts` returns all parts, in order of priority; `stages` are the words that the command
    may begin with and what they mean: one of them, or --parts, is then needed. `last`: what to print in the end."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}",
        description=sys.modules[make_parts.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if stages:
        parser.add_argument("stage", nargs="?", choices=list(stages), help="what to measure")
    parser.add_argument("--parts", default="", help="which, comma-separated; all by default")
    parser.add_argument("--minutes", type=float, default=minutes, help="time budget, start-up included (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for result files (benchmarks/results/<device>)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: a check of the command itself")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch")
    parser.add_argument("--workers", type=int, default=-1, help="processes for gate and compilation (half the cores)")
    parser.add_argument("--commit", default="", help="commit of a checkout without .git")
    parser.add_argument("--profile", default="", metavar="MxNxK", help="only: where the time of this shape goes")
    parser.add_argument("--contenders", default="", help="with --profile: which, comma-separated")
    parser.add_argument("--rank", type=int, default=16, help="with --profile: the adapter's rank")
    arguments = parser.parse_args(argv)
    if stages and not (arguments.stage or arguments.parts or arguments.profile):
        listed = "\n".join(f"  {name:6} {words}" for name, words in stages.items())
        parser.exit(2, f"{parser.format_usage()}say which stage, in this order, or --parts:\n{listed}\n")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    gpu = device_type == "cuda" and not arguments.dry_run
    if gpu and not torch.cuda.is_available():
        parser.exit(3, "no GPU here: nothing measured. --dry-run checks the command on the CPU.\n")
    device = torch.device("cuda" if gpu else "cpu")
    workers = arguments.workers if arguments.workers >= 0 else (multiprocessing.cpu_count() // 2 if gpu else 0)
    if arguments.out is None and not arguments.dry_run:
        arguments.out = results.FOLDER / results.slug(results.describe(device))
    left = arguments.minutes - (time.monotonic() - STARTED) / 60
    run = Run(device, arguments.out, minutes=left, label=arguments.commit, tiny=arguments.dry_run, workers=workers)
    parts = make_parts(arguments)
    chosen = [name for name in arguments.parts.split(",") if name]
    unknown = set(chosen) - {part.name for part in parts}
    if unknown:
        parser.error(f"--parts: unknown {sorted(unknown)}, expected some of {[part.name for part in parts]}")
    print(versions(run), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with ended_after(run.left() + GRACE, run):
            execute(run, [part for part in parts if not chosen or part.name in chosen])
    finally:
        run.flush()
        print(summary(run), flush=True)
    if last is not None:
        print(last(run, arguments), flush=True)
    return 1 if run.data["gate"].get("failed") or run.data["memcheck"].get("errors") else 0
