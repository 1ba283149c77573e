"""Adapters of stacked experts on a CPU: `python -m benchmarks.experts step` and `python -m benchmarks.experts quality`.

step     a training step, forward and backward, of one layer with 8 and with 128 experts (Qwen3-MoE's, transformers'
         grouped_mm, float32, two experts for each token), relative to the frozen experts; what a step allocates at its
         peak and keeps for backward. One run, in turns, each contender after its outputs agreed with experts whose
         weights W_e + ΔW_e are written out.
quality  a small byte-level mixture of experts, pre-trained on source code as the demo's base, is adapted to prose:
         held-out bits per byte of three seeds, each entrant with the best of three learning rates, found with a seed of
         its own. All have about as many trained parameters; those that adapt attention alone show what the experts
         are worth.

Results go to benchmarks/results/<device>/experts/.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.measure import memory, results
from benchmarks.subjects.tasks import Rows, windows
from benchmarks.suites import training
from genft_cli.demo import corpora
from genft_cli.demo import run as demo
from genft_cli.demo.bytes import byte_tokenizer
from genft_kernels.timing import Stats, WallClock, interleave
from genft_modules import WeGeFTConfig

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj"]

# ---- a step


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer: `tokens` with `hidden` features, each sent to two of the experts."""

    tokens: int = 512
    hidden: int = 512
    intermediate: int = 256
    r: int = 16


class Block(nn.Module):
    """Experts under the name that they have in a model, and the routing of one batch."""

    def __init__(self, count: int, shape: Shape) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=count
        )
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(std=0.02, generator=generator)
        self.index = torch.rand(shape.tokens, count, generator=generator).topk(2).indices
        self.share = torch.full((shape.tokens, 2), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.experts(x, self.index, self.share)
        return found


def contenders(count: int, shape: Shape) -> dict[str, nn.Module]:
    """The frozen experts and their adapters, with updates that are not zero."""
    base = Block(count, shape).requires_grad_(False)
    configs = {
        "genft-wegeft": WeGeFTConfig(r=shape.r, target_modules=EXPERTS),
        "genft-wegeft-per-expert": WeGeFTConfig(r=shape.r, tied_experts=False, target_modules=EXPERTS),
        "peft-lora": LoraConfig(r=shape.r, target_modules=[], target_parameters=EXPERTS),
    }
    found: dict[str, nn.Module] = {"frozen": base}
    for name, config in configs.items():
        torch.manual_seed(1)
        found[name] = get_peft_model(copy.deepcopy(base), config)
        for parameter in found[name].parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return found


@torch.no_grad()
def agrees(model: nn.Module, base: nn.Module, x: Tensor) -> bool:
    """Whether the outputs are those of experts with W_e + ΔW_e, which change them."""
    found = model(x)
    merged = copy.deepcopy(model)
    assert isinstance(merged, PeftModel)
    want, plain = merged.merge_and_unload()(x), base(x)
    return bool((found - want).abs().max() <= 1e-4 * want.abs().max() < (found - plain).abs().max() * 1e4)


def measure_steps(experts: Sequence[int], shape: Shape, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One record for each contender and number of experts."""
    found = []
    for count in experts:
        models = contenders(count, shape)
        x = torch.randn(shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(2)).requires_grad_()
        plain = models["frozen"]
        good = {name: name == "frozen" or agrees(model, plain, x) for name, model in models.items()}

        def step(model: nn.Module, x: Tensor = x) -> None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            torch.autograd.grad(model(x).sum(), [x, *trained])

        timed: dict[str, Callable[[int], object]] = {
            name: (lambda at, model=model: step(model)) for name, model in models.items() if good[name]
        }
        samples = interleave(timed, WallClock(), seconds=seconds, max_rounds=rounds)
        for name, model in models.items():
            record: dict[str, Any] = {"experts": count, "contender": name, "gate": good[name]}
            record["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if good[name]:
                ratios = [ms / base for ms, base in zip(samples[name], samples["frozen"], strict=True)]
                record["ms"] = Stats.of(samples[name]).json()
                record["times_frozen"] = Stats.of(ratios).json()
                known = [x, *model.parameters(), *model.buffers()]
                record["saved_mib"] = round(memory.saved_bytes(lambda m=model, x=x: m(x), known) / 2**20, 2)
                record["peak_mib"] = round(memory.peak_bytes(lambda m=model: step(m), x.device) / 2**20, 2)
            found.append(record)
            print(_line(record), flush=True)
    return found


def _line(record: dict[str, Any]) -> str:
    name = f"{record['experts']:>4} experts  {record['contender']:24}"
    if not record["gate"]:
        return f"{name} wrong outputs: not timed"
    return (
        f"{name}{record['ms']['median']:9.1f} ms {record['times_frozen']['median']:6.2f} × frozen "
        f"{record['peak_mib']:9.1f} MiB peak {record['saved_mib']:9.1f} MiB kept {record['parameters']:>10,} trained"
    )


# ---- quality


@dataclasses.dataclass(frozen=True)
class Task:
    """A small mixture of experts and its trainings."""

    hidden: int = 128
    layers: int = 4
    experts: int = 8
    intermediate: int = 176
    window: int = 256
    pretrain_steps: int = 800
    pretrain_batch: int = 2
    pretrain_lr: float = 1e-3
    steps: int = 48
    batch: int = 4
    held_out: int = 32  # windows
    held_out_share: float = 0.07

    def model(self) -> Any:
        vocabulary = len(byte_tokenizer())
        return transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                vocab_size=vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                moe_intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=self.hidden // 4,
                num_experts=self.experts,
                num_experts_per_tok=2,
                max_position_embeddings=self.window,
                tie_word_embeddings=True,
                output_router_logits=True,  # adds the loss that balances the experts
            )
        )


@dataclasses.dataclass(frozen=True)
class Entrant:
    config: Callable[[], Any]
    lr: float


FACTORS = (0.4, 1.0, 2.5)
TUNING_SEED = 1000
ENTRANTS = {  # of about 44,000 trained parameters each, with a scale of 1
    "wegeft, attention": Entrant(lambda: WeGeFTConfig(r=57, wegeft_alpha=57, target_modules=ATTENTION), 1e-2),
    "wegeft, attention and experts": Entrant(
        lambda: WeGeFTConfig(r=32, wegeft_alpha=32, target_modules=[*ATTENTION, *EXPERTS]), 1e-2
    ),
    "wegeft, a pair per expert": Entrant(
        lambda: WeGeFTConfig(r=8, wegeft_alpha=8, tied_experts=False, target_modules=[*ATTENTION, *EXPERTS]), 1e-2
    ),
    "peft-lora, attention": Entrant(lambda: LoraConfig(r=14, lora_alpha=14, target_modules=ATTENTION), 1e-2),
    "peft-lora, attention and experts": Entrant(
        lambda: LoraConfig(
            r=6,
            lora_alpha=6,
            rank_pattern=dict.fromkeys(EXPERTS, 1),
            alpha_pattern=dict.fromkeys(EXPERTS, 1),
            target_modules=ATTENTION,
            target_parameters=EXPERTS,
        ),
        1e-2,
    ),
}


def _base(task: Task, cache: Path) -> Path:
    """The pre-trained model, from the cache if it is there."""
    code = corpora.stdlib_code(task.pretrain_steps * task.pretrain_batch * task.window)
    key = json.dumps([dataclasses.asdict(task), hashlib.sha256(code.encode()).hexdigest()])
    place = cache / f"experts-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (place / "config.json").is_file():
        transformers.set_seed(0)
        model = task.model()
        print(f"pre-training {model.num_parameters() / 1e6:.1f} M parameters", flush=True)
        rows = windows(code, task.window)
        steps, batch = task.pretrain_steps, task.pretrain_batch
        training.train(model, rows, steps=steps, batch=batch, lr=task.pretrain_lr, seed=0)
        model.save_pretrained(place)
    return place


def measure_quality(task: Task, seeds: Sequence[int], cache: Path, keep: Callable[[Any], None]) -> dict[str, Any]:
    base = _base(task, cache)
    with tempfile.TemporaryDirectory() as folder:
        texts = demo.write_texts(demo.Demo(held_out=task.held_out_share), Path(folder))
        rows, held = (windows(texts[name].read_text(), task.window) for name in ("train", "held-out"))
    held = Rows(*(tensor[: task.held_out] for tensor in held))

    def adapt(entrant: Entrant, lr: float, seed: int) -> tuple[float, int]:
        transformers.set_seed(seed)
        model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), entrant.config())
        training.train(model, rows, steps=task.steps, batch=task.batch, lr=lr, seed=seed)
        return training.evaluate(model, held)[0], sum(p.numel() for p in model.parameters() if p.requires_grad)

    before, _ = training.evaluate(transformers.AutoModelForCausalLM.from_pretrained(base), held)
    found: dict[str, Any] = {"before": round(before, 4), "task": dataclasses.asdict(task), "entrants": {}}
    print(f"before: {before:.4f} bits per byte", flush=True)
    for name, entrant in ENTRANTS.items():
        tuned = {f"{entrant.lr * by:.3g}": adapt(entrant, entrant.lr * by, TUNING_SEED)[0] for by in FACTORS}
        lr = min(tuned, key=lambda rate: tuned[rate])
        runs = [adapt(entrant, float(lr), seed) for seed in seeds]
        bits = [round(one, 4) for one, _ in runs]
        found["entrants"][name] = {"parameters": runs[0][1], "lr": float(lr), "tuning": tuned, "bits_per_byte": bits}
        print(f"{name:32}{runs[0][1]:>9,} trained  lr {lr:7} {statistics.fmean(bits):.4f}  {bits}", flush=True)
        keep(found)
    return found


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("step", "quality"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 128], help="step: how many a layer has")
    parser.add_argument("--rounds", type=int, default=40, help="step: at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="step: for each number of experts")
    parser.add_argument("--seeds", type=int, default=3, help="quality")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--out", type=Path, help="a JSON file (benchmarks/results/<device>/experts/<part>.json)")
    parser.add_argument("--cache-dir", type=Path, default=demo.default_cache(), help="where the base model is kept")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    device = results.describe(torch.device("cpu"))
    out = arguments.out or results.FOLDER / results.slug(device) / "experts" / f"{arguments.part}.json"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    data = {"commit": results.commit(), "device": device, **versions, "threads": torch.get_num_threads()}

    def keep(found: Any) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**data, arguments.part: found}, indent=1) + "\n")

    if arguments.part == "step":
        shape = Shape(tokens=8, hidden=16, intermediate=16, r=2) if arguments.tiny else Shape()
        data["shape"] = dataclasses.asdict(shape)
        keep(measure_steps(arguments.experts, shape, arguments.rounds, arguments.seconds))
        return 0
    small = Task(
        hidden=16, layers=1, experts=4, intermediate=16, window=16, pretrain_steps=2, steps=2, batch=2, held_out=2
    )
    arguments.cache_dir.mkdir(parents=True, exist_ok=True)
    task = small if arguments.tiny else Task()
    keep(measure_quality(task, range(arguments.seeds), arguments.cache_dir, keep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
