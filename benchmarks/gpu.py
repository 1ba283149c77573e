"""One command for a borrowed GPU, under nine minutes: `python -m benchmarks.gpu --out DIR`.

Gate of every kernel on this card, ceilings, the goals, then a sweep of plans for what time is left. Parts run in order
of priority; each is written to the result file when it ends, so a run that is cut off keeps what it has. Writes
    <date>-<commit>.json      everything measured (benchmarks/report.py makes the tables)
    plans-<architecture>.json the best plans, for genft_kernels/plans/<architecture>.json
`--parts` picks, `--profile MxNxK` shows where the time of one shape goes instead, and `--dry-run` goes through all
parts on a CPU with tiny shapes, kernels interpreted, to see that the command works before a card is at hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def make_parts(arguments: argparse.Namespace) -> list:
    from . import parts, shapes, sweep
    from .runner import Part

    if arguments.profile:
        shape = shapes.TINY[0] if arguments.dry_run else shapes.Shape.parse(arguments.profile)
        chosen = [name for name in arguments.contenders.split(",") if name]
        rank = 4 if arguments.dry_run else arguments.rank
        return [Part("profile", str(shape), lambda run: parts.profile(run, shape, rank, chosen), 540)]
    return [
        Part("ceilings", "a large copy, a large product", parts.ceiling, 30),
        Part("gate", "every kernel against float64", parts.gate, 180),
        Part("p9", "Python cost of a call", parts.p9, 30),
        Part("p1", "low rank over the frozen layer", parts.p1, 150),
        Part("p7", "decode", parts.p7, 40),
        Part("p3", "generated form over a trainable layer", parts.p3, 90),
        Part("p6", "a whole model's step", parts.p6, 120),
        Part("p2", "low rank over every peer", parts.p2, 120),
        Part("modes", "the whole model captured, checkpointed, decoding, compiled", parts.modes, 240),
        Part("mixed", "adapters mixed in one batch", parts.mixed, 60),
        Part("fits", "the longest sequence, the largest batch", parts.fits, 180),
        Part("sweep", "plans", sweep.sweep, 400),
        Part("p10", "swapping layers, saving", parts.p10, 60),
        Part("scaling", "time and memory as sizes grow", parts.scaling, 120),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    if "--dry-run" in (sys.argv[1:] if argv is None else argv):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    # cuBLAS repeats its results only with a workspace of fixed size; the gate holds runs to bit-equality.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from .runner import main as run

    return run(argv, "gpu", make_parts, "cuda", 8.5)


if __name__ == "__main__":
    sys.exit(main())
