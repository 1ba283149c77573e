"""What travels between processes in one training step of a Llama-3-8B, by the laws that the distributed contract counts
(tests/distributed/contract.py), and a model of the time that it takes: docs/distributed.md and its chart.

`python -m benchmarks.distributed`. No figure here is measured: bytes follow from the sizes of the model and of the
adapter, times from the bandwidths and the speed in `MACHINE`, and nothing is assumed to overlap.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from benchmarks.measure.results import ROOT
from benchmarks.report import text
from benchmarks.report.drawing import canvas, save
from benchmarks.subjects.models import LLAMA3_8B
from genft_cli.palette import LOOKS, name_ends
from genft_modules import FusedGenLinear, GeneratorConfig, GenFTConfig, LoRAConfig, WeGeFTConfig

DOCS = ROOT / "docs"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = 8192  # of each GPU in a step
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
METHODS: dict[str, Callable[[], GeneratorConfig]] = {
    "WeGeFT r = 64": lambda: WeGeFTConfig(r=64, wegeft_alpha=128, target_modules=PAPER),
    "LoRA r = 64": lambda: LoRAConfig(r=64, target_modules=PAPER),
    "GenFT gelu 4 + 4, q and v": lambda: GenFTConfig(
        generator_share_dim=4,
        individual_features=4,
        inner_activation="gelu",
        outer_activation="gelu",
        target_modules=["q_proj", "v_proj"],
    ),
}
DRAWN = {  # as which method a curve of the chart looks
    "WeGeFT r = 64": "wegeft",
    "LoRA r = 64": "lora",
    "GenFT gelu 4 + 4, q and v": "genft-gelu",
    "every weight": "full",
}
ROWWISE = ("o_proj", "down_proj")  # cut along K in every Llama plan; the others along N


@dataclass(frozen=True)
class Machine:
    """Per GPU: bytes per second to the next one in its node and between nodes, seconds per message, FLOP per second."""

    node: int = 8
    inside: float = 300e9
    between: float = 40e9
    latency: float = 10e-6
    speed: float = 0.4 * 790e12

    def bandwidth(self, gpus: int) -> float:
        return self.inside if gpus <= self.node else self.between

    def all_reduce(self, size: float, messages: int, gpus: int) -> float:
        """Seconds of a ring that carries `size` bytes in `messages` collectives, each of a logarithmic latency."""
        steps = 2 * math.ceil(math.log2(gpus))
        return 2 * (gpus - 1) / gpus * size / self.bandwidth(gpus) + messages * steps * self.latency

    def gather(self, size: float, messages: int, gpus: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes in all."""
        return self.all_reduce(size, messages, gpus) / 2


MACHINE = Machine()


@dataclass(frozen=True)
class Traffic:
    """Of an adapter in one step: bytes of float32 gradients, how many tensors they are in, the part of it that lives in
    blocks, and what of W0 goes between the processes of tensor parallelism: collectives and bytes."""

    gradients: int
    tensors: int
    in_blocks: int
    features: tuple[int, int]


def traffic(config: GeneratorConfig) -> tuple[Traffic, int]:
    """And the bytes of the base model in bfloat16."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LLAMA3_8B.config())
    frozen = 2 * sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, config)
    trained = {name: 4 * p.numel() for name, p in model.named_parameters() if p.requires_grad}
    collectives = size = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, FusedGenLinear) or isinstance(config, LoRAConfig):
            continue
        rowwise = name.rpartition(".")[2] in ROWWISE
        if isinstance(config, WeGeFTConfig) and not rowwise:
            continue  # an edit of x, which all have
        r = config.r if isinstance(config, WeGeFTConfig) else config.generator_share_dim + config.individual_features
        collectives += 2  # forward and backward
        size += 2 * 4 * layer.out_features * r
    in_blocks = sum(bytes_ for name, bytes_ in trained.items() if ".layers." in name)
    return Traffic(sum(trained.values()), len(trained), in_blocks, (collectives, size)), frozen


def seconds(way: str, found: Traffic, frozen: int, gpus: int) -> float:
    """What the adapter, or with "FSDP2" the base model as well, adds to a step."""
    if way == "DDP":
        return MACHINE.all_reduce(found.gradients, math.ceil(found.gradients / 25e6), gpus)
    base = 2 * MACHINE.gather(frozen, 2 * LLAMA3_8B.layers, gpus)  # once forward, once backward
    own = MACHINE.gather(2 * found.gradients + found.in_blocks, LLAMA3_8B.layers + 1, gpus)
    return base + own


def draw(found: dict[str, tuple[Traffic, int]], path: Path) -> Path:
    frozen = next(iter(found.values()))[1]
    product = frozen / 2 * TOKENS * 2 / MACHINE.speed  # of every weight, once: forward, for dX, and for dW if it trains
    curves = {**found, "every weight": (Traffic(frozen, 291, frozen, (0, 0)), frozen)}
    figure, axes = canvas(1, 2, 11, 3.4)
    for axis, way in zip(axes[0], ("DDP", "FSDP2"), strict=True):
        ends = []
        for name, (own, base) in curves.items():
            style = LOOKS[DRAWN[name]]
            compute = (3 if name == "every weight" else 2) * product
            share = [compute / (compute + seconds(way, own, base, gpus)) for gpus in GPUS]
            axis.plot(
                GPUS, share, color=style.colour, linestyle=style.line, marker=style.mark, markersize=4, linewidth=1
            )
            ends.append((name, GPUS[-1], share[-1], style.colour))
        axis.set(title=way, xlabel="GPUs", xscale="log", ylabel="share of a step that computes", ylim=(0, 1.05))
        axis.minorticks_off()
        axis.set_xticks(GPUS, [str(n) for n in GPUS], fontsize=7)
        name_ends(axis, ends)
    figure.suptitle(f"modelled, not measured: Llama-3-8B, {TOKENS} tokens per GPU and step, no overlap", fontsize=9)
    return save(figure, path)


def table(found: dict[str, tuple[Traffic, int]]) -> str:
    def mib(size: float) -> str:
        return f"{size / 2**20:.1f}"

    lines = [
        "| MiB per step | DDP: all-reduce | FSDP2: all-gather, beside the base model's | FSDP2: reduce-scatter "
        "| TP: all-reduce of gradients | TP: of W0, forward and backward |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (own, _) in found.items():
        whole = mib(own.gradients)
        gathered = mib(own.gradients + own.in_blocks)
        reads = f"{mib(own.features[1])} in {own.features[0]}"
        lines.append(f"| {name} | {whole} | {gathered} | {whole} | {whole} in {own.tensors} | {reads} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    docs = Path(arguments[0]) if arguments else DOCS
    found = {name: traffic(config()) for name, config in METHODS.items()}
    refreshed = text.refresh(docs / "distributed.md", {"communication": table(found) + "\n"})
    print("distributed.md refreshed" if refreshed else "distributed.md lacks markers")
    print(draw(found, docs / "charts" / "distributed-scaling.svg"))
    return 0 if refreshed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
