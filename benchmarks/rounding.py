"""What rounding W0 + ΔW, or an edited x, costs a short training in bfloat16: `python -m benchmarks.rounding`.

The demo's base (a small byte-level Llama, pre-trained on source code) is adapted to prose, in float32 and in bfloat16,
where sums of 16 bits are rounded to the nearest or dithered (`genft_kernels.dither`). Three subjects:
    genft-gelu        ΔW of full rank, added to a panel of W0
    wegeft-edit       WeGeFT on layers that make their own product, as quantised ones do: x is edited
    wegeft-features   WeGeFT on plain layers, which have nothing to round
Adapters are float32, as peft keeps them. Learning rates are the demo's, and a tenth of it, with which updates stay
small. What comes out is held-out bits per byte, evaluated in the precision of the training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from peft import get_peft_model
from torch import Tensor

from benchmarks.measure import results
from genft_cli.demo import run as demo
from genft_kernels.dither import add_dithered
from genft_kernels.reference import edit, generated
from genft_modules import FusedGenLinear, GenFTConfig, WeGeFTConfig

TASK = demo.Demo(pretrain_steps=800, pretrain_lr=6e-4)
TARGETS = list(TASK.target_modules)
SUBJECTS: dict[str, Any] = {
    "genft-gelu": lambda: GenFTConfig(
        generator_share_dim=8,
        individual_features=8,
        inner_activation="gelu",
        outer_activation="gelu",
        target_modules=TARGETS,
    ),
    "wegeft-edit": lambda: WeGeFTConfig(r=16, target_modules=TARGETS),
    "wegeft-features": lambda: WeGeFTConfig(r=16, target_modules=TARGETS),
}
RATES = {"genft-gelu": (4e-4, 4e-3), "wegeft-edit": (1e-3, 1e-2), "wegeft-features": (1e-3, 1e-2)}
RUNS = {
    "genft-gelu": (("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "dithered")),
    "wegeft-edit": (("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "dithered")),
    "wegeft-features": (("bfloat16", "nearest"),),
}


def nearest(source: Tensor, update: Tensor, columns: range, out: Tensor) -> Tensor:
    """What `add_dithered` is compared with."""
    return out.copy_(source.float() + update)


def bits_per_byte(model: Any, batches: Sequence[Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in batches]
    model.train()
    return statistics.fmean(losses) / math.log(2)


def train(
    subject: str, base: Path, texts: dict[str, Path], dtype: str, rule: str, lr: float, seed: int, steps: int
) -> float:
    """Held-out bits per byte after `steps` steps of four windows of 256 bytes."""
    task = TASK
    train, held = (
        torch.frombuffer(bytearray(texts[name].read_bytes()), dtype=torch.uint8).long()
        for name in ("train", "held-out")
    )
    windows = train[: len(train) // task.seq_len * task.seq_len].view(-1, task.seq_len)
    batches = held[: 32 * task.seq_len].view(4, 8, task.seq_len)
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype))
    model = get_peft_model(model, SUBJECTS[subject]())
    for layer in model.modules():
        if subject == "wegeft-edit" and isinstance(layer, FusedGenLinear):
            layer.base_layer.register_forward_hook(lambda *_: None)  # a hooked layer makes its own product
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    add = add_dithered if rule == "dithered" else nearest
    with patch.object(edit, "add_dithered", add), patch.object(generated, "add_dithered", add):
        for step in range(steps):
            batch = windows[order[step * task.batch_size % len(windows) :][: task.batch_size]]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return bits_per_byte(model, batches)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file (benchmarks/results/<device>/rounding/short.json)")
    arguments = parser.parse_args(argv)
    device = results.describe(torch.device("cpu"))
    out = arguments.out or results.FOLDER / results.slug(device) / "rounding" / "short.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    data = {"commit": results.commit(), "device": device, "torch": torch.__version__, "steps": arguments.steps}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = demo.default_cache()
        cache.mkdir(parents=True, exist_ok=True)
        base, _ = demo.pretrained_base(TASK, cache)
        texts = demo.write_texts(TASK, Path(folder))
        for subject in arguments.subjects:
            for lr, (dtype, rule) in itertools.product(RATES[subject], RUNS[subject]):
                how = (subject, base, texts, dtype, rule, lr)
                bits = [round(train(*how, seed, arguments.steps), 6) for seed in range(arguments.seeds)]
                found.append({"subject": subject, "lr": lr, "dtype": dtype, "rounding": rule, "bits_per_byte": bits})
                print(f"{subject:16} lr {lr:g} {dtype:9}{rule:9}{statistics.fmean(bits):.4f}  {bits}", flush=True)
                out.write_text(json.dumps({**data, "runs": found}, indent=1) + "\n")  # what is measured is kept
    return 0


if __name__ == "__main__":
    sys.exit(main())
