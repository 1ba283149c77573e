"""Adapters of strangers: whatever is wrong with one, it is refused in one line, soon, and the model is as it was."""

from __future__ import annotations

import json
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from genft_cli.main import main
from genft_modules import METHODS, load_adapter
from tests.support.cases import CASES, MODELS, llama, randomize
from tests.support.malformed import CONFIG, WEIGHTS, malform

FEW = 24  # cases of each method in the suite
LIMIT = 10  # seconds of CPU for one case
TARGETS = MODELS["llama"][1]


class Hung(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


@contextmanager
def limited() -> Iterator[None]:
    """Raises Hung after LIMIT seconds of CPU time. Python's engine for regular expressions can be interrupted."""

    def stop(*_) -> None:
        raise Hung

    former = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)


def fingerprint(model: torch.nn.Module) -> tuple:
    """All that loading an adapter could change."""
    return (
        [
            (name, id(module), type(module), module.training, sorted(vars(module)))
            for name, module in model.named_modules()
        ],
        [(name, id(p), p.requires_grad, p._version, p.data_ptr()) for name, p in model.named_parameters()],
        [(name, id(b), b._version) for name, b in model.named_buffers()],
        {name: str(tensor.double().sum()) for name, tensor in model.state_dict().items()},
        {name: id(config) for name, config in getattr(model, "peft_config", {}).items()},
        torch.get_rng_state().tolist(),
    )


def complaint(load, model: torch.nn.Module, before: tuple) -> str:
    """What is wrong with how `load` refuses, if anything."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()
    except ValueError as error:
        text = str(error)
        if not text.isprintable() or len(text) > 500:
            return f"message: {text!r}"
    except Hung:
        return "hung"
    except BaseException as error:
        return f"exception: {type(error).__name__}: {error}"
    else:
        return "loaded"
    return "" if fingerprint(model) == before else "touched"


@pytest.fixture(scope="module", params=METHODS)
def valid(request, tmp_path_factory) -> Path:
    """A valid adapter of each method."""
    directory = tmp_path_factory.mktemp(request.param)
    randomize(get_peft_model(llama(), CASES[request.param](target_modules=TARGETS))).save_pretrained(directory)
    return directory


def test_no_malformed_adapter_touches_the_model(valid, tmp_path, request):
    fields, tensors = json.loads((valid / CONFIG).read_text()), load_file(valid / WEIGHTS)
    method = fields["peft_type"]
    bare, second = llama(), load_adapter(llama(), valid)
    before = {model: fingerprint(model) for model in (bare, second)}
    wrong: Counter[str] = Counter()
    told = []
    cases = max(FEW, request.config.getoption("--fuzz") // len(METHODS))
    for case in range(cases):
        directory = tmp_path / str(case)
        what = malform(random.Random(f"{method} {case}"), directory, fields, tensors)
        model, name = ((bare, "default"), (second, "second"))[case % 2]
        if problem := complaint(lambda: load_adapter(model, directory, name), model, before[model]):  # noqa: B023
            wrong[problem.partition(":")[0]] += 1
            told.append(f"{method} {case}, {what}: {problem}"[:400])
            bare, second = llama(), load_adapter(llama(), valid)
            before = {model: fingerprint(model) for model in (bare, second)}
        shutil.rmtree(directory)
    print(f"{method}: {cases} cases, {dict(wrong)}")
    assert not told, f"{dict(wrong)} of {cases}:\n" + "\n".join(told[:40])


def changed(valid: Path, directory: Path, **fields) -> Path:
    shutil.copytree(valid, directory)
    config = json.loads((valid / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))
    return directory


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*)*x"},
        {"modules_to_save": ["(.*)*x"]},
        {"auto_mapping": ["a"]},
        {"auto_mapping": [[[[{}]]]]},
        {"base_model_name_or_path": "\x1b[2J"},
        {"target_modules": {"q_proj": 1}},
        {"peft_version": 3},
    ],
    ids=str,
)
def test_the_way_of_peft_refuses_our_methods_too(valid, fields, tmp_path):
    directory = changed(valid, tmp_path / "adapter", **fields)
    model = llama()
    before = fingerprint(model)
    assert not complaint(lambda: PeftModel.from_pretrained(model, str(directory)), model, before)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*)*x"},
        {"exclude_modules": "(.*)*x"},
        {"rank_pattern": {"(.*)*x": 3}},
        {"modules_to_save": ["(.*)*x"]},
        {"auto_mapping": ["a"]},
        {"base_model_name_or_path": 3},
        {"r": 10**400},
        {"r": "\x1b[2J" * 999},
        {"lora_alpha": [[[]]]},
        {"target_modules": 3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_adapters_of_peft_are_refused_in_the_same_way(fields, tmp_path):
    randomize(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(tmp_path / "valid")
    directory = changed(tmp_path / "valid", tmp_path / "adapter", **fields)
    model = llama()
    before = fingerprint(model)
    assert not complaint(lambda: load_adapter(model, directory), model, before)


@pytest.mark.parametrize("command", ["inspect", "merge", "export-lora"])
@pytest.mark.parametrize(
    "fields",
    [{"target_modules": "(.*)*x"}, {"auto_mapping": ["a"]}, {"base_model_name_or_path": "\x1b[2J"}, {"peft_type": 3}],
    ids=lambda fields: next(iter(fields)),
)
def test_commands_refuse_in_one_line(command, fields, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    randomize(get_peft_model(llama(), CASES["lora"](target_modules=TARGETS))).save_pretrained("valid")
    changed(Path("valid"), Path("adapter"), **fields)
    capsys.readouterr()
    output = [] if command == "inspect" else ["--output", "out"]
    with limited():
        assert main([command, "adapter", "--model", "base", *output]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("genft: error: adapter/adapter_config.json: ")
    assert message.isprintable()
    assert not Path("out").exists()
