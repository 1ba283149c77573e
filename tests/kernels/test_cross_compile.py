"""Every kernel of every plan compiles for GPUs that are not here: no spills, shared memory that fits, wgmma on Hopper.

On sm_90 each plan at the largest rank that it serves, elsewhere the backward of each algorithm once; everything with
GENFT_ALL_RANKS=1, as in `make test-all`.

In a process of its own, for there the kernels must not be interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cross_compile import inner_loop

ROOT = Path(__file__).parents[2]
RANKS = [] if os.environ.get("GENFT_ALL_RANKS") else ["--widest"]  # `make test-all` compiles for every rank


@pytest.mark.parametrize("targets", [["sm_90"], ["sm_80", "sm_100", "gfx942"]], ids="-".join)
def test_every_plan_compiles_within_limits(targets):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cross_compile", *RANKS, *targets],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    printed = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*(line for line in printed if line.startswith("BAD")), done.stderr[-2000:]])
    for target in targets:
        everything_is_there(target, [line for line in printed if line.split()[1] == target])


def everything_is_there(target: str, lines: list[str]) -> None:
    kernels = (
        "_project",
        "_reduce",
        "_update",
        "_sum",
        "_rescale",
        "_column_sums",
        "_single_few",
        "_product",
        "_grouped",
        "_grouped_reduce",
        "_generated_product",
        "_contract",
        "_fold",
        "_panel",
    )
    for kernel in kernels:
        assert any(f" {kernel}_kernel " in line for line in lines), f"nothing compiled {kernel}_kernel for {target}"
    if target == "sm_90":
        assert any(" _single_kernel " in line for line in lines)
        products = [
            line for line in lines if ("_product_kernel " in line or "_single_kernel" in line) and "bfloat16" in line
        ]
        assert products
        assert all(" wgmma " in line for line in products), products


def test_the_inner_loop_is_found_and_counted():
    sass = """
        /*0000*/                   LDG.E R0, [R2] ;
        /*0010*/                   MUFU.EX2 R1, R0 ;
        /*0020*/                   LDGSTS.E [R4], [R2] ;
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/              @!P0 FFMA R1, R1, R1, R1 ;
        /*0050*/                   NOP;
        /*0060*/               @P1 BRA 0x20 ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
    """
    found = {kind: count for kind, count in inner_loop(sass).items() if count}
    assert found == {"tensor": 1, "copies to shared": 1, "fp32": 1, "integers and flow": 1}
    assert sum(inner_loop(sass.replace("BRA", "RET")).values()) == 8, "nothing loops: all of it"
