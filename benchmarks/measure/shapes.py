"""The shapes that are measured, and what a layer of such a shape cannot do without.

A shape is x [M, K] times one or several weights [N, K] that share x; floors count the operations and bytes of
performance goals P1 to P11 (docs/benchmarks.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What a method's layer must at least do in training, in products of 2·M·N·K operations: y and dX, and for an update
# of full rank also dΔW.
PRODUCTS = {"frozen": 2, "lowrank": 2, "slices": 2, "trainable": 3, "generated": 3}


@dataclass(frozen=True)
class Shape:
    """x [m, k], one weight [n, k] for each n."""

    m: int
    n: tuple[int, ...]
    k: int

    @staticmethod
    def parse(text: str) -> Shape:
        """Reads "8192x4096x4096", M x N x K; N may be a sum, "8192x4096+1024+1024x4096". ValueError otherwise."""
        try:
            m, n, k = text.lower().split("x")
            return Shape(int(m), tuple(int(part) for part in n.split("+")), int(k))
        except ValueError:
            raise ValueError(f"shape: got {text!r}, expected MxNxK such as 8192x4096x4096") from None

    def __str__(self) -> str:
        return f"{self.m}x{'+'.join(map(str, self.n))}x{self.k}"

    @property
    def weight_elements(self) -> int:
        return sum(self.n) * self.k

    def operations(self, form: str, mode: str) -> int:
        """Operations of the floor: forward and backward for mode "step", the forward product otherwise."""
        return 2 * self.m * self.weight_elements * (PRODUCTS[form] if mode == "step" else 1)

    def bytes(self, form: str, mode: str, itemsize: int) -> int:
        """Bytes of the floor: every operand of those products read once, every result written once."""
        x, y, w = self.m * self.k, self.m * sum(self.n), self.weight_elements
        total = x + w + y
        if mode == "step":
            total += y + w + x
            if PRODUCTS[form] == 3:
                total += y + x + w
        return total * itemsize


@dataclass(frozen=True)
class Case:
    """One set-up of a layer: its shape, the adapter's rank, dtype and device."""

    shape: Shape
    r: int
    dtype: torch.dtype
    device: torch.device

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape}-r{self.r}-{DTYPE_NAMES[self.dtype]}"


def grid(rows: tuple[int, ...], weights: tuple[tuple[int, int], ...]) -> tuple[Shape, ...]:
    return tuple(Shape(m, (n,), k) for m in rows for n, k in weights)


# Llama-3-8B's layers and ViT-B/16's 768-wide ones (64 images of 197 tokens).
LLAMA_WEIGHTS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
VIT_WEIGHTS = ((768, 768), (3072, 768), (768, 3072))
LLAMA = grid((8192, 2048, 16384), LLAMA_WEIGHTS)
VIT = grid((12608,), VIT_WEIGHTS)
QKV = Shape(8192, (4096, 1024, 1024), 4096)
GATE_UP = Shape(8192, (14336, 14336), 4096)
DECODE = grid((1, 8, 64), ((4096, 4096), (14336, 4096)))
GPU_SHAPES = (*LLAMA, *VIT)

# Two CPU cores: goal P8's layer, one with fewer rows than outputs, and decode.
CPU_GOAL = Shape(2048, (1024,), 1024)
CPU_SHAPES = (CPU_GOAL, Shape(512, (2048,), 1024))
CPU_CALL = Shape(16, (16,), 16)  # no arithmetic to speak of: what a call costs
CPU_DECODE = grid((1, 8), ((1024, 1024),))
CPU_MIXED = grid((1,), ((1024, 1024), (2048, 512)))  # one sample, or several with adapters of their own
TINY = (Shape(48, (40,), 24), Shape(33, (24,), 56))
