"""A user's mistake is one clear line on stderr and exit code 2; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Genft, Result

STAGES = ("importing torch, transformers and TRL", "reading the data")


def _refused(done: Result, *words: str) -> None:
    assert done.code == 2, done.err
    lines = [line for line in done.err.splitlines() if line not in STAGES]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("genft: error: ")
    assert "Traceback" not in done.err
    assert done.out == ""
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "./no/such/model"), ("--model ./no/such/model", "no such directory")),
        (("--model", "no-such-model"), ("--model no-such-model", "cannot be read from the Hub")),
        (("--model", "."), ("no config.json",)),
        (("--dataset", "missing.txt"), ("--dataset missing.txt", "no such file")),
        (("--dataset", "nobody/nothing"), ("--dataset nobody/nothing", "no such file")),
        (("--dataset", "table.csv"), ("--dataset table.csv", "question, answer", "messages")),
        (("--calibration_batches", "2"), ("--calibration_batches", "wegeft does not select")),
        (("--method", "grft", "--calibration_batches", "0"), ("--calibration_batches 0", "at least 1")),
        (("--method", "grft", "--k", "4000"), ("--method grft", "got 4000", "at most")),
        (("--method", "lorra"), ("--method lorra", "wegeft", "peft-lora", "full")),
        (("--target_modules", "q_proj", "w_proj"), ("--target_modules w_proj", "down_proj", "q_proj")),
        (("--target_modules", ".*nothing.*"), ("--target_modules .*nothing.*",)),
        (("--target_modules", "input_layernorm"), ("input_layernorm",)),
        (("--r", "0"), ("--r 0", "at least 1")),
        (("--r", "two"), ("--r", "two")),
        (("--alpha", "nan"), ("--alpha",)),
        (("--method", "gift", "--alpha", "3"), ("--alpha", "gift")),
        (("--rank_pattern", "{q_proj: 0}"), ("rank_pattern",)),
        (("--tied_modules", "[[q_prj]]"), ("--method wegeft", "q_prj", "match none")),
        (("--lora_alpha", "3"), ("unknown option --lora_alpha",)),
        (("--backend", "cuda"), ("--backend", "triton")),
        (("--learning_rate", "0"), ("--learning_rate 0", "above 0")),
        (("--learning_rate", "inf"), ("--learning_rate inf",)),
        (("--learning_rat", "1"), ("unknown option --learning_rat; did you mean --learning_rate?",)),
        (("--max_steps", "0"), ("--max_steps 0",)),
        (("--num_train_epochs", "0"), ("--num_train_epochs 0",)),
        (("--per_device_train_batch_size", "0"), ("--per_device_train_batch_size 0",)),
        (("--gradient_accumulation_steps", "0"), ("--gradient_accumulation_steps 0",)),
        (("--max_length", "4"), ("--max_length 4", "at least 8")),
        (("--max_length", "129"), ("--max_length 129", "at most 128")),
        (("--warmup_steps", "-1"), ("warmup_steps",)),
        (("--checkpoint_minutes", "-1"), ("--checkpoint_minutes -1",)),
        (("--early_stopping_patience", "0"), ("--early_stopping_patience 0",)),
        (("--eval_fraction", "1"), ("--eval_fraction 1",)),
        (("--dtype", "float8"), ("--dtype", "bfloat16")),
        (("--optim", "sgdd"), ("--optim", "sgdd")),
        (("--config", "missing.yaml"), ("--config missing.yaml", "No such file")),
        (("--config", "list.yaml"), ("--config list.yaml", "name: value")),
        (("--config", "wrong.yaml"), ("--config: unknown max_step; did you mean max_steps?",)),
        (("--config",), ("--config: expected one argument",)),
        (("--resume",), ("--resume", "no run")),
        (("--resume", "--overwrite"), ("--resume", "--overwrite")),
        (("--output", "empty.txt"), ("--output empty.txt", "file")),
        (("--output", "empty.txt/below"), ("--output empty.txt/below",)),
        (("--output", "full"), ("--output full", "not empty")),
        (("--output", "full", "--overwrite"), ("--output full", "not empty")),
        (("--nonsense",), ("--nonsense",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes(genft: Genft, llama: Path, prose: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    Path("empty.txt").touch()
    Path("table.csv").write_text("question,answer\n1,2\n")
    Path("list.yaml").write_text("- 1\n")
    Path("wrong.yaml").write_text("max_step: 3\n")
    Path("full").mkdir()
    Path("full/precious").touch()
    before = sorted(Path().rglob("*"))
    given = {"--model": str(llama), "--dataset": str(prose), "--output": "out"}
    for name in given.keys() & set(options):
        del given[name]
    _refused(genft("finetune", *(word for pair in given.items() for word in pair), *options), *words)
    assert sorted(Path().rglob("*")) == before


def test_what_is_missing(genft: Genft, llama: Path, prose: Path) -> None:
    _refused(genft("finetune"), "--model is missing: a local model directory")
    _refused(genft("finetune", "--config", "wrong.yaml"), "--config wrong.yaml")
    _refused(genft("finetune", "--model", llama), "--dataset is missing", ".jsonl")
    _refused(genft("finetun"), "finetun", "doctor")


def test_demo_without_a_place(genft: Genft) -> None:
    Path("file").touch()
    _refused(genft("demo", "--output", "file", "--cache-dir", "cache"), "--output file")
    _refused(genft("demo", "--output", "out", "--cache-dir", "file/cache"), "--cache-dir file/cache")
    _refused(genft("demo", "--methods", "sas", "lorra", "peft-lora"), "--methods lorra", "wegeft, gift")
    _refused(genft("demo", "--methods", "sas"), "--methods", "peft-lora is missing")


def test_triton_without_a_gpu(genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _refused(genft("finetune", "--model", llama, "--dataset", prose, "--backend", "triton"), "--backend triton")
    assert not Path("runs").exists()


def test_tokenizers(genft: Genft, mute_llama: Path, narrow_llama: Path, prose: Path) -> None:
    _refused(genft("finetune", "--model", mute_llama, "--dataset", prose), "its tokenizer cannot be read")
    _refused(genft("finetune", "--model", narrow_llama, "--dataset", prose), "259 tokens", "only 100")


def test_resume_needs_the_same_options_and_a_checkpoint(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, "--target_modules", "q_proj", "--max_steps", 1)
    common += ("--max_length", 32, "--output", "out", "--no_verify", "--save_strategy", "no")
    assert genft(*common).code == 0
    _refused(genft(*common), "--output out", "--overwrite")
    _refused(genft(*common, "--resume"), "no whole checkpoint")
    _refused(genft(*common, "--resume", "--r", 3), "started with no --r, not with --r 3")


def test_failure_in_training_is_one_line_and_leaves_nothing(
    genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genft_cli import training

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training.Progress, "on_step_end", fails)
    common = ("finetune", "--model", llama, "--dataset", prose, "--output", "out")
    done = genft(*common)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "genft: RuntimeError: out of memory (--debug shows where)"
    assert not Path("out").exists()
    with pytest.raises(RuntimeError, match="out of memory"):
        genft(*common, "--debug")


def test_damaged_weights(genft: Genft, llama: Path, prose: Path) -> None:
    import shutil

    shutil.copytree(llama, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"not a tensor")
    done = genft("finetune", "--model", "damaged", "--dataset", prose, "--output", "out")
    assert done.code == 2
    assert "--model damaged: its weights cannot be read" in done.err.splitlines()[-1]
    assert not Path("out").exists()
