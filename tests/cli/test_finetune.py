"""`genft finetune` for a user's own model and data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from genft_cli import training
from genft_cli.data import byte_tokenizer, encode, read_records
from genft_cli.verify import verify
from genft_modules import METHODS
from tests.cli.conftest import Genft

QUICK = ("--steps", 4, "--batch-size", 2, "--seq-len", 32, "--device", "cpu", "--lr", 1e-2)
PROJECTIONS = ("--target-modules", "q_proj", "v_proj")


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    path = run / "model" / "model.safetensors"
    return load_file(str(path if path.exists() else run / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", [*METHODS, "genft-gelu", "peft-lora", "full"])
def test_every_method_trains_and_saves(genft: Genft, llama: Path, prose: Path, tmp_path: Path, method: str) -> None:
    options = () if method == "full" else PROJECTIONS
    before = {path: path.read_bytes() for path in llama.iterdir()}
    done = genft("finetune", "--model", llama, "--dataset", prose, "--method", method, *options, *QUICK, "--no-verify")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / method
    record = json.loads((run / "run.json").read_text())
    assert record["bits_per_byte_after"] < record["bits_per_byte_before"]
    assert record["steps"] == 4
    assert record["peak_memory_mib"] > 50
    assert 0 < record["trainable_parameters"] <= record["all_parameters"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert _tensors(run)
    assert not list(run.glob("checkpoint-*"))
    assert not list(run.glob(".partial"))
    assert f"{record['bits_per_byte_after']:.4f} after" in done.out
    assert {path: path.read_bytes() for path in llama.iterdir()} == before


def test_a_saved_run_is_reloaded_in_a_new_process(genft: Genft, llama: Path, texts: Path) -> None:
    done = genft(
        "finetune", "--model", llama, "--dataset", texts, "--method", "wegeft", "--r", 4, "--alpha", 8,
        "--dropout", 0.1, *PROJECTIONS, *QUICK, "--output", "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "logits agree" in done.out
    reload = json.loads(Path("out/run.json").read_text())["reload"]
    assert reload["agree"]
    assert reload["loaded"] < 1e-5 * reload["largest_logit"]


def test_a_reload_that_differs_is_an_error(genft: Genft, llama: Path, texts: Path, monkeypatch: Any) -> None:
    from genft_cli import verify

    found = {"loaded": 1.0, "merged": 1.0, "largest_logit": 2.0, "agree": False}
    monkeypatch.setattr(verify, "verify_in_new_process", lambda runs: [found] * len(runs))
    done = genft("finetune", "--model", llama, "--dataset", texts, *PROJECTIONS, *QUICK, "--output", "out")
    assert done.code == 1
    assert "LOGITS DIFFER" in done.out
    assert Path("out/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_verify_sees_changed_tensors(genft: Genft, llama: Path, texts: Path, method: str) -> None:
    options = () if method == "full" else PROJECTIONS
    common = ("--model", llama, "--dataset", texts, "--method", method, *options, *QUICK, "--no-verify")
    assert genft("finetune", *common, "--output", "out").code == 0
    found = verify(Path("out"))
    assert found["agree"]
    assert (found["merged"] is None) == (method == "full")
    path = Path("out/model/model.safetensors" if method == "full" else "out/adapter/adapter_model.safetensors")
    save_file({name: 1.5 * value for name, value in load_file(str(path)).items()}, str(path), {"format": "pt"})
    assert not verify(Path("out"))["agree"]


def test_prompts_are_not_learned(genft: Genft, llama: Path, pairs: Path) -> None:
    done = genft(
        "finetune", "--model", llama, "--dataset", pairs, "--method", "full", *QUICK, "--eval-dataset", pairs,
        "--evaluations", 1, "--no-verify", "--output", "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(Path("out/run.json").read_text())
    windows = encode(read_records(str(pairs)), byte_tokenizer(), 32)
    assert windows.targets < 0.3 * sum(len(window["input_ids"]) for window in windows)
    model = AutoModelForCausalLM.from_pretrained("out/model")
    bits = training.bits_per_byte(model, windows, 4, 258)
    assert bits == pytest.approx(record["bits_per_byte_after"], rel=1e-4)


def test_bits_per_byte_is_the_mean_over_all_predicted_tokens(llama: Path, texts: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(llama))
    windows = encode(read_records(str(texts)), byte_tokenizer(), 24)
    nats = 0.0
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window["input_ids"][None]).logits[0, :-1].double()
        nats += float(torch.nn.functional.cross_entropy(logits, window["labels"][1:], reduction="sum"))
    expected = nats / torch.log(torch.tensor(2.0)).item() / windows.bytes
    assert training.bits_per_byte(model, windows, 4, 258) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["wegeft", "grft", "lora", "full"])
def test_resume_continues_and_equals_the_uninterrupted_run(
    genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = () if method == "full" else ("--r", 4, *PROJECTIONS)
    if method in ("wegeft", "lora"):
        options += ("--dropout", 0.2)
    common = ("finetune", "--model", llama, "--dataset", prose, "--method", method, *options, *QUICK, "--no-verify")
    assert genft(*common, "--output", "whole", "--save-every", 2).code == 0
    step_end = training._Watch.on_step_end
    steps: list[int] = []

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt
        step_end(self, args, state, control, **kwargs)

    def counted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Watch, "on_step_end", interrupted)
    done = genft(*common, "--output", "parts", "--save-every", 2)
    assert done.code == 130
    assert "checkpoint-2" in done.err
    assert not Path("parts/run.json").exists()
    assert not Path("parts/adapter").exists()

    # A checkpoint that was being written when the power went.
    (Path("parts") / "checkpoint-3").mkdir()
    (Path("parts") / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3')

    monkeypatch.setattr(training._Watch, "on_step_end", counted)
    done = genft(*common, "--output", "parts", "--save-every", 2, "--resume")
    assert done.code == 0, done.err
    assert steps == [3, 4]
    whole, parts = _tensors(Path("whole")), _tensors(Path("parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    records = [json.loads(Path(run, "run.json").read_text()) for run in ("whole", "parts")]
    for name in ("training_curve", "held_out_curve", "bits_per_byte_before"):
        assert records[0][name] == records[1][name]
    assert not list(Path("parts").glob("checkpoint-*"))


def test_same_seed_same_run(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no-verify")
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert genft(*common, "--output", output, "--seed", seed).code == 0
    a, b, c = (_tensors(Path(run)) for run in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_overwrite_replaces_a_run(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no-verify", "--output", "out")
    assert genft(*common).code == 0
    Path("out/left-over").touch()
    assert genft(*common, "--overwrite").code == 0
    assert not Path("out/left-over").exists()


def test_grft_selects_by_gradients_first(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no-verify", "--method", "grft")
    found = {}
    for seed, batches, orientation in ((0, 2, "row"), (1, 2, "row"), (0, 3, "column")):
        fields = ("--config", f"orientation={orientation}", "penalty=1e-3", "penalty_modules=['v_proj']")
        options = ("--r", 5, "--seed", seed, "--calibration-batches", batches, *fields)
        done = genft(*common, *options, "--output", f"out{len(found)}")
        assert done.code == 0, done.err
        assert "selecting slices" in done.err
        config = json.loads(Path(f"out{len(found)}/adapter/adapter_config.json").read_text())
        assert (config["k"], config["orientation"], config["penalty"]) == (5, orientation, 1e-3)
        tensors = _tensors(Path(f"out{len(found)}"))
        found[len(found)] = {name: t.tolist() for name, t in tensors.items() if name.endswith("indices")}
        assert all(len(chosen) == 5 for chosen in found[len(found) - 1].values())
    assert len(found[0]) == 4
    assert found[0] != found[1]  # other batches
    assert found[0] != found[2]
    assert genft(*common, "--config", "selection=random", "--output", "random").code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bfloat16"),
        ("--gradient-checkpointing",),
        ("--grad-accumulation", 2),
        ("--backend", "reference"),
        ("--method", "gift", "--config", "block=mlp", "in_projection_bias=True"),
        ("--method", "lora", "--target-modules", ".*(gate|up)_proj"),
        ("--method", "grft", "--dtype", "bfloat16", "--gradient-checkpointing", "--calibration-batches", 2),
        ("--eval-fraction", 0.3, "--warmup", 2),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_options(genft: Genft, llama: Path, prose: Path, options: tuple[object, ...]) -> None:
    targets = () if "--target-modules" in options else PROJECTIONS
    done = genft(
        "finetune", "--model", llama, "--dataset", prose, *targets, *QUICK, *options, "--no-verify", "--output", "out"
    )
    assert done.code == 0, done.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["bits_per_byte_after"] < record["bits_per_byte_before"]


def test_epochs_decide_the_steps(genft: Genft, llama: Path, texts: Path) -> None:
    done = genft(
        "finetune", "--model", llama, "--dataset", texts, *PROJECTIONS, "--device", "cpu", "--batch-size", 2,
        "--grad-accumulation", 2, "--seq-len", 64, "--epochs", 2, "--no-verify", "--output", "out",
        "--eval-dataset", texts,
    )  # fmt: skip
    assert done.code == 0, done.err
    windows = encode(read_records(str(texts)), byte_tokenizer(), 64)
    assert json.loads(Path("out/run.json").read_text())["steps"] == math.ceil(2 * len(windows) / 4)


def test_bytes_for_a_model_without_tokenizer(genft: Genft, mute_llama: Path, prose: Path) -> None:
    done = genft(
        "finetune", "--model", mute_llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--byte-level", "--no-verify"
    )
    assert done.code == 0, done.err


def test_a_log_file_gets_lines(genft: Genft, llama: Path, prose: Path) -> None:
    done = genft("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no-verify")
    assert "\r" not in done.err
    assert all(len(line) <= 100 for line in done.err.splitlines())
    assert "wegeft" in done.err
    assert "4/4" in done.err
