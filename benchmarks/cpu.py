"""What a CPU can say: goals P8 to P11, P5 and N1, the layer's grid, a block, a small model, scaling curves.

`python -m benchmarks.cpu --threads 2` takes about fifteen minutes on two cores; `--parts p8` alone about two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.measure.part import Part
from benchmarks.runner import main as run
from benchmarks.suites import parts, profiles


def make_parts(arguments: argparse.Namespace) -> list[Part]:
    if arguments.profile:
        return [profiles.part(arguments)]
    return [
        Part("ceilings", "a large copy, a large product", parts.ceiling, 30),
        Part("gate", "every operation against float64", parts.gate, 120),
        Part("p8", "every contender on one layer", parts.p8, 300),
        Part("p10", "swapping layers, saving", parts.p10, 90),
        Part("p9", "Python cost of a call", parts.p9, 60),
        Part("n1", "what bf16 answers to small updates", parts.n1, 60),
        Part("layer", "other shapes, forward alone", parts.layer, 200),
        Part("p7", "decode", parts.p7, 60),
        Part("mixed", "adapters mixed in one batch", parts.mixed, 420, 20),
        Part("p6", "a small model's step, a block", parts.p6, 150),
        Part("scaling", "time and memory as sizes grow", parts.scaling, 400),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return run(argv, "cpu", make_parts, "cpu", 20.0)


if __name__ == "__main__":
    sys.exit(main())
