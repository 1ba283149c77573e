"""Many adapters in the same batches against one after the other, on a CPU: `python -m benchmarks.adapters`.

A training step (forward, backward, AdamW) of a Llama with 1, 4, 16 and 32 adapters, each with a short batch of its own.
"mixed" is one step of all adapters in one batch, as `AdapterGroupTrainer` takes it; the others take one step for each
adapter. Tokens per second and the step's peak memory, in one run, in turns; "mixed" after its gradients agreed with
those of one adapter after the other. Results go to benchmarks/results/<device>/adapters/step.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.measure import memory, results
from genft_kernels.timing import Stats, WallClock, interleave
from genft_modules import LoRAConfig, WeGeFTConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama, and the batch of each adapter: `samples` of `tokens`."""

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 4
    vocabulary: int = 1024
    samples: int = 1
    tokens: int = 32
    r: int = 16

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=8,
                use_cache=False,
            )
        )


METHODS: dict[str, Callable[[int], Any]] = {
    "peft-lora": lambda r: LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS),
    "lora": lambda r: LoRAConfig(r=r, lora_alpha=r, target_modules=TARGETS),
    "wegeft": lambda r: WeGeFTConfig(r=r, wegeft_alpha=r, target_modules=TARGETS),
}


class Group:
    """A model with several adapters, and an optimizer for each."""

    def __init__(self, method: str, count: int, shape: Shape) -> None:
        self.names = [f"a{index}" for index in range(count)]
        model: Any = None
        for name in self.names:
            torch.manual_seed(int(name[1:]) + 1)
            config = METHODS[method](shape.r)
            if model is None:
                model = get_peft_model(shape.model(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        self.model: PeftModel = model.train()
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for name in self.names:
            model.set_adapter(name)
            self.parameters[name] = [p for p in model.parameters() if p.requires_grad]
            torch.manual_seed(7)
            for parameter in self.parameters[name]:
                nn.init.normal_(parameter, std=0.02)
        self.optimizers = {name: torch.optim.AdamW(mine, lr=1e-6) for name, mine in self.parameters.items()}
        everything = [{"params": mine} for mine in self.parameters.values()]
        self.optimizer = torch.optim.AdamW(everything, lr=1e-6)

    def loss(self, ids: Tensor, names: list[str] | None = None) -> Tensor:
        """The sum over the adapters of the mean over their tokens."""
        logits = self.model(input_ids=ids, **({} if names is None else {"adapter_names": names})).logits
        each = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
        return each.sum() * len(set(names or [""])) / len(ids)

    def one_by_one(self, batches: Tensor, *, update: bool = True) -> None:
        for name, ids in zip(self.names, batches, strict=True):
            self.model.set_adapter(name)
            self.loss(ids).backward()
            if update:
                self.optimizers[name].step()
                self.optimizers[name].zero_grad()

    def mixed(self, batches: Tensor, *, update: bool = True) -> None:
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        names = [name for name in self.names for _ in range(batches.shape[1])]
        self.loss(batches.flatten(0, 1), names).backward()
        if update:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self, step: Callable[..., None], batches: Tensor) -> list[Tensor]:
        step(batches, update=False)
        found = [p.grad.clone() for mine in self.parameters.values() for p in mine if p.grad is not None]
        self.optimizer.zero_grad()
        return found


def agree(found: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether the gradients are equal to what float32 keeps."""
    return len(found) == len(want) and all(
        bool((a - b).abs().max() <= 1e-3 * b.abs().max()) for a, b in zip(found, want, strict=True)
    )


def measure(counts: Sequence[int], shape: Shape, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One record for each number of adapters, method and way."""
    found = []
    for count in counts:
        generator = torch.Generator().manual_seed(3)
        batches = torch.randint(shape.vocabulary, (count, shape.samples, shape.tokens), generator=generator)
        steps: dict[tuple[str, str], Callable[[int], object]] = {}
        gates: dict[tuple[str, str], bool] = {}
        for method in METHODS:
            group = Group(method, count, shape)
            want = group.gradients(group.one_by_one, batches)
            steps[method, "one by one"] = lambda at, group=group, batches=batches: group.one_by_one(batches)
            gates[method, "one by one"] = True
            if method != "peft-lora":  # which refuses to train in mixed batches
                gates[method, "mixed"] = agree(group.gradients(group.mixed, batches), want)
                steps[method, "mixed"] = lambda at, group=group, batches=batches: group.mixed(batches)
        good = {" ".join(key): step for key, step in steps.items() if gates[key]}
        samples = interleave(good, WallClock(), seconds=seconds, max_rounds=rounds)
        for (method, way), step in steps.items():
            record: dict[str, Any] = {"adapters": count, "method": method, "way": way, "gate": gates[method, way]}
            if record["gate"]:
                times, one = samples[f"{method} {way}"], samples[f"{method} one by one"]
                record["ms"] = Stats.of(times).json()
                record["tokens_per_second"] = round(batches.numel() / record["ms"]["median"] * 1e3, 1)
                record["times_one_by_one"] = Stats.of([a / b for a, b in zip(times, one, strict=True)]).json()
                ratios = [a / b for a, b in zip(times, samples["peft-lora one by one"], strict=True)]
                record["times_peft"] = Stats.of(ratios).json()
                record["peak_mib"] = round(memory.peak_bytes(lambda step=step: step(0), batches.device) / 2**20, 2)
            found.append(record)
            print(_line(record), flush=True)
    return found


def _line(record: dict[str, Any]) -> str:
    name = f"{record['adapters']:>4} adapters  {record['method']:12}{record['way']:12}"
    if not record["gate"]:
        return f"{name} wrong gradients: not timed"
    return (
        f"{name}{record['ms']['median']:9.1f} ms {record['tokens_per_second']:9.0f} tokens/s "
        f"{record['times_one_by_one']['median']:6.2f} × one by one {record['times_peft']['median']:6.2f} × peft "
        f"{record['peak_mib']:8.1f} MiB peak"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for each number of adapters")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see that it runs")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of result files")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    shape = Shape(hidden=32, intermediate=48, layers=1, vocabulary=61, tokens=5, r=4) if arguments.tiny else Shape()
    records = measure(arguments.adapters, shape, arguments.rounds, arguments.seconds)
    device = results.describe(torch.device("cpu"))
    path = arguments.results / results.slug(device) / "adapters" / "step.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "device": device,
        "commit": results.commit(),
        "torch": torch.__version__,
        "shape": dataclasses.asdict(shape),
    }
    path.write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    return 0 if all(record["gate"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
