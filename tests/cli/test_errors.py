"""A user's mistake is one clear line on stderr and exit code 2; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Genft, Result


def _refused(done: Result, *words: str) -> None:
    assert done.code == 2, done.err
    lines = done.err.splitlines()
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
        (("--dataset", "empty.txt"), ("--dataset empty.txt", "contains no text")),
        (("--dataset", "bad.jsonl"), ("--dataset bad.jsonl", "line 3", "not JSON")),
        (("--dataset", "tiny.txt"), ("too small",)),
        (("--eval-dataset", "missing.txt"), ("missing.txt", "no such file")),
        (("--calibration-batches", "2"), ("--calibration-batches", "wegeft does not select")),
        (("--method", "grft", "--calibration-batches", "0"), ("--calibration-batches 0", "at least 1")),
        (("--method", "grft", "--config", "k=4000"), ("--method grft", "got 4000", "at most")),
        (("--method", "lorra"), ("--method lorra", "wegeft", "peft-lora", "full")),
        (("--target-modules", "q_proj", "w_proj"), ("--target-modules w_proj", "down_proj", "q_proj")),
        (("--target-modules", ".*nothing.*"), ("--target-modules .*nothing.*",)),
        (("--target-modules", "input_layernorm"), ("input_layernorm",)),
        (("--r", "0"), ("--r 0", "at least 1")),
        (("--r", "-3"), ("--r -3",)),
        (("--r", "two"), ("--r", "two")),
        (("--alpha", "nan"), ("--alpha",)),
        (("--dropout", "1"), ("--dropout 1",)),
        (("--method", "gift", "--alpha", "3"), ("--alpha", "gift")),
        (("--config", "oops"), ("--config oops", "KEY=VALUE")),
        (("--config", "rank=3"), ("--config rank", "wegeft_alpha")),
        (("--config", "tied_modules=7"), ("tied_modules",)),
        (("--config", "rank_pattern={'q_proj': 0}"), ("rank_pattern",)),
        (("--config", "tied_modules=[['q_prj']]"), ("--method wegeft", "q_prj", "match none")),
        (("--backend", "cuda"), ("--backend", "triton")),
        (("--lr", "0"), ("--lr 0", "above 0")),
        (("--lr", "inf"), ("--lr inf",)),
        (("--steps", "0"), ("--steps 0",)),
        (("--epochs", "0"), ("--epochs 0",)),
        (("--steps", "2", "--epochs", "1"), ("--epochs", "--steps")),
        (("--batch-size", "0"), ("--batch-size 0",)),
        (("--grad-accumulation", "0"), ("--grad-accumulation 0",)),
        (("--seq-len", "4"), ("--seq-len 4", "at least 8")),
        (("--seq-len", "129"), ("--seq-len 129", "at most 128")),
        (("--warmup", "-1"), ("--warmup -1",)),
        (("--eval-fraction", "1"), ("--eval-fraction 1",)),
        (("--seed", "-1"), ("--seed -1",)),
        (("--dtype", "float8"), ("--dtype float8", "bfloat16")),
        (("--dtype", "float16"), ("--dtype float16", "GPU")),
        (("--device", "tpu"), ("--device tpu",)),
        (("--save-every", "-1"), ("--save-every -1",)),
        (("--byte-level",), ("--byte-level", "tokenizer of its own")),
        (("--cache-dir", "x"), ("--cache-dir", "demo")),
        (("--methods", "wegeft", "peft-lora"), ("--methods", "demo")),
        (("--resume",), ("--resume", "no run")),
        (("--resume", "--overwrite"), ("--resume", "--overwrite")),
        (("--output", "empty.txt"), ("--output empty.txt", "file")),
        (("--output", "empty.txt/below"), ("--output empty.txt/below",)),
        (("--output", "full"), ("--output full", "not empty")),
        (("--output", "full", "--overwrite"), ("--output full", "not empty")),
        (("--nonsense",), ("--nonsense",)),
        (("--ste", "3"), ("--ste",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes(genft: Genft, llama: Path, prose: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    Path("empty.txt").touch()
    Path("tiny.txt").write_text("word")
    Path("bad.jsonl").write_text('{"text": "a"}\n\n{"text": "b",}\n')
    Path("full").mkdir()
    Path("full/precious").touch()
    before = sorted(Path().rglob("*"))
    given = {"--model": str(llama), "--dataset": str(prose), "--device": "cpu", "--output": "out"}
    for name in given.keys() & set(options):
        del given[name]
    _refused(genft("finetune", *(word for pair in given.items() for word in pair), *options), *words)
    assert sorted(Path().rglob("*")) == before


def test_half_of_what_is_needed(genft: Genft, llama: Path, prose: Path) -> None:
    _refused(genft("finetune", "--model", llama), "--dataset is missing")
    _refused(genft("finetune", "--dataset", prose), "--model is missing")
    _refused(genft("finetune", "--r", 3), "--model is missing")
    _refused(genft("finetun"), "finetun", "doctor")


def test_demo_without_a_place(genft: Genft) -> None:
    Path("file").touch()
    _refused(genft("finetune", "--output", "file", "--cache-dir", "cache"), "--output file")
    _refused(genft("finetune", "--output", "out", "--cache-dir", "file/cache"), "--cache-dir file/cache")
    _refused(genft("finetune", "--methods", "sas", "lorra", "peft-lora"), "--methods lorra", "wegeft, gift")
    _refused(genft("finetune", "--methods", "sas"), "--methods", "peft-lora is missing")


def test_triton_without_a_gpu(genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = genft("finetune", "--model", llama, "--dataset", prose, "--device", "cpu", "--backend", "triton")
    _refused(done, "--backend triton")
    assert not Path("runs").exists()


def test_no_tokenizer(genft: Genft, mute_llama: Path, narrow_llama: Path, prose: Path) -> None:
    _refused(genft("finetune", "--model", mute_llama, "--dataset", prose), "has no tokenizer", "--byte-level")
    done = genft("finetune", "--model", narrow_llama, "--dataset", prose, "--byte-level")
    _refused(done, "259 tokens", "only 100")


def test_resume_needs_the_same_job_and_a_checkpoint(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, "--target-modules", "q_proj", "--steps", 1)
    common += ("--seq-len", 32, "--device", "cpu", "--output", "out", "--no-verify")
    assert genft(*common).code == 0
    _refused(genft(*common), "--output out", "--overwrite")
    _refused(genft(*common, "--resume"), "is finished")
    Path("out/run.json").unlink()
    _refused(genft(*common, "--resume"), "no complete checkpoint", "--save-every")
    _refused(genft(*common, "--resume", "--r", 3), "--r None, not 3")


def test_failure_in_training_leaves_nothing(
    genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genft_cli import training

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training._Watch, "on_step_end", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        genft("finetune", "--model", llama, "--dataset", prose, "--device", "cpu", "--output", "out")
    assert not Path("out").exists()


def test_damaged_weights(genft: Genft, llama: Path, prose: Path) -> None:
    import shutil

    shutil.copytree(llama, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"not a tensor")
    done = genft("finetune", "--model", "damaged", "--dataset", prose, "--device", "cpu", "--output", "out")
    _refused(done, "--model damaged", "weights cannot be read")
    assert not Path("out").exists()
