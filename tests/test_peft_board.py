"""recipes/peft-board: its experiments fit, and its script runs them in a suite laid out as peft's."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from genft_modules import METHODS

BOARD = Path(__file__).parents[1] / "recipes" / "peft-board"
SPEC = importlib.util.spec_from_file_location("peft_board", BOARD / "run.py")
board = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(board)

UTILS = """
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from types import SimpleNamespace

def get_train_config(path):
    return SimpleNamespace(model_id="tiny", max_seq_length=9, batch_size=2, query_template="{query}")

def get_tokenizer(*, model_id, max_seq_length):
    from genft_cli.demo.bytes import byte_tokenizer
    return byte_tokenizer()

def get_model(*, model_id, peft_config):
    sizes = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)), peft_config)
"""
DATA = """
from datasets import Dataset

def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
    rows = tokenizer(["one", "two, three", "four"])
    return Dataset.from_dict(dict(rows)), None, None
"""
RUN = """
import sys
from peft import PeftConfig
from utils import get_model

if __name__ == "__main__":
    model = get_model(model_id="tiny", peft_config=PeftConfig.from_pretrained(sys.argv[-1]))
    model.save_pretrained("saved")
"""


@pytest.fixture
def suite(tmp_path):
    for name, text in {"run": RUN, "utils": UTILS, "data": DATA}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "default_training_params.json").write_text("{}")
    return tmp_path


def test_every_method_has_an_experiment_and_the_readme_its_size():
    listed = dict(re.findall(r"^\| `(\S+)` \| ([\d,]+) \|", (BOARD / "README.md").read_text(), re.MULTILINE))
    assert sorted(listed) == board.names()
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
    seen = set()
    for name in board.names():
        config = PeftConfig.from_pretrained(str(board.EXPERIMENTS / name))
        seen.add(config.method)
        counts = []
        for layers in (1, 2):  # each of the 28 adds the same
            with torch.device("meta"):
                base = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=layers, **sizes))
            counts.append(get_peft_model(base, config).get_nb_trainable_parameters()[0])
        assert f"{counts[0] + 27 * (counts[1] - counts[0]):,}" == listed[name], name
        training = board.EXPERIMENTS / name / "training_params.json"
        assert not training.exists() or json.loads(training.read_text()).keys() == {"optimizer_kwargs"}
    assert seen == set(METHODS)


def test_the_suite_runs_an_experiment(suite, monkeypatch, capfd):
    """GRFT's, whose rows have to be selected; in this process."""
    (name,) = (name for name in board.names() if name.startswith("genft-grft/"))

    def here(command, cwd):
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", command[1:])
            patch.setattr(sys, "path", list(sys.path))
            assert command[0] == sys.executable
            return subprocess.CompletedProcess(command, board.main())

    monkeypatch.setattr(board.subprocess, "run", here)
    monkeypatch.setattr(sys, "argv", ["run.py", str(suite), name])
    try:
        assert board.main() == 0
    finally:
        for module in ("utils", "data"):
            sys.modules.pop(module, None)
    assert (suite / "experiments" / name / "adapter_config.json").is_file()
    assert (suite / "saved" / "adapter_model.safetensors").is_file()  # refused before the rows are selected


@pytest.mark.parametrize(("words", "said"), [(["{suite}", "lora/other"], "lora/other"), (["{suite}/none"], "run.py")])
def test_wrong_arguments(words, said, suite, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *(word.format(suite=suite) for word in words)])
    with pytest.raises(SystemExit):
        board.main()
    assert said in capsys.readouterr().err
    assert not (suite / "experiments").exists()
