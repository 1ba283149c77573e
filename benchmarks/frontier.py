"""Every method from 1,000 to 500,000 trainable parameters: held-out bits, time and memory, on bases of three depths.

python -m benchmarks.frontier                              what is missing, in order of use, for an hour
python -m benchmarks.frontier --parts steps                time and memory of a step; on a quiet machine
python -m benchmarks.frontier --tasks prose --depths 4     one target task, one base

The bases are byte-level Llamas of equal size with 4, 8 and 16 layers, pre-trained on source code; the target tasks are
those of benchmarks/subjects/tasks.py. For labels a base gets a linear probe as its head, fitted before and frozen, so
that what is compared is how its states are adapted, and not who first learns that a label is asked for. For each method
and budget, the configuration with the widest modules that comes near the budget is tried with a seed of its own at
three learning rates around what was best at the budget before, and at further ones while the best is the lowest or the
highest; then the next narrower one at the best of these. What is best on the tuning part of the held-out text is
trained with three seeds and reported on the other part. Runs are made in this process, one after the other, and kept in
benchmarks/results/<device>/frontier/<task>-<depth>.json: a run is not made again, unless what it depends on has
changed, so that the work can be cut anywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.adaptation import ENTRANTS, TUNING_FACTORS, nearest, now
from benchmarks.measure import memory, results
from benchmarks.measure.store import Store
from benchmarks.report import frontier as report
from benchmarks.report.__main__ import main as write_report
from benchmarks.subjects.tasks import TASKS, Task
from benchmarks.suites import training
from genft_cli import bases, job, measure, methods
from genft_cli.console import quiet, say
from genft_cli.demo import run as demo
from genft_cli.demo.run import Demo

STEP = TUNING_FACTORS[-1] / TUNING_FACTORS[-2]
EXTENSIONS = 2  # learning rates beyond the three, at most
CANDIDATES = 2  # configurations that are tried for a method and budget
NEAR = 0.25  # of the budget: how far a configuration's parameters may be from it
RATES = {entrant.method: entrant.lr for entrant in ENTRANTS if entrant.method != "peft-lora"}

# From the widest to the narrowest: what there is to choose from for every method.
MODULES = {
    "all linear": ["all-linear"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "q, v": ["q_proj", "v_proj"],
    "v": ["v_proj"],
    "v, upper half": ["v_proj"],  # of the layers
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a size becomes fields of a configuration: half of it goes to each of two ranks, or all to one, beside fields
    that are fixed."""

    rank: str = "r"
    specific: str = ""
    fixed: tuple[tuple[str, Any], ...] = ()

    @property
    def least(self) -> int:
        return 2 if self.specific else 1

    def options(self, value: int) -> dict[str, Any]:
        if not self.specific:
            return {self.rank: value, **dict(self.fixed)}
        return {self.rank: value - value // 2, self.specific: value // 2, **dict(self.fixed)}


_GENFT = (
    Variant("generator_share_dim", "individual_features"),
    Variant("generator_share_dim", fixed=(("individual_features", 0),)),
)
VARIANTS = {
    "genft": _GENFT,
    "genft-gelu": _GENFT,
    "grft": (Variant("k"),),
    "sas": (
        Variant("r_shared", "r_specific"),
        Variant("r_shared", fixed=(("r_specific", 1), ("hidden_dim", 4), ("embedding_dim", 4))),
    ),
    "peanut": (Variant(), Variant(fixed=(("depth", 1),))),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how a run is made."""

    bases: dict[int, Demo]
    budgets: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 256_000, 500_000)
    methods: tuple[str, ...] = tuple(RATES)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 96
    tokens: int = 512  # of a step
    held_out: int = 16_384  # tokens at most, in each of the two parts
    warmup: float = 0.05  # this and the next: as in `genft finetune`
    clip: float = 1.0
    rounds: int = 15


def _base(layers: int, hidden: int, feed_forward: int) -> Demo:
    return Demo(
        hidden=hidden, layers=layers, heads=hidden // 32, feed_forward=feed_forward, seq_len=128,
        pretrain_steps=3600, pretrain_batch=8, pretrain_lr=2e-3,
    )  # fmt: skip


STUDY = Study({4: _base(4, 128, 352), 8: _base(8, 96, 224), 16: _base(16, 64, 176)})
# What compares first comes first.
ORDER = (("prose", 4), ("labels", 4), ("prose", 8), ("prose", 16), ("labels", 8), ("labels", 16))


# ---- configurations


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method's configuration: the modules by their name in MODULES, the fields that differ from the defaults."""

    method: str
    modules: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    trainable: int = 0

    def config(self, layers: int) -> Any:
        """For peft, on a base of so many layers; None for full fine-tuning."""
        if self.method == "full":
            return None
        extra, targets = dict(self.options), MODULES[self.modules]
        if self.modules.endswith("upper half"):
            upper = "|".join(str(layer) for layer in range(layers // 2, layers))
            targets = [rf".*\.layers\.({upper})\..*\.({'|'.join(targets)})"]
        return methods.peft_config(self.method, r=extra.pop("r", None), extra=extra, target_modules=targets)

    def words(self) -> str:
        return " ".join([self.method, *([f"[{self.modules}]"] if self.modules else []), *_pairs(self.options)])


def _pairs(options: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"{name}={value}" for name, value in options]


class Sizes:
    """Counts trainable parameters on one base."""

    def __init__(self, base: Path) -> None:
        self.model_config = transformers.AutoConfig.from_pretrained(str(base))
        self.count = functools.cache(self._count)

    def _count(self, method: str, modules: str = "", options: tuple[tuple[str, Any], ...] = ()) -> int:
        config = Candidate(method, modules, options).config(self.model_config.num_hidden_layers)
        return job.rehearse(self.model_config, config, method, transformers.AutoModelForCausalLM)[0]

    def candidates(self, method: str, budget: int) -> list[Candidate]:
        """The configurations that come near the budget, those of the widest modules; none where the method has none."""
        found = []
        for modules in MODULES:
            for variant in VARIANTS.get(method, (Variant(),)):

                def count(value: int, modules: str = modules, variant: Variant = variant) -> int:
                    return self.count(method, modules, tuple(variant.options(value).items()))

                value, trainable = nearest(count, budget, least=variant.least, most=self.model_config.hidden_size)
                if abs(trainable / budget - 1) <= NEAR:
                    found.append(Candidate(method, modules, tuple(variant.options(value).items()), trainable))
                if len(found) == CANDIDATES:
                    return found
        return found


# ---- the runs of one target task on one base


class OutOfTime(Exception):
    """The part is over."""


class Comparison:
    """The runs of one target task on one base, and the file they are kept in."""

    def __init__(self, study: Study, task: str, depth: int, folder: Path, cache: Path, deadline: float) -> None:
        self.study, self.name, self.deadline = study, f"{task}-{depth}", deadline
        device = bases.check_device("auto")
        about = results.describe(device)
        path = folder / results.slug(about) / "frontier" / f"{self.name}.json"
        self.store = Store(path, report.SCHEMA, task=task, depth=depth, steps={})
        self.commit = results.commit()
        place, _ = demo.pretrained_base(study.bases[depth], cache)
        self.base = transformers.AutoModelForCausalLM.from_pretrained(str(place), dtype=torch.float32).to(device)
        parameters = self.base.num_parameters()  # a probe does not count
        self.sizes = Sizes(place)
        made = TASKS[task](study.bases[depth].seq_len, study.held_out)
        self.batch = study.tokens // made.train.ids.shape[1]
        self.task = Task(*(type(rows)(*(tensor.to(device) for tensor in rows)) for rows in made))
        if task == "labels":
            training.probe(self.base, self.task.train)
        # The weights themselves, for their training rounds differently with another number of threads.
        parts = [*(self.base.state_dict().values()), *(tensor for rows in self.task for tensor in rows)]
        seen = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in parts))
        seen.update(json.dumps([study.steps, study.tokens, study.warmup, study.clip]).encode())
        self.digest = seen.hexdigest()[:16]
        self.visited: set[str] = set()
        self.last: dict[str, float] = {}  # the learning rate that was best at the budget before
        before = dict(zip(("bits", "accuracy"), training.evaluate(self.base, self.task.held_out), strict=True))
        self.store.data["about"] = {
            "device": about,
            "before": {name: round(value, 5) for name, value in before.items()},
            "parameters": parameters,
            "base": dataclasses.asdict(study.bases[depth]),
            "rows": {name: list(rows.ids.shape) for name, rows in zip(Task._fields, self.task, strict=True)},
            **{name: value for name, value in dataclasses.asdict(study).items() if name != "bases"},
            "finished": self.store.data["about"].get("finished", False),
            "torch": torch.__version__,
        }

    def chosen(self, method: str, budget: int) -> tuple[Candidate, float] | None:
        """The configuration and the learning rate of a method at a budget, by the tuning part; None where the method
        has no configuration of that size."""
        if method == "full":
            candidates = [Candidate("full", trainable=self.sizes.count("full"))]
        else:
            candidates = self.sizes.candidates(method, budget)
        if not candidates:
            return None
        first, *others = candidates

        def bits(candidate: Candidate, lr: float) -> float:
            return self.run(candidate, budget, lr, report.TUNING_SEED)

        guess = self.last.get(method, RATES[method])
        lr, best = tuned(lambda rate: bits(first, rate), guess)
        self.last[method] = lr
        return min([(best, first), *((bits(other, lr), other) for other in others)], key=lambda it: it[0])[1], lr

    def run(self, candidate: Candidate, budget: int, lr: float, seed: int) -> float:
        """Bits of one run, made if it is missing; infinite where it diverged."""
        options = dict(candidate.options)
        about = {"method": candidate.method, "budget": budget, "modules": candidate.modules, "options": options}
        settings = {**about, "trainable": candidate.trainable, "lr": lr, "seed": seed, "task": self.digest}
        key = f"{candidate.words()} budget={budget} lr={lr:g} seed={seed}"
        self.visited.add(key)
        if not self.store.has(key, settings):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            record = self._made(candidate, lr, seed)
            self.store.data["runs"][key] = {"settings": settings, **record}
            self.store.flush()
            told = "diverged" if record["bits"] is None else f"{record['bits']:.4f} bits"
            say(f"{self.name}: {key}: {told}, {record['seconds']:.1f} s")
        bits = self.store.data["runs"][key]["bits"]
        return math.inf if bits is None else bits

    def _made(self, candidate: Candidate, lr: float, seed: int) -> dict[str, Any]:
        study, began = self.study, time.perf_counter()
        load = os.getloadavg()[0]
        transformers.set_seed(seed)
        model = training.adapted(self.base, candidate.method, candidate.config(self.base.config.num_hidden_layers))
        training.train(
            model, self.task.train,
            steps=study.steps, batch=self.batch, lr=lr, seed=seed, warmup=study.warmup, clip=study.clip,
        )  # fmt: skip
        bits, accuracy = training.evaluate(model, self.task.tuning if of_tuning(seed) else self.task.held_out)
        return {
            "bits": round(bits, 5) if math.isfinite(bits) else None,
            "accuracy": round(accuracy, 5),
            "seconds": round(time.perf_counter() - began, 2),
            "commit": self.commit,
            "date": now(),
            "load": round(load, 2),
        }

    def train(self) -> None:
        """All runs: settings are chosen and the first seed is trained budget by budget; then seed by seed."""
        study, data = self.study, self.store.data
        data["about"]["finished"] = False
        self.store.flush()
        picked = {}
        for budget in study.budgets:
            for method in study.methods:
                # Full fine-tuning has one size, which is tuned once.
                at = 0 if method == "full" else budget
                if (method, at) not in picked and (choice := self.chosen(method, at)):
                    picked[method, at] = choice
                    self.run(choice[0], at, choice[1], study.seeds[0])
        for seed in study.seeds[1:]:
            for (_, budget), (candidate, lr) in picked.items():
                self.run(candidate, budget, lr, seed)
        self.store.keep(self.visited)
        data["about"]["finished"] = True
        self.store.flush()

    def steps(self) -> None:
        """Time and memory of a training step of every point that is reported, in turns."""
        points = {point.key: point for point in report.points(self.store.data)}
        if not points:
            return
        models = {
            key: training.adapted(self.base, point.method, _without_choice(point, self.base.config.num_hidden_layers))
            for key, point in points.items()
        }  # fmt: skip
        ids, labels = (tensor[: self.batch] for tensor in self.task.train)
        batch = {"input_ids": ids, "labels": labels}
        load = os.getloadavg()[0]
        seconds = measure.step_seconds(models, batch, rounds=self.study.rounds, title=f"{self.name}: steps")
        found = {}
        for key, model in models.items():
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

            def step(model: Any = model, trained: Any = trained) -> None:
                torch.autograd.grad(model(**batch).loss, trained)

            ratios = [a / b for a, b in zip(seconds[key], seconds["full"], strict=True)]
            found[key] = {
                "ms": round(1e3 * statistics.median(seconds[key]), 3),
                "times_full": [round(value, 4) for value in statistics.quantiles(ratios, n=4, method="inclusive")],
                "peak_mib": round(memory.peak_bytes(step, ids.device) / 2**20, 2),
                "state_mib": round(sum(memory.state_bytes(trained).values()) / 2**20, 3),
            }
        self.store.data["steps"] = {
            "points": found, "commit": self.commit, "date": now(), "load": round(load, 2),
        }  # fmt: skip
        self.store.flush()


def _without_choice(point: report.Point, layers: int) -> Any:
    config = Candidate(point.method, point.modules, tuple(point.options.items())).config(layers)
    if getattr(config, "selection", None) == "gradient":
        config.selection = "random"  # which rows are trained makes no difference to the time
    return config


def of_tuning(seed: int) -> bool:
    return seed == report.TUNING_SEED


def tuned(bits: Any, guess: float) -> tuple[float, float]:
    """(learning rate, its bits): the best of the guess times TUNING_FACTORS and, while the best is the lowest or the
    highest of those tried, of at most EXTENSIONS further steps in that direction. The same for every method."""

    def rate(step: int) -> float:
        return float(f"{guess * STEP**step:.3g}")

    tried = {step: bits(rate(step)) for step in (-1, 0, 1)}
    for _ in range(EXTENSIONS):
        best = min(tried, key=lambda step: tried[step])
        if best not in (min(tried), max(tried)) or not math.isfinite(tried[best]):
            break
        further = best + (1 if best == max(tried) else -1)
        tried[further] = bits(rate(further))
    best = min(tried, key=lambda step: tried[step])
    return rate(best), tried[best]


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("train", "steps"), default=["train"])
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--depths", nargs="+", type=int, choices=tuple(STUDY.bases), default=list(STUDY.bases))
    parser.add_argument("--minutes", type=float, default=60.0, help="no run begins after these (%(default)g)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of result files")
    parser.add_argument("--cache-dir", type=Path, default=demo.default_cache(), help="where the bases are kept")
    parser.add_argument("--no-report", action="store_true", help="leave docs and README as they are")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    quiet()
    torch.set_num_threads(arguments.threads)
    arguments.cache_dir.mkdir(parents=True, exist_ok=True)
    for task, depth in _asked(arguments.tasks, arguments.depths):
        comparison = Comparison(STUDY, task, depth, arguments.results, arguments.cache_dir, deadline)
        try:
            if "train" in arguments.parts:
                comparison.train()
            if "steps" in arguments.parts:
                comparison.steps()
        except OutOfTime:
            say(f"stopped after {arguments.minutes:g} minutes at {comparison.name}; the same command goes on from here")
            break
    return 0 if arguments.no_report else write_report(["--results", str(arguments.results)])


def _asked(tasks: Sequence[str], depths: Sequence[int]) -> Iterator[tuple[str, int]]:
    for task, depth in ORDER:
        if task in tasks and depth in depths:
            yield task, depth


if __name__ == "__main__":
    sys.exit(main())
