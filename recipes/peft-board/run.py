"""Run our experiments with peft's own comparison of methods, `method_comparison/MetaMathQA` in peft's repository.

    python recipes/peft-board/run.py PEFT/method_comparison/MetaMathQA              # lists the experiments
    python recipes/peft-board/run.py PEFT/method_comparison/MetaMathQA all
    python recipes/peft-board/run.py PEFT/method_comparison/MetaMathQA genft-wegeft/llama-3.2-3B-rank64

The experiments are copied into the suite, and its unchanged `run.py` runs them, one process each, after
`import genft_modules`. The suite needs an accelerator, the model, the data and an editable install of peft.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE / "experiments"
SELECTION_BATCHES = 64  # of which GRFT selects its rows; ours


def names() -> list[str]:
    """The experiments, METHOD/NAME."""
    return sorted(
        path.parent.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.glob("*/*/adapter_config.json")
    )


def with_slices(get_model: Any, get_train_config: Any) -> Any:
    """The suite's `get_model`; a GRFT adapter also gets its rows, from the first batches of the training data. The
    time and the memory of the selection are part of the suite's figures."""

    def get(**kwargs: Any) -> Any:
        from genft_modules import needs_slices, select_slices

        model = get_model(**kwargs)
        if not needs_slices(model):
            return model
        import data  # type: ignore[import-not-found] # the suite's
        import utils  # type: ignore[import-not-found]

        settings = get_train_config("")
        tokenizer = utils.get_tokenizer(model_id=settings.model_id, max_seq_length=settings.max_seq_length)
        rows, _, _ = data.get_train_valid_test_datasets(
            tokenizer=tokenizer, query_template=settings.query_template, print_fn=print
        )

        def batch(start: int) -> dict[str, Any]:
            columns = {key: rows[start : start + settings.batch_size][key] for key in ("input_ids", "attention_mask")}
            tensors = tokenizer.pad(columns, return_tensors="pt").to(model.device)
            ignored = tensors["attention_mask"] == 0
            return {**tensors, "labels": tensors["input_ids"].masked_fill(ignored, -100)}

        starts = range(0, min(SELECTION_BATCHES * settings.batch_size, len(rows)), settings.batch_size)
        select_slices(model, (batch(start) for start in starts))
        return model

    return get


def run_here(experiment: str, options: list[str]) -> None:
    """In the suite's directory: what its `run.py` does with the experiment."""
    import genft_modules  # noqa: F401 - registers its methods with peft

    sys.path.insert(0, os.getcwd())
    import utils

    utils.get_model = with_slices(utils.get_model, utils.get_train_config)
    sys.argv = ["run.py", "-v", *options, f"experiments/{experiment}"]
    runpy.run_path("run.py", run_name="__main__")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, help="method_comparison/MetaMathQA in a clone of peft's repository")
    parser.add_argument("experiments", nargs="*", help="names of experiments, or all; none lists them")
    parser.add_argument("--clean", action="store_true", help="passed on: delete the checkpoint after the run")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = ["--clean"] if args.clean else []
    if args.here:
        run_here(args.experiments[0], options)
        return 0
    if missing := [
        name for name in ("run.py", "utils.py", "default_training_params.json") if not (args.suite / name).is_file()
    ]:
        parser.error(
            f"suite: {args.suite} has no {missing[0]}, expected method_comparison/MetaMathQA of peft's repository"
        )
    chosen = names() if args.experiments == ["all"] else args.experiments
    if unknown := [name for name in chosen if name not in names()]:
        parser.error(f"experiments: {unknown[0]} does not exist, expected some of {', '.join(names())}")
    if not chosen:
        print("\n".join(names()))
    failed = []
    for name in chosen:
        shutil.copytree(EXPERIMENTS / name, args.suite / "experiments" / name, dirs_exist_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), ".", name, "--here", *options]
        if subprocess.run(command, cwd=args.suite).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
