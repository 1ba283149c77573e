"""Every method at one parameter budget on the embedded task: held-out bits per byte over seeds, time, memory.

python -m benchmarks.adaptation        trains what is missing, then writes docs and README

The task is the demo's: a small byte-level Llama, pre-trained on source code, is adapted to prose. Each method has the
size that comes nearest to the budget, and the best of three learning rates, found with a seed of its own. Each run is
`genft finetune` in a process of its own, so its peak memory is its own; single steps are timed last, in turns. A
finished run is kept in benchmarks/results/<device>/adaptation/<size>.json and not made again, unless what it depends
on has changed: its settings, the base model or the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.measure import results
from benchmarks.measure.store import Store
from benchmarks.report import budget
from benchmarks.report.__main__ import main as write_report
from genft_cli import bases, job, measure, methods
from genft_cli.console import quiet, say
from genft_cli.demo import run as demo
from genft_cli.demo import stages
from genft_cli.demo.bytes import byte_tokenizer, windows
from genft_cli.demo.run import Demo
from genft_modules.progress import bar

TUNING_FACTORS = (0.4, 1.0, 2.5)


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A method in the comparison.

    Attributes:
        method: its name in `genft finetune`.
        lr: a guess at its peak learning rate; what it gets is the best of `TUNING_FACTORS` times this.
        knob: the option or field of its configuration that its size is set by; "" where it has none.
    """

    method: str
    lr: float
    knob: str = "r"

    @property
    def name(self) -> str:
        return demo.NAMES[self.method]

    def options(self, value: int) -> list[str]:
        """What sets the knob on the command line."""
        if not self.knob:
            return []
        return [f"--{self.knob}", str(value)]

    def config(self, value: int, task: Demo) -> Any:
        """The peft configuration; None for full fine-tuning."""
        if not self.knob:
            return methods.peft_config(self.method)
        r, extra = (value, None) if self.knob == "r" else (None, {self.knob: value})
        return methods.peft_config(self.method, r=r, extra=extra, target_modules=task.target_modules)


ENTRANTS = (
    Entrant("wegeft", 1e-2),
    Entrant("gift", 1e-2),
    Entrant("genft", 2e-3),
    Entrant("genft-gelu", 4e-3),
    Entrant("grft", 1e-2),
    Entrant("sas", 1e-2),
    Entrant("peanut", 2.5e-2),
    Entrant("hira", 1e-1),
    Entrant("lora", 1e-2),
    Entrant("peft-lora", 1e-2),
    Entrant("full", 5e-4, knob=""),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the comparison is. `budget`: trainable parameters; each method gets the size that comes nearest."""

    name: str
    task: Demo
    budget: int
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(entrant.method for entrant in ENTRANTS)
    rounds: int = 15

    def entrants(self) -> list[Entrant]:
        return [entrant for entrant in ENTRANTS if entrant.method in self.methods]


SIZES = {
    # 55,296 is a LoRA of rank 4.
    "full": Size("full", Demo(pretrain_steps=800, pretrain_lr=6e-4, adapt_steps=48, evaluations=1), 55_296),
    "smoke": Size(
        "smoke",
        Demo(
            hidden=32, layers=2, heads=2, feed_forward=48, seq_len=64, batch_size=2, pretrain_steps=2,
            pretrain_batch=2, adapt_steps=2, evaluations=1, held_out=0.01,
        ),
        2_000,
        seeds=(0, 1),
        methods=("sas", "peft-lora", "full"),
        rounds=2,
    ),
}  # fmt: skip


# ---- sizes of methods


def fitted(entrant: Entrant, size: Size, base: Path) -> tuple[int, int]:
    """(the knob's value whose count of trainable parameters is nearest to the budget, that count)."""
    model_config = transformers.AutoConfig.from_pretrained(str(base))

    def count(value: int) -> int:
        return job.rehearse(
            model_config, entrant.config(value, size.task), entrant.method, transformers.AutoModelForCausalLM
        )[0]

    return nearest(count, size.budget, least=2) if entrant.knob else (0, count(0))


def nearest(count: Callable[[int], int], budget: int, *, least: int = 1, most: float = math.inf) -> tuple[int, int]:
    """(the value from `least` to `most` whose count is nearest to the budget, that count), of a count that grows
    nearly in proportion."""
    low, high = count(least), count(least + 4)
    slope = (high - low) / 4  # nearly: a rank may be split between two parts
    near = least + round((budget - low) / slope)
    values = {int(min(most, max(least, value))) for value in (near - 1, near, near + 1)}
    return min(((value, count(value)) for value in sorted(values)), key=lambda it: abs(it[1] - budget))


# ---- what there is, and what is missing


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: an entrant at a learning rate with a seed."""

    entrant: Entrant
    value: int
    lr: float
    seed: int
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.entrant.method} lr={self.lr:g} seed={self.seed}"


def of_tuning(settings: dict[str, Any]) -> bool:
    return bool(settings["seed"] == budget.TUNING_SEED)


def _digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


class Plan:
    """The runs of a comparison."""

    def __init__(self, size: Size, base: Path, text: str) -> None:
        self.size = size
        self.values = {entrant.method: fitted(entrant, size, base)[0] for entrant in size.entrants()}
        unused = ("methods", "seed", "timing_rounds")
        task = {name: value for name, value in dataclasses.asdict(size.task).items() if name not in unused}
        # The weights themselves, for their training rounds differently with another number of threads.
        weights = _digest(path for path in sorted(base.glob("*.safetensors")))
        self.task = hashlib.sha256(json.dumps([task, weights, text]).encode()).hexdigest()[:16]

    def tuning(self) -> list[Job]:
        rates = {each.method: [float(f"{each.lr * factor:.3g}") for factor in TUNING_FACTORS] for each in ENTRANTS}
        return [self._job(each, lr, budget.TUNING_SEED) for each in self.size.entrants() for lr in rates[each.method]]

    def compared(self, rates: dict[str, float]) -> list[Job]:
        """Seed by seed, so that what there is after an interruption compares."""
        return [self._job(each, rates[each.method], seed) for seed in self.size.seeds for each in self.size.entrants()]

    def _job(self, entrant: Entrant, lr: float, seed: int) -> Job:
        value = self.values[entrant.method]
        what = {"method": entrant.method, "knob": entrant.knob, "value": value, "lr": lr, "seed": seed}
        return Job(entrant, value, lr, seed, {**what, "task": self.task})


def train(
    job: Job, size: Size, base: Path, texts: dict[str, Path], scratch: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """One run in a process of its own, and what is kept of it."""
    output = scratch / job.key.replace(" ", "-")
    task = dataclasses.replace(size.task, seed=job.seed)
    command = demo.finetune_command(
        task, job.entrant.method, base, texts, output, lr=job.lr, options=job.entrant.options(job.value)
    )
    load = os.getloadavg()[0]
    _call([sys.executable, "-m", "genft_cli", *command], environment)
    record = demo.read_record(output)
    shutil.rmtree(output)
    kept = ("trainable_parameters", "bits_per_byte_before", "bits_per_byte_after", "held_out_curve")
    return {
        "settings": job.settings,
        **{name: record[name] for name in kept},
        "peak_memory_mib": round(record["peak_memory_mib"], 1),
        "idle_memory_mib": round(record["idle_memory_mib"], 1),
        "seconds": round(record["seconds"], 1),
        "commit": results.commit(),
        "date": now(),
        "load": round(load, 2),
    }


def _call(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Runs a command whose progress nobody needs to see. `environment`: what is set beside what there is."""
    with_it = {**os.environ, **(environment or {})}
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=with_it, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- single steps, in turns: a process of its own


def time_steps(size: Size, base: Path, text: Path, output: Path) -> None:
    """Seconds of single training steps of every method, taken in turns, into `output` as JSON."""
    task, tokenizer, device = size.task, byte_tokenizer(), bases.check_device("auto")
    ids = windows(text.read_text(encoding="utf-8"), tokenizer, task.seq_len)[: task.batch_size].to(device)
    transformers.set_seed(task.seed)
    models = {}
    for entrant in size.entrants():
        config = entrant.config(fitted(entrant, size, base)[0], task)
        models[entrant.method] = stages.adapted(base, config).to(device)
    batch = {"input_ids": ids, "labels": ids}
    times = measure.step_seconds(models, batch, rounds=size.rounds, title="time per step")
    output.write_text(json.dumps(times) + "\n", encoding="utf-8")


# ---- the command


def run(size: Size, folder: Path, cache: Path, *, workers: int) -> Path:
    """Makes what is missing; the result file."""
    cache.mkdir(parents=True, exist_ok=True)
    # As in the demo: threads that wait asleep lose little beside a busy neighbour.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    device = results.describe(bases.check_device("auto"))
    path = folder / results.slug(device) / "adaptation" / f"{size.name}.json"
    store = Store(path, budget.SCHEMA, size=size.name, steps={})
    base, _ = demo.pretrained_base(size.task, cache)
    with tempfile.TemporaryDirectory(prefix="genft-") as directory:
        scratch = Path(directory)
        texts = demo.write_texts(size.task, scratch)
        plan = Plan(size, base, _digest(texts[name] for name in sorted(texts)))

        def made(jobs: list[Job], title: str) -> bool:
            missing = [job for job in jobs if not store.has(job.key, job.settings)]
            say(f"{title}: {len(jobs)} runs, {len(missing)} of them to be made")
            _train_all(missing, store, size, base, texts, scratch, workers, title)
            return bool(missing)

        tuning = plan.tuning()
        made(tuning, "learning rates")
        store.keep([job.key for job in tuning], among=of_tuning)
        rates = {method: min(points, key=lambda it: it[1])[0] for method, points in budget.tuned(store.data).items()}
        compared = plan.compared(rates)
        news = made(compared, "comparison")
        store.keep([job.key for job in compared], among=lambda settings: not of_tuning(settings))
        settings = {"values": plan.values, "task": plan.task, "rounds": size.rounds}
        if news or store.data["steps"].get("settings") != settings:
            load = os.getloadavg()[0]
            stage = [sys.executable, "-m", "benchmarks.adaptation", "--time-steps", size.name]
            _call([*stage, str(base), str(texts["train"]), str(scratch / "times.json")])
            seconds = json.loads((scratch / "times.json").read_text(encoding="utf-8"))
            steps = {"settings": settings, "seconds": seconds, "commit": results.commit(), "date": now()}
            store.data["steps"] = {**steps, "load": round(load, 2)}
    store.data["about"] = {
        "device": device,
        "budget": size.budget,
        "seeds": list(size.seeds),
        "methods": [entrant.method for entrant in size.entrants()],
        "learning_rates": rates,
        "values": {entrant.method: [entrant.knob, plan.values[entrant.method]] for entrant in size.entrants()},
        "task": dataclasses.asdict(size.task),
        "torch": torch.__version__,
    }
    store.flush()
    return store.path


def _train_all(
    missing: list[Job],
    store: Store,
    size: Size,
    base: Path,
    texts: dict[str, Path],
    scratch: Path,
    workers: int,
    title: str,
) -> None:
    """All of them, each kept as soon as it ends. Those that run when one fails are let to end."""
    threads = {"OMP_NUM_THREADS": "1"} if workers > 1 else {}
    writing = threading.Lock()
    with bar(len(missing), title, unit="run") as progress, ThreadPoolExecutor(workers) as pool:

        def one(job: Job) -> None:
            record = train(job, size, base, texts, scratch, threads)
            with writing:
                store.data["runs"][job.key] = record
                store.flush()
                progress.update()

        futures = [pool.submit(one, job) for job in missing]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--workers", type=int, default=0, help="processes side by side (CPU: one per core; GPU: one)")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of result files")
    parser.add_argument("--cache-dir", type=Path, default=demo.default_cache(), help="where the base model is kept")
    parser.add_argument("--no-report", action="store_true", help="leave docs and README as they are")
    parser.add_argument("--time-steps", nargs=4, metavar=("SIZE", "BASE", "TEXT", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    quiet()
    if arguments.time_steps:
        name, *paths = arguments.time_steps
        time_steps(SIZES[name], *map(Path, paths))
        return 0
    workers = arguments.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    path = run(SIZES[arguments.size], arguments.results, arguments.cache_dir, workers=workers)
    print(f"results: {path.relative_to(arguments.results)}")
    if arguments.no_report or arguments.size != "full":
        return 0
    return write_report(["--results", str(arguments.results)])


if __name__ == "__main__":
    sys.exit(main())
