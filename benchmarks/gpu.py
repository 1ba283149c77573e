"""A borrowed GPU in three commands, each of at most 8.6 minutes, start-up included:

    python -m benchmarks.gpu plans    memcheck, ceilings, gate, then the sweep: plans for this card. Commit them.
    python -m benchmarks.gpu goals    on those plans: P6's core, P1, P7, P9, N1, and where the time of a step goes
    python -m benchmarks.gpu rest     P3 and P4, P2, a sweep of what missed its goal, then whatever time is left for

Parts run in order of priority. What was measured is in the result file when it is measured, so a run that is cut off
keeps what it has; nothing is begun that took longer the last time than there is time left. Writes into --out
    <date>-<commit>.json      everything measured (`python -m benchmarks.report` makes the tables)
    plans-<architecture>.json the best plans, for genft_kernels/plans/<architecture>.json
`--parts` picks parts of any stage, `--profile MxNxK` shows where the time of one shape goes instead, and `--dry-run`
goes through a stage on a CPU with tiny shapes, kernels interpreted, to see that the command works before a card is at
hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure.part import Part
    from benchmarks.measure.results import Run

STAGES = {
    "plans": "memcheck, ceilings, gate, sweep: the plans of this card, to be committed",
    "goals": "on those plans: P6's core, P1, P7, P9, N1, profiles",
    "rest": "P3, P4, P2, a sweep of what missed its goal, whole models",
}


def make_parts(arguments: argparse.Namespace) -> list[Part]:
    from benchmarks import memcheck
    from benchmarks.measure.part import Part
    from benchmarks.suites import parts, profiles, sweep

    if arguments.profile:
        return [profiles.part(arguments)]
    # Seconds: the most a part may take, and what its first figure needs.
    ceilings = Part("ceilings", "a large copy, a large product", parts.ceiling, 20)
    stages = {
        "plans": [
            Part("memcheck", "compute-sanitizer over a few operations", memcheck.memcheck, 60),
            ceilings,
            Part("gate", "every kernel against float64", parts.gate, 170, 20),
            Part("sweep", "plans", sweep.sweep, 500, 30),
        ],
        "goals": [
            ceilings,
            Part("p6core", "a whole model's step: frozen, WeGeFT, peft LoRA", parts.p6core, 140, 50),
            Part("p1", "low rank over the frozen layer", parts.p1, 170, 20),
            Part("p7", "decode", parts.p7, 50, 10),
            Part("p9", "Python cost of a call", parts.p9, 25, 5),
            Part("n1", "what bf16 answers to small updates", parts.n1, 25, 5),
            Part("profiles", "where the time of a step goes", profiles.headline, 45, 10),
        ],
        "rest": [
            ceilings,
            Part("p3", "generated form over a trainable layer, time and memory", parts.p3, 190, 20),
            Part("p2", "low rank over peers", parts.p2, 70, 15),
            Part("again", "plans of what missed its goal", parts.again, 120, 20),
            Part("p6", "every method in a whole model", parts.p6, 150, 60),
            Part("modes", "the whole model captured, checkpointed, decoding, compiled", parts.modes, 240, 60),
            Part("mixed", "adapters mixed in one batch", parts.mixed, 60, 20),
            Part("fits", "the longest sequence, the largest batch", parts.fits, 180, 60),
            Part("scaling", "time and memory as sizes grow", parts.scaling, 120, 20),
        ],
    }
    if arguments.stage:
        return stages[arguments.stage]
    return list({part.name: part for listed in stages.values() for part in listed}.values())


def commit_plans(run: Run, arguments: argparse.Namespace) -> str:
    """The commands that make the sweep's plans those of the package."""
    if run.folder is None or not run.data["sweep"]:
        return ""
    log = run.data["run"]
    architecture = log["device"].get("architecture", "cpu")
    target = f"genft_kernels/plans/{architecture}.json"
    return "\n".join(
        (
            "before the next stage:",
            f"  cp {run.folder / f'plans-{architecture}.json'} {target}",
            f"  git add {target} benchmarks/results",
            f'  git commit -m "Plans of {log["device"]["name"]}, measured at {log["commit"]}"',
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    if "--dry-run" in (sys.argv[1:] if argv is None else argv):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    # cuBLAS repeats its results only with a workspace of fixed size; the gate holds runs to bit-equality.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from benchmarks.runner import main as run

    return run(argv, "gpu", make_parts, "cuda", 8.3, STAGES, commit_plans)


if __name__ == "__main__":
    sys.exit(main())
