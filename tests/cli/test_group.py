"""`genft finetune` with several adapters in the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from genft_cli.verify import verify
from tests.cli.conftest import Genft

QUICK = {
    "per_device_train_batch_size": 2, "max_length": 32, "logging_steps": 1, "target_modules": ["q_proj", "v_proj"],
    "gradient_checkpointing": False, "max_steps": 4, "method": "wegeft", "r": 4,
}  # fmt: skip


def config(path: str, **options: Any) -> str:
    Path(path).write_text(
        yaml.safe_dump({**QUICK, **{key: str(v) if isinstance(v, Path) else v for key, v in options.items()}})
    )
    return path


def record(run: str) -> dict[str, Any]:
    return json.loads(Path(run, "run.json").read_text())


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(str(Path(run, "adapter_model.safetensors")))


def test_runs_of_a_file(genft: Genft, llama: Path, prose: Path, texts: Path) -> None:
    """Data, ranks, rates and lengths of their own; each is the run that it would be alone."""
    runs = {
        "low": {"learning_rate": 1e-3},
        "high": {"learning_rate": 0.1, "r": 8},
        "other": {"dataset": str(texts), "max_steps": 2},
    }
    words = ("finetune", "--config", config("group.yaml", model=llama, dataset=prose, output="out", runs=runs))
    done = genft(*words, "--no_verify")
    assert done.code == 0, done.err
    assert all(verify(Path("out", name))["agree"] for name in runs)
    assert done.out.index("| high") < done.out.index("| low ")  # the best first
    assert record("out")["runs"].keys() == runs.keys()
    assert [record(f"out/{name}")["steps"] for name in runs] == [4, 4, 2]
    assert Path("out/loss.png").is_file()
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert PeftModel.from_pretrained(model, "out/high").peft_config["default"].r == 8
    for name in ("high", "other"):
        options = {"model": llama, "dataset": prose, "output": f"alone/{name}", "verify": False, **runs[name]}
        assert genft("finetune", "--config", config("alone.yaml", **options)).code == 0
        assert record(f"out/{name}")["held_out_after"] == pytest.approx(
            record(f"alone/{name}")["held_out_after"], rel=1e-5
        )
        want = weights(f"alone/{name}")
        for key, value in weights(f"out/{name}").items():
            torch.testing.assert_close(value, want[key], rtol=1e-3, atol=1e-5)
    again = genft("finetune", "--config", "group.yaml", "--overwrite", "--max_steps", 1, "--no_verify")
    assert again.code == 0, again.err
    assert record("out/low")["steps"] == 1
    assert not Path("out/.former").exists()


@pytest.mark.parametrize("method", ["lora", "grft"])  # peft's own becomes ours; and one that selects by gradients
def test_learning_rates_are_one_run_that_resumes(genft: Genft, llama: Path, prose: Path, method: str) -> None:
    linear = {"target_modules": ["all-linear"]}  # in which large parameters become losses that are no numbers
    words = (
        "finetune", "--config", config("rates.yaml", model=llama, dataset=prose, method=method, save_steps=2, **linear),
        "--output", "out", "--learning_rates", 2.5e-3, 1e30, "--no_verify",
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="lr1e30: stopped after"):
        done = genft(*words)
    assert done.code == 0, done.err
    assert "(stopped)" in done.out
    assert done.out.index("lr25e-4") < done.out.index("lr1e30")
    want = weights("out/lr25e-4")
    assert all(tensor.isfinite().all() for tensor in weights("out/lr1e30").values())
    for path in Path("out").iterdir():  # as if it had been stopped after the second step
        if path.name in ("run.json", "lr25e-4", "checkpoint-4"):
            path.rename(Path(f"gone-{path.name}"))
    with pytest.warns(RuntimeWarning, match="lr1e30: stopped after"):  # once more: it was in the third step
        done = genft(*words, "--resume")
    assert done.code == 0, done.err
    for key, value in weights("out/lr25e-4").items():
        torch.testing.assert_close(value, want[key])


def test_refusals(genft: Genft, llama: Path, texts: Path) -> None:
    def refused(message: str, *words: object, **options: Any) -> None:
        name = config("refused.yaml", **{"model": llama, "dataset": texts, "output": "out", **options})
        done = genft("finetune", "--config", name, *words)
        assert (done.code, message in done.err) == (2, True), done.err
        assert not Path("out").exists()

    one = {"a": {"learning_rate": 0.1}}
    refused("--runs: expected names of adapters, each with its options", runs=[1, 2])
    refused("--runs: a.b: expected a name of letters, digits, - and _", runs={"a.b": {}})
    refused("--runs: a: expected options (name: value)", runs={"a": 3})
    refused("--runs: a: max_length is the same for all", runs={"a": {"max_length": 16}})
    refused(
        "--runs: a: --learning_rate/--learning-rate: invalid float value: 'much'", runs={"a": {"learning_rate": "much"}}
    )
    refused("a: --target_modules nothing: no such module", runs={"a": {"target_modules": ["nothing"]}})
    refused("--runs: a: has a learning_rate beside --learning_rates", "--learning_rates", 0.1, runs=one)
    refused("--learning_rates: expected different ones", "--learning_rates", 0.1, 0.1)
    refused("--method full: cannot train several adapters", runs=one, method="full", r=None, target_modules=None)
    refused("--packing: not with several adapters", "--packing", runs=one)
    refused("--use_dora: not with several adapters", runs=one, method="lora", use_dora=True)
    done = genft("dpo", "--model", llama, "--dataset", texts, "--learning_rates", 0.1)
    assert (done.code, "are options of genft finetune" in done.err) == (2, True)
