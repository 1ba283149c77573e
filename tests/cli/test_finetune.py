"""`genft finetune`, `dpo` and `grpo` for a user's own model and data."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from genft_cli import finetune, job, runs, training
from genft_cli.arguments import parse
from genft_cli.demo.bytes import byte_tokenizer
from genft_cli.verify import verify
from tests.cli.conftest import Genft
from tests.support.disks import small_files

QUICK = (
    "--max_steps", 4, "--per_device_train_batch_size", 2, "--max_length", 32, "--learning_rate", 1e-2,
    "--logging_steps", 1, "--gradient_checkpointing", "false",
)  # fmt: skip
PROJECTIONS = ("--target_modules", "q_proj", "v_proj")
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tensors(run: Path | str) -> dict[str, torch.Tensor]:
    path = Path(run) / "model.safetensors"
    return load_file(str(path if path.exists() else Path(run) / "adapter_model.safetensors"))


def record(run: Path | str) -> dict[str, Any]:
    return json.loads((Path(run) / "run.json").read_text())


def log(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


# One per form of ΔW, an alias, peft's own and none; the models' contract covers all methods.
@pytest.mark.parametrize("method", ["wegeft", "genft-gelu", "sas", "peft-lora", "full"])
def test_methods_train_and_save(genft: Genft, llama: Path, prose: Path, method: str) -> None:
    options = () if method == "full" else PROJECTIONS
    before = {path: path.read_bytes() for path in llama.iterdir()}
    done = genft("finetune", "--model", llama, "--dataset", prose, "--method", method, *options, *QUICK, "--no_verify")
    assert done.code == 0, done.err
    run = Path("runs") / method
    kept = record(run)
    assert kept["held_out_after"] < kept["held_out_before"]
    assert (kept["steps"], kept["learning_rate"]) == (4, 1e-2)
    assert kept["peak_memory_mib"] > 50
    assert 0 < kept["trainable_parameters"] <= kept["all_parameters"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert tensors(run)
    assert [row["step"] for row in log(run) if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in log(run) if "eval_loss" in row] == [0, 1, 2, 3, 4]
    assert f"{kept['held_out_after']:.4f} after" in done.out
    assert {path: path.read_bytes() for path in llama.iterdir()} == before


def test_a_saved_run_is_reloaded_in_a_new_process(genft: Genft, llama: Path, texts: Path) -> None:
    done = genft(
        "finetune", "--model", llama, "--dataset", texts, "--method", "wegeft", "--rank", 4, "--alpha", 8,
        "--dropout", 0.1, *PROJECTIONS, *QUICK, "--output", "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "logits agree" in done.out
    reload = record("out")["reload"]
    assert reload["agree"]
    assert reload["loaded"] < 1e-5 * reload["largest_logit"]


def test_a_reload_that_differs_is_an_error(genft: Genft, llama: Path, texts: Path, monkeypatch: Any) -> None:
    from genft_cli import verify

    found = {"loaded": 1.0, "merged": 1.0, "largest_logit": 2.0, "agree": False}
    monkeypatch.setattr(verify, "verify_in_new_process", lambda runs: [found] * len(runs))
    done = genft("finetune", "--model", llama, "--dataset", texts, *PROJECTIONS, *QUICK, "--output", "out")
    assert done.code == 1
    assert "LOGITS DIFFER" in done.out
    assert Path("out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_verify_sees_changed_tensors(genft: Genft, llama: Path, texts: Path, method: str) -> None:
    options = () if method == "full" else PROJECTIONS
    common = ("--model", llama, "--dataset", texts, "--method", method, *options, *QUICK, "--no_verify")
    assert genft("finetune", *common, "--output", "out").code == 0
    found = verify(Path("out"))
    assert found["agree"]
    assert (found["merged"] is None) == (method == "full")
    path = Path("out/model.safetensors" if method == "full" else "out/adapter_model.safetensors")
    save_file({name: 1.5 * value for name, value in load_file(str(path)).items()}, str(path), {"format": "pt"})
    assert not verify(Path("out"))["agree"]


# --- what is learned ---------------------------------------------------------------------------------------------


def labels(*words: object) -> list[list[int]]:
    """The labels of the training rows, as the trainer prepared them."""
    checked, tokenizer = finetune.check(parse("finetune", [str(word) for word in words]))
    return list(finetune._trainer(checked, tokenizer).train_dataset["labels"])


def test_only_the_completion_is_learned_and_a_cut_one_has_no_end(genft: Genft, llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "abc", "completion": "d" * 40}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", llama, "--dataset", "pairs.jsonl", "--eval_strategy", "no", *QUICK)
    short, long = labels(*common)
    assert short == [-100] * 3 + [*b"de", 257]
    assert long == [-100] * 3 + [*b"d"] * 29
    done = genft("finetune", *common, *PROJECTIONS, "--no_verify")
    assert "1 of 2 sequences reach --max_length 32" in done.err


def test_only_the_answers_of_a_chat_are_learned(genft: Genft, llama: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 4)
    common = ("--model", llama, "--dataset", "chat.jsonl", *QUICK, "--max_length", 64)
    done = genft("finetune", *common)
    assert done.code == 2
    assert "has messages, but the tokenizer has no chat template; name one with --chat_template_path" in done.err
    (tmp_path / "chat.jinja").write_text(CHATML)
    first, *_ = labels(*common, "--chat_template_path", "chat.jinja", "--assistant_only_loss")
    assert [label for label in first if label != -100] == [*b"Yo", 257]


def test_a_long_text_is_learned_to_its_end(genft: Genft, llama: Path, prose: Path) -> None:
    rows = labels("--model", llama, "--dataset", prose, "--eval_strategy", "no", *QUICK)
    assert sum(map(len, rows)) == len(prose.read_bytes()) + 1
    assert max(map(len, rows)) == 32


def test_preferences_and_rewards(genft: Genft, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{"prompt": "The cat is ", "chosen": "red", "rejected": "wet"}] * 8
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", llama, "--dataset", "pairs.jsonl", *PROJECTIONS, *QUICK, "--no_verify")
    done = genft("dpo", *common, "--output", "dpo")
    assert done.code == 0, done.err
    assert record("dpo")["held_out_after"] < record("dpo")["held_out_before"]
    Path("prompts.jsonl").write_text('{"prompt": "The cat is "}\n' * 8)
    Path("own_rewards.py").write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
    monkeypatch.syspath_prepend(".")
    few = ("--max_completion_length", 4, "--num_generations", 2, "--max_steps", 2, "--eval_strategy", "no")
    grpo = ("grpo", "--model", llama, "--dataset", "prompts.jsonl", *PROJECTIONS, "--per_device_train_batch_size", 2)
    done = genft(*grpo, *few, "--no_verify", "--output", "grpo", "--reward_funcs", "own_rewards.short")
    assert done.code == 0, done.err
    assert tensors("grpo")
    done = genft(*grpo, *few, "--output", "none")
    assert (done.code, "--reward_funcs is missing" in done.err) == (2, True)


# --- stopping and going on ---------------------------------------------------------------------------------------


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    step_begin = training.Progress.on_step_begin

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)
        step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Progress, "on_step_begin", interrupted)


@pytest.mark.parametrize("method", ["wegeft", "grft", "full"])
def test_resume_continues_and_equals_the_uninterrupted_run(
    genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = () if method == "full" else ("--r", 4, *PROJECTIONS)
    if method == "wegeft":
        options += ("--dropout", 0.2)
    common = ("finetune", "--model", llama, "--dataset", prose, "--method", method, *options, *QUICK, "--no_verify")
    assert genft(*common, "--output", "whole", "--save_steps", 2).code == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        done = genft(*common, "--output", "parts", "--save_steps", 2)
    assert done.code == 130
    assert "the last checkpoint is parts/checkpoint-3" in done.err
    assert not Path("parts/run.json").exists()

    # A checkpoint that was being written when the power went, and one that the disk has damaged.
    shutil.copytree("parts/checkpoint-2", "parts/checkpoint-9")
    with Path("parts/checkpoint-3/optimizer.pt").open("r+b") as file:
        file.truncate(100)
    steps: list[int] = []
    step_begin = training.Progress.on_step_begin

    def counted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps.append(state.global_step)
        step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Progress, "on_step_begin", counted)
    done = genft(*common, "--output", "parts", "--save_steps", 2, "--resume")
    assert done.code == 0, done.err
    assert "checkpoint-9 is not whole and is left out: trainer_state.json is of another step" in done.err
    assert "checkpoint-3 is not whole and is left out: optimizer.pt is damaged" in done.err
    assert steps == [2, 3]
    whole, parts = tensors("whole"), tensors("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in ("training_curve", "held_out_curve", "held_out_before"):
        assert record("whole")[name] == record("parts")[name]


def test_every_file_of_a_checkpoint_counts(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output", "out")
    assert genft(*common, "--max_steps", 1).code == 0
    path = Path("out/checkpoint-1")
    assert runs.fault_of(path) is None
    for name in ("trainer_state.json", "scheduler.pt", "rng_state.pth", "optimizer.pt", "adapter_model.safetensors"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-50])
        assert name in str(runs.fault_of(path))
        (path / name).unlink()
        assert runs.fault_of(path) in (f"{name} is missing", "the weights are missing")
        (path / name).write_bytes(content)


def test_a_run_asked_to_end_has_a_checkpoint(genft: Genft, llama: Path, prose: Path, monkeypatch: Any) -> None:
    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    done = genft("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--output", "out")
    assert done.code == 130
    assert "out/checkpoint-2; to go on from there, add --resume to the same command" in done.err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_checkpoints_by_the_clock(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output", "out")
    assert genft(*common, "--checkpoint_minutes", 1e-9, "--save_total_limit", 9).code == 0
    assert len(runs.checkpoints(Path("out"))) == 4


def test_a_run_that_diverges_stops_and_names_the_last_good_checkpoint(
    genft: Genft, llama: Path, prose: Path, monkeypatch: Any
) -> None:
    step = training.PenaltyMixin.compute_loss

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        return found * float("nan") if self.model.training and self.state.global_step == 2 else found

    monkeypatch.setattr(training.TrainerMixin, "compute_loss", broken, raising=False)
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--output", "out")
    done = genft(*common, "--save_steps", 1)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("genft: the loss is nan at step 3; a lower --learning_rate")
    assert "the last checkpoint is out/checkpoint-2" in done.err
    assert not Path("out/adapter_model.safetensors").exists()
    assert [path.name for path in runs.checkpoints(Path("out"))] == ["checkpoint-1", "checkpoint-2"]


def test_a_loss_that_does_not_fall_is_mentioned() -> None:
    assert training.flat([(step, 2.0 - 1e-4 * step) for step in range(20)])
    assert training.flat([(step, 2.0 - 1e-2 * step) for step in range(20)]) is None
    assert training.flat([(1, 1.0), (2, 1.0)]) is None


def full_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be saved in directories of this name."""
    save = job.save_adapter

    def full(model: Any, directory: Path) -> None:
        if directory.name == name:
            raise OSError(28, "No space left on device", str(directory))
        save(model, directory)

    monkeypatch.setattr(job, "save_adapter", full)


def test_a_full_disk_loses_no_training(genft: Genft, llama: Path, prose: Path, monkeypatch: Any) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output")
    with monkeypatch.context() as patch:
        full_at("out", patch)
        done = genft(*common, "out")
    assert (done.code, done.err.splitlines()[-1]) == (1, "genft: out: No space left on device")
    assert "the last checkpoint is out/checkpoint-4" in done.err
    saved = load_file("out/checkpoint-4/adapter_model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(training.TrainerMixin, "training_step", None, raising=False)  # nothing is trained any more
        done = genft(*common, "out", "--resume")
    assert done.code == 0, done.err
    assert all(torch.equal(value, saved[name]) for name, value in tensors("out").items())
    assert record("out")["steps"] == 4


def test_a_full_disk_without_a_checkpoint(genft: Genft, llama: Path, prose: Path, monkeypatch: Any) -> None:
    full_at("out", monkeypatch)
    monkeypatch.setattr(job.tempfile, "mkdtemp", lambda prefix: str(Path("elsewhere").absolute()))
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output", "out")
    done = genft(*common, "--save_strategy", "no")
    assert (done.code, done.err.splitlines()[-1]) == (1, "genft: out: No space left on device")
    assert f"what was trained until step 4 is saved in {Path('elsewhere').absolute()}" in done.err
    assert tensors("elsewhere")
    assert not Path("out").exists()


def test_a_checkpoint_that_cannot_be_written_is_removed(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output", "out")
    with small_files(50_000):  # the adapter fits, the optimizer's state does not
        done = genft(*common)
    assert (done.code, done.err.splitlines()[-1]) == (1, "genft: out: Input/output error")
    rescued = re.search(r"what was trained until step 4 is saved in (\S+)", done.err)
    assert rescued
    assert tensors(rescued[1])
    shutil.rmtree(rescued[1])
    assert not Path("out").exists()


def test_a_directory_that_vanishes_is_not_made_again(
    genft: Genft, llama: Path, prose: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    step_begin = training.Progress.on_step_begin

    def vanishing(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            shutil.rmtree("out")
        step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.Progress, "on_step_begin", vanishing)
    monkeypatch.setattr(job.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "elsewhere"))
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--logging_steps", 9)
    done = genft(*common, "--eval_strategy", "no", "--output", "out")
    assert (done.code, done.err.splitlines()[-1]) == (1, "genft: out: the run's directory is gone")
    assert tensors("elsewhere")
    assert not Path("out").exists()


def test_overwrite_replaces_a_run_and_nothing_else(
    genft: Genft, llama: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ".": the directory stays, too. The earlier run comes back if the new one fails before its first checkpoint,
    and waits beside it if it fails later."""
    Path("out").mkdir()
    monkeypatch.chdir("out")
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output", ".")
    assert genft(*common).code == 0
    assert genft(*common).code == 2
    mine = ["mine.txt", "adapter_notes.txt", "tokenizer_notes.txt", "vocab.mine", "checkpoint-notes/mine.txt"]
    Path("checkpoint-notes").mkdir()
    for name in mine:
        Path(name).write_text("mine")
    Path("README.md").write_text(Path("README.md").read_text() + "\nmine\n")

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = content()
    with monkeypatch.context() as patch:
        patch.setattr(training.TrainerMixin, "training_step", None, raising=False)
        assert genft(*common, "--overwrite").code == 1
    assert content() == before
    with monkeypatch.context() as patch:
        full_at("", patch)
        done = genft(*common, "--overwrite", "--max_steps", 2)
    assert done.code == 1
    assert "the run that this one was to replace is kept in .former" in done.err
    assert Path(".former/checkpoint-4").is_dir()
    assert genft(*common, "--overwrite", "--max_steps", 1).code == 0
    assert [path.name for path in runs.checkpoints(Path())] == ["checkpoint-1"]
    assert not Path(".former").exists()
    assert {Path(name).read_text() for name in mine} == {"mine"}
    assert "mine" in Path("README.md").read_text().splitlines()


def test_options_of_others_are_no_run(genft: Genft, llama: Path, prose: Path) -> None:
    Path("out").mkdir()
    Path("out/options.yaml").write_text("max_steps: 3\n")
    done = genft("finetune", "--model", llama, "--dataset", prose, "--output", "out", "--overwrite")
    assert (done.code, "exists and is not empty" in done.err) == (2, True)
    assert Path("out/options.yaml").read_text() == "max_steps: 3\n"


@pytest.mark.parametrize("targets", ["all-linear", "experts.down_proj"])
def test_stacked_experts(genft: Genft, prose: Path, targets: str) -> None:
    config = MixtralConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained("moe")
    byte_tokenizer().save_pretrained("moe")
    run = ["--model", "moe", "--dataset", prose, "--method", "wegeft", "--max_steps", 2, "--max_length", 32]
    done = genft("finetune", *run, "--no_verify", "--target_modules", targets, "--output", "run")
    assert done.code == 0, done.err
    assert verify(Path("run"))["agree"]
    adapted = [name for name in tensors("run") if name.endswith("_experts.phi")]
    assert len(adapted) == (2 if targets == "all-linear" else 1)
    done = genft("finetune", *run, "--target_modules", "experts.up_proj", "--output", "other")
    assert done.code == 2
    assert "--target_modules experts.up_proj: no such module" in done.err


# --- options -----------------------------------------------------------------------------------------------------


def test_a_run_can_be_repeated_from_its_options(genft: Genft, llama: Path, prose: Path) -> None:
    Path("run.yaml").write_text(
        f"model: {llama}\ndataset: {prose}\nmethod: wegeft\nr: 4\nwegeft_alpha: 16\ntied_modules: [[q_proj]]\n"
        "target_modules: [q_proj, v_proj]\nlearning_rate: 1e-2\nmax_steps: 4\nmax_length: 32\nverify: false\n"
        "per_device_train_batch_size: 4\n"
    )
    assert genft("finetune", "--config", "run.yaml", "--output", "a", "--per_device_train_batch_size", 2).code == 0
    given = yaml.safe_load(Path("a/options.yaml").read_text())
    assert (given["per_device_train_batch_size"], given["wegeft_alpha"], given["learning_rate"]) == (2, 16, 1e-2)
    assert json.loads(Path("a/adapter_config.json").read_text())["tied_modules"] == [["q_proj"]]
    done = genft("finetune", "--config", "a/options.yaml", "--output", "b")
    assert done.code == 0, done.err
    assert all(torch.equal(value, tensors("b")[name]) for name, value in tensors("a").items())
    assert genft("finetune", "--config", "a/options.yaml", "--output", "c", "--seed", 1).code == 0
    assert not all(torch.equal(value, tensors("c")[name]) for name, value in tensors("a").items())


def test_grft_selects_by_gradients_first(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--method", "grft")
    found = {}
    for seed, batches, orientation in ((0, 2, "row"), (1, 3, "column")):
        fields = ("--orientation", orientation, "--penalty", 1e-3, "--penalty_modules", "[v_proj]")
        options = ("--r", 5, "--seed", seed, "--calibration_batches", batches, *fields)
        done = genft(*common, *options, "--output", f"out{len(found)}")
        assert done.code == 0, done.err
        assert "selecting slices" in done.err
        config = json.loads(Path(f"out{len(found)}/adapter_config.json").read_text())
        assert (config["k"], config["orientation"], config["penalty"]) == (5, orientation, 1e-3)
        chosen = {k: v.tolist() for k, v in tensors(f"out{len(found)}").items() if k.endswith("indices")}
        assert all(len(each) == 5 for each in chosen.values())
        found[len(found)] = chosen
    assert len(found[0]) == 4
    assert found[0] != found[1]
    assert genft(*common, "--selection", "random", "--output", "random").code == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bfloat16", "--gradient_checkpointing", "true", "--gradient_accumulation_steps", 2),
        ("--backend", "reference", "--early_stopping_patience", 3, "--load_best_model_at_end", "--save_steps", 0.25),
        ("--method", "gift", "--block", "mlp", "--in_projection_bias", "true", "--eval_fraction", 0.3),
        ("--method", "lora", "--target_modules", ".*(gate|up)_proj", "--warmup_steps", 2),
        ("--method", "grft", "--dtype", "bfloat16", "--calibration_batches", 2),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_options(genft: Genft, llama: Path, prose: Path, options: tuple[object, ...]) -> None:
    targets = () if "--target_modules" in options else PROJECTIONS
    done = genft(
        "finetune", "--model", llama, "--dataset", prose, *targets, *QUICK, *options, "--no_verify", "--output", "out"
    )
    assert done.code == 0, done.err
    assert record("out")["held_out_after"] < record("out")["held_out_before"]


def test_the_learning_rate_and_the_length_follow_from_the_model(genft: Genft, llama: Path, texts: Path) -> None:
    checked, _ = finetune.check(parse("finetune", ["--model", str(llama), "--dataset", str(texts), "--method", "full"]))
    assert checked.options.training.learning_rate == 4e-4
    assert checked.options.training.max_length == 128


def test_a_log_file_gets_lines(genft: Genft, llama: Path, prose: Path) -> None:
    done = genft("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify")
    assert "\r" not in done.err
    assert all(len(line) <= 120 for line in done.err.splitlines())
    assert "wegeft" in done.err
    assert "4/4" in done.err


# --- generating --------------------------------------------------------------------------------------------------


def test_generate_shows_base_and_adapter(genft: Genft, llama: Path, prose: Path) -> None:
    common = ("finetune", "--model", llama, "--dataset", prose, *PROJECTIONS, *QUICK, "--no_verify", "--output", "out")
    assert genft(*common, "--learning_rate", 1).code == 0
    done = genft("generate", "out", "--prompt", "The cat", "--max-new-tokens", 8)
    assert done.code == 0, done.err
    before, after = done.out.removeprefix("--- base model\n").split("\n\n--- out\n")
    assert before != after.rstrip("\n")
    assert genft("generate", "out", "--prompt", "The cat", "--max-new-tokens", 8).out == done.out
    assert "--chat: the tokenizer has no chat template" in genft("generate", "out", "--prompt", "x", "--chat").err
    assert "--max-new-tokens 0" in genft("generate", "out", "--prompt", "x", "--max-new-tokens", 0).err
    assert "--temperature -1" in genft("generate", "out", "--prompt", "x", "--temperature", -1).err
