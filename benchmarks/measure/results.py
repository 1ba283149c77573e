"""Result files: one JSON per run, written whenever something was measured, with what is needed to check a figure or to
make it again.

benchmarks/results/<device>/<date>-<commit>.json holds
    run         commit, date, command, device and driver, versions, threads, parts that ran, parts that were left out
    ceilings    what the device reached in this run: a large copy, a large product for each dtype
    gate        the hardware gate's counts and failures
    records     one per contender and case: shape, dtype, method, algorithm and plan, gate, ms, ratio to the frozen
                layer, TFLOP/s, percentage of the product's ceiling, bytes, peak and saved memory; or why it has no time
    sweep       plans that were measured, and which won
    memcheck    what compute-sanitizer said of a few operations, or why it did not run
    profiles    kernel by kernel, where the time of a step goes
    slow_kernels  kernels of ours that take more than 1.5 times their bytes over the copy ceiling
No machine's name, user or path is written.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from genft_kernels.plan import user_tables

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"
Record = dict[str, Any]
Item = TypeVar("Item")


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return re.sub(r"\((R|TM)\)", "", names[0]).strip() if names else platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """The device by its model name, and what drives it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        return {
            "type": "gpu",
            "name": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver[0] if driver else None,
        }
    return {"type": "cpu", "name": _processor(), "threads": torch.get_num_threads(), "driver": None}


def slug(device: dict[str, Any]) -> str:
    name = device["name"] + (f"-{device['threads']}-threads" if device["type"] == "cpu" else "")
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def commit(given: str = "") -> str:
    """The commit that is measured, with "-dirty" where the code that is measured, plan files included, differs from it:
    what was changed, what git does not know yet, and plans of the user's own, which come before the package's."""
    found = _command("git", "rev-parse", "--short=10", "HEAD") or given or os.environ.get("GENFT_COMMIT", "")
    if not found:
        return "unknown"
    code = ("genft_kernels", "genft_modules", "genft_cli", "benchmarks", ":!benchmarks/results")
    changed = _command("git", "status", "--porcelain", "--untracked-files=all", "--", *code)
    return f"{found}-dirty" if changed or any(user_tables().glob("*.json")) else found


class Run:
    """One run: what it measured so far, where it writes, and how long it still has."""

    def __init__(
        self,
        device: torch.device,
        out: Path | None,
        *,
        minutes: float = float("inf"),
        label: str = "",
        tiny: bool = False,
        workers: int = 0,
    ) -> None:
        self.device, self.tiny, self.workers = device, tiny, workers
        self.deadline = self.until = time.monotonic() + 60 * minutes
        self.part = ""
        described = describe(device)
        packages = ("triton", "peft", "transformers", "numpy", "pytest-benchmark")
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "run": {
                "commit": commit(label),
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "command": _invocation(),
                "device": described,
                "tiny": tiny,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "threads": torch.get_num_threads(),
                "load": round(os.getloadavg()[0], 2),  # what else the machine was doing when the run began
                **{name: _version(name) for name in packages},
                "parts": [],
                "left_out": {},
            },
            "ceilings": {},
            "gate": {},
            "records": [],
            "sweep": [],
            "memcheck": {},
            "profiles": [],
            "slow_kernels": [],
        }
        run = self.data["run"]
        stamp = run["date"].replace(":", "").replace("-", "")[:15]
        self.folder = out
        self.path = None if out is None else out / f"{stamp}-{run['commit']}.json"

    @property
    def records(self) -> list[Record]:
        return self.data["records"]  # type: ignore[no-any-return]

    def left(self) -> float:
        """Seconds until the part that is running, or the run, has to end."""
        return self.until - time.monotonic()

    def put(self, records: Iterable[Record]) -> None:
        """Takes in a comparison as far as it is measured, in the place of what is there of it, and writes the file."""
        records = list(records)
        keys = {key(record) for record in records}
        self.data["records"] = [record for record in self.records if key(record) not in keys] + records
        self.flush(indent=None)

    def leave_out(self, what: str, why: str) -> None:
        """Notes what was not begun, or not finished, and why."""
        self.data["run"]["left_out"][what] = why
        print(f"  left out: {what}: {why}", flush=True)

    def paced(self, items: Iterable[Item], reserve: float = 0.0) -> Iterator[Item]:
        """The items, as long as the time left, less `reserve` seconds for what follows them, is no less than what the
        last one took. The others are noted as left out."""
        waiting, took = list(items), 0.0
        while waiting:
            left = self.left() - reserve
            if left < took or left <= 0:
                what = f"{self.part}: {waiting[0]}" + f" and {len(waiting) - 1} more" * (len(waiting) > 1)
                return self.leave_out(what, f"{max(0.0, left):.0f} s left, the one before took {took:.0f} s")
            start = time.monotonic()
            yield waiting.pop(0)
            took = time.monotonic() - start

    def flush(self, indent: int | None = 1) -> None:
        """Writes what there is; a reader never sees half a file. Without `indent` it is ten times as fast."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=indent) + "\n")
        part.replace(self.path)


def _invocation() -> str:
    """The command line, without the place that results go to (a path of the machine)."""
    words = list(sys.argv[1:])
    for flag in ("--out", "--commit"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    name = Path(sys.argv[0]).stem
    if name in ("gpu", "cpu"):
        return " ".join(["python -m", f"benchmarks.{name}", *words])
    return " ".join(["pytest benchmarks"] if "pytest" in sys.modules else [name])


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError if it is not one."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: not a result file of schema {SCHEMA}")
    return data


def load_folder(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every result file under a folder, oldest run first, as (device slug, data). Plan tables may lie beside them."""
    paths = [path for path in sorted(folder.glob("*/*.json")) if not path.name.startswith("plans-")]
    found = [(path.parent.name, load(path)) for path in paths]
    yield from sorted(found, key=lambda item: item[1]["run"]["date"])


def key(record: Record) -> tuple[Any, ...]:
    """What was measured together: records of one run with equal keys are ratios of each other."""
    size = record["model"]["name"] if "model" in record else (record["m"], tuple(record["n"]), record["k"])
    layers = record["model"]["layers"] if "model" in record else 0
    rank = 0 if "model" in record else record["r"]
    return (record["suite"], record["mode"], size, layers, rank, record["dtype"])


MEASURED = ("ms", "largest", "gains")  # what a finished record has one of


def newest(runs: Iterable[dict[str, Any]]) -> list[Record]:
    """The records of a device's runs, each comparison taken from the newest run that measured something of it; what a
    run was cut off from measuring is left out."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for data in runs:
        own: dict[tuple[Any, ...], list[Record]] = {}
        for record in data["records"]:
            if any(field in record for field in (*MEASURED, "withheld")):
                own.setdefault(key(record), []).append(record)
        groups.update({k: g for k, g in own.items() if k not in groups or any(f in r for r in g for f in MEASURED)})
    return [record for records in groups.values() for record in records]
