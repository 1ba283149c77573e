"""Adapters on disk: what does not fit is refused before the model is touched, and a crash never leaves a mixture."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from genft_modules import WeGeFTConfig, check_adapter, files, load_adapter, restore_adapter, save_adapter
from tests.support.cases import CASES, KINDS, MODELS, llama, logits, randomize

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TARGETS = MODELS["llama"][1]


def adapt(case: str = "genft", **fields) -> PeftModel:
    return randomize(get_peft_model(llama(), CASES[case](target_modules=TARGETS, **fields)))


def edit(path: Path, change) -> None:
    """Changes the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def state(model: torch.nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", KINDS)
def test_saved_and_loaded(case, tmp_path):
    model = adapt(case)
    save_adapter(model, tmp_path / "new" / "adapter")
    files_ = {path.name for path in (tmp_path / "new" / "adapter").iterdir()}
    assert files_ == {CONFIG, WEIGHTS, "README.md"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["adapter"]
    base = llama()
    rng = torch.get_rng_state()
    check_adapter(base, tmp_path / "new" / "adapter")
    assert torch.equal(torch.get_rng_state(), rng)
    loaded = load_adapter(base, tmp_path / "new" / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = load_adapter(llama(), tmp_path / "new" / "adapter", is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_a_second_adapter_and_its_own_directory(tmp_path):
    model = adapt()
    model.add_adapter("second", CASES["genft"](target_modules=["o_proj"]))
    model.set_adapter("second")
    randomize(model, seed=2)
    want = logits(model)
    save_adapter(model, tmp_path / "second", "second")
    assert {path.name for path in (tmp_path / "second").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    other = adapt()
    first = logits(other)
    assert load_adapter(other, tmp_path / "second", "mine") is other
    assert torch.equal(logits(other), first)
    other.set_adapter("mine")
    assert torch.equal(logits(other), want)
    with pytest.raises(ValueError, match="adapter_name: 'mine' already exists in the model"):
        load_adapter(other, tmp_path / "second", "mine")


def test_stock_lora_and_modules_to_save(tmp_path):
    lora = randomize(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))
    save_adapter(lora, tmp_path / "lora")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "lora")), logits(lora))
    base, targets = MODELS["bert"]
    model = get_peft_model(base(), CASES["wegeft"](target_modules=targets, modules_to_save=["classifier"], bias="all"))
    save_adapter(randomize(model), tmp_path / "bert")
    assert torch.equal(logits(load_adapter(base(), tmp_path / "bert")), logits(model))
    edit(tmp_path / "bert" / WEIGHTS, lambda tensors: tensors.pop("base_model.model.classifier.weight"))
    with pytest.raises(ValueError, match=r"missing: classifier\.weight"):
        load_adapter(base(), tmp_path / "bert")


def test_the_same_config_makes_the_same_file(tmp_path):
    for index, names in enumerate((["q_proj", "k_proj", "v_proj"], ["v_proj", "q_proj", "k_proj"])):
        WeGeFTConfig(target_modules=names).save_pretrained(str(tmp_path / str(index)))
    assert (tmp_path / "0" / CONFIG).read_bytes() == (tmp_path / "1" / CONFIG).read_bytes()


def drop(directory: Path) -> None:
    edit(directory / WEIGHTS, lambda tensors: tensors.pop(sorted(tensors)[0]))


def add(directory: Path) -> None:
    edit(directory / WEIGHTS, lambda tensors: tensors.update({"base_model.model.odd": torch.zeros(2)}))


def reshape(directory: Path) -> None:
    def change(tensors):
        key = sorted(tensors)[-1]
        tensors[key] = tensors[key][:1].clone()

    edit(directory / WEIGHTS, change)


def integers(directory: Path) -> None:
    edit(directory / WEIGHTS, lambda tensors: tensors.update({k: t.int() for k, t in tensors.items()}))


def rename(new_name: Callable[[str], str]):
    def change(tensors):
        named = {new_name(key): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(named)

    return lambda directory: edit(directory / WEIGHTS, change)


def truncate(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def scribble(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"no tensors " * 9)


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "adapter_model.bin")
    (directory / WEIGHTS).unlink()


def foreign(directory: Path) -> None:
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(directory / "lora")
    os.replace(directory / "lora" / WEIGHTS, directory / WEIGHTS)


def of_another_model(directory: Path) -> None:
    config = CASES["genft"](target_modules=["down_proj"])
    get_peft_model(MODELS["llama"][0](head_dim=16), config).save_pretrained(directory)


def fields(**changes):
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | changes))

    return change


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def write(text: str):
    return lambda directory: (directory / CONFIG).write_text(text)


# what was done to the adapter; what is said of it; whether peft's own way refuses it too, alone or by our classes
DAMAGE = {
    "missing tensor": (drop, "does not match the model: missing: model.layers.0.mlp.down_proj", True),
    "unknown tensor": (add, "does not match the model: unknown: odd", True),
    "shape": (reshape, r"shape mismatch: .*: got \(1, 3\), expected \(32, 3\)", True),
    "integers": (integers, "wrong dtype: .*int32 .*and .* more", True),
    "no prefix": (rename(lambda key: key.removeprefix(PREFIX)), r"missing: .*unknown: .* \(without 'base_model", True),
    "prefix twice": (rename(lambda key: PREFIX + key), r"missing: .*unknown: base_model\.model\.", True),
    "truncated": (truncate, f"{WEIGHTS}: is not a valid safetensors file", True),
    "garbage": (scribble, f"{WEIGHTS}: is not a valid safetensors file", True),
    "pickle": (pickled, "got adapter_model.bin, a pickle", True),
    "weights of LoRA": (foreign, "missing: .*unknown: .*lora_A", True),
    "rank": (fields(generator_share_dim=5), "shape mismatch", True),
    "targets": (fields(target_modules=["q_proj"]), "unknown: ", True),
    "no such targets": (fields(target_modules=["nope"]), f"{CONFIG}: does not match the model: .*nope", True),
    "bad value": (fields(generator_share_dim="3"), f"{CONFIG}: generator_share_dim: got '3'", True),
    "another method": (fields(peft_type="GENFT_GIFT"), "missing: .*unknown: ", True),
    "unknown method": (fields(peft_type="GENFT_NEW"), "got peft_type 'GENFT_NEW', unknown to genft", True),
    "released": (fields(peft_type="GENFT"), "of the released GENFT code; use load_released", True),
    "released by others": (fields(peft_type="WeGeFT"), "of the released WeGeFT code; use load_released", True),
    "no method": (write("{}"), "got peft_type None", True),
    "not an object": (write("[1]"), "got peft_type None", True),
    "not JSON": (write("{"), f"{CONFIG}: is not JSON", True),
    "no config": (remove(CONFIG), f"contains no {CONFIG}$", True),
    "no weights": (remove(WEIGHTS), f"contains no {WEIGHTS}$", False),  # there, peft asks the hub
    "nothing": (shutil.rmtree, "no such directory", False),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    adapt().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("damage", "message", "by_peft_too"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_what_does_not_fit_leaves_the_model_alone(damage, message, by_peft_too, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model, second = llama(), adapt("wegeft")
    before, before_second, want = state(model), state(second), logits(second)
    for load in (check_adapter, load_adapter):
        with pytest.raises(ValueError, match=message):
            load(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_adapter(second, tmp_path / "adapter", "second")
    assert state(model) == before
    assert state(second) == before_second
    assert list(second.peft_config) == ["default"]
    assert torch.equal(logits(second), want)
    if by_peft_too:
        with pytest.raises((ValueError, TypeError, KeyError)):
            PeftModel.from_pretrained(model, str(tmp_path / "adapter"))


def test_indices_are_integers(tmp_path):
    save_adapter(adapt("grft"), tmp_path / "adapter")
    edit(tmp_path / "adapter" / WEIGHTS, lambda tensors: tensors.update({k: t.float() for k, t in tensors.items()}))
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match=r"wrong dtype: .*indices: got torch.float32"):
        load_adapter(model, tmp_path / "adapter")
    assert state(model) == before


STOCK = {
    "LORA": LoraConfig(r=2, target_modules=["q_proj"]),
    "DoRA": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "PiSSA": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
    "IA3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VERA": VeraConfig(r=2, target_modules=["q_proj"]),
    "OFT": OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", STOCK)
def test_stock_adapters_are_checked_too(method, tmp_path):
    model = randomize(get_peft_model(llama(), STOCK[method]))
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "adapter")), logits(model))
    if method == "PROMPT_TUNING":
        return  # which is in no layer
    key = sorted(load_file(tmp_path / "adapter" / WEIGHTS))[0]
    for number, (change, words) in enumerate(
        (
            (lambda tensors: tensors.pop(key), "does not match the model"),
            (lambda tensors: tensors.update({f"{key}.odd": tensors.pop(key)}), "does not match the model"),
            (lambda tensors: tensors.update({key: torch.ones(3, 3)}), "does not match the model: .*(size|shape)"),
        )
    ):
        damaged = tmp_path / str(number)
        shutil.copytree(tmp_path / "adapter", damaged)
        edit(damaged / WEIGHTS, change)
        plain, second = llama(), adapt("lora")
        before, before_second = state(plain), state(second)
        with pytest.raises(ValueError, match=words):
            load_adapter(plain, damaged)
        assert state(plain) == before
        with pytest.raises(ValueError, match="does not match the model"):
            load_adapter(second, damaged, "second")
        assert state(second) == before_second
        assert list(second.peft_config) == ["default"]


def test_an_adapter_of_a_wider_model(tmp_path):
    save_adapter(randomize(get_peft_model(llama(), CASES["lora"](target_modules=["q_proj"]))), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lora_B: got \(32, 4\), expected \(64, 4\)"):
        load_adapter(llama(head_dim=16), tmp_path / "adapter")


def test_a_state_that_does_not_fit_changes_no_tensor():
    model, other = adapt(), adapt("genft_gelu")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    from peft import get_peft_model_state_dict

    good = get_peft_model_state_dict(randomize(other, seed=3))
    first = next(iter(good))
    for bad in (
        {key: tensor for key, tensor in good.items() if key != first},
        good | {first: torch.zeros(1, 1)},
        good | {"odd": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="adapter 'default': does not match the model"):
            set_peft_model_state_dict(model, bad)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    with pytest.warns(RuntimeWarning, match="the state contains none of its [0-9]+ tensors"):
        set_peft_model_state_dict(model, {})  # may be meant
    set_peft_model_state_dict(model, good)
    assert not all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_values_that_a_method_refuses(tmp_path):
    save_adapter(adapt("grft"), tmp_path / "adapter")

    def change(tensors):
        next(tensor for key, tensor in tensors.items() if key.endswith("indices"))[0] = 10_000

    edit(tmp_path / "adapter" / WEIGHTS, change)
    model = llama()
    before = state(model)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*indices: got \[10000"):
        load_adapter(model, tmp_path / "adapter")
    assert state(model) == before


class Killed(BaseException):
    pass


def killed_at(step: int, save: Callable[[], None], monkeypatch, *, syncs: bool = False) -> bool:
    """Calls `save` in a process that dies before its step number `step` and clears nothing up; whether it did die.
    `syncs`: a flush to the disk counts as a step."""
    left = [step]

    def counted(really):
        def call(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return really(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", counted(os.replace))
        patch.setattr(files.Path, "unlink", counted(Path.unlink))
        if syncs:
            patch.setattr(files.os, "fsync", counted(os.fsync))
        patch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
        try:
            save()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("first", ["ours", "stock", "none"])
@pytest.mark.parametrize("marks", [(0, 1, 2), (0, 0, 0), (0, 1, 0)], ids=str)
def test_every_double_crash_point_leaves_a_whole_adapter(first, marks, tmp_path, monkeypatch, pytestconfig):
    """At every step of a save, and at every step of the save after that; `marks`: of the three configurations.
    `--fuzz N`: a flush to the disk is a step, too."""
    syncs = bool(pytestconfig.getoption("fuzz"))

    def write(number: int, directory: Path) -> None:
        (directory / CONFIG).write_text(json.dumps({"mark": marks[number]}))
        save_file({"number": torch.tensor([number])}, directory / WEIGHTS)

    def save(number: int, directory: Path) -> None:
        with files.replaced_adapter(directory) as partial:
            write(number, partial)

    def found(directory: Path) -> int | None:
        """The adapter that is there; None where none ever was."""
        if not any((directory / name).exists() for name in (CONFIG, WEIGHTS)):
            return None
        with files.whole_adapter(directory) as place:
            mark = json.loads((place / CONFIG).read_text())["mark"]
            number = int(load_file(place / WEIGHTS)["number"])
        assert mark == marks[number]
        if (directory / CONFIG).exists():  # what stock peft reads is the same
            assert json.loads((directory / CONFIG).read_text())["mark"] == mark
        return number

    seen, points = set(), 0
    for once in itertools.count():
        for twice in itertools.count():
            directory = tmp_path / f"{once} {twice}"
            if first == "stock":
                directory.mkdir()
                write(0, directory)
            elif first == "ours":
                save(0, directory)
            if first != "none":
                (directory / "notes.txt").write_text("mine")
            died = killed_at(once, lambda where=directory: save(1, where), monkeypatch, syncs=syncs)
            between = found(directory)
            died_again = killed_at(twice, lambda where=directory: save(2, where), monkeypatch, syncs=syncs)
            points += died and died_again
            after = found(directory)
            assert after in (between, 2)
            seen.add((between, after))
            save(2, directory)  # and clears up
            assert found(directory) == 2
            notes = set() if first == "none" else {"notes.txt"}
            assert {path.name for path in directory.iterdir()} == {CONFIG, WEIGHTS} | notes
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
            if not died_again:
                break
        if not died:
            break
    former = None if first == "none" else 0
    assert {(former, former), (former, 2), (1, 1), (1, 2)} <= seen
    print(f"{points} double crash points")
    assert points >= 2


def test_an_interrupted_save_loads(tmp_path, monkeypatch):
    """Whole models: with the former adapter or the new one, though there is no adapter_config.json for a moment."""
    old, new = (
        randomize(get_peft_model(llama(), WeGeFTConfig(r=4, wegeft_alpha=alpha, target_modules=TARGETS)), seed=alpha)
        for alpha in (6, 30)
    )
    wanted = [logits(old), logits(new)]
    without = []
    for step in itertools.count():
        directory = tmp_path / str(step)
        save_adapter(old, directory)
        died = killed_at(step, lambda where=directory: save_adapter(new, where), monkeypatch)
        model = load_adapter(llama(), directory)
        which = [torch.equal(logits(model), want) for want in wanted]
        assert sum(which) == 1
        if not (directory / CONFIG).exists():
            without.append(which[1])
            with pytest.raises(ValueError, match=CONFIG):
                PeftModel.from_pretrained(llama(), str(directory))
            load_adapter(model, directory, "again")
            check_adapter(llama(), directory)
            restore_adapter(model, directory)
        if not died:
            break
    assert without == [False, True]


def test_two_writers_of_one_directory_leave_one_whole_adapter(tmp_path, pytestconfig, forks):
    """Never a configuration with another's weights, and nothing is left behind. `--fuzz N`: N bursts."""
    bursts = pytestconfig.getoption("fuzz") or 2
    done = forks.run("tests.support.two_writers", tmp_path, bursts)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("whole") == bursts


def test_unusual_directories(tmp_path, monkeypatch):
    """An empty one stays itself, as a mount point must; a link stays a link; "." is a directory like any other."""
    model = adapt()
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino
    save_adapter(model, tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_ino == inode
    (tmp_path / "link").symlink_to("target")
    save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_adapter(model, ".")
    for name in ("empty", "target", "here"):
        assert torch.equal(logits(load_adapter(llama(), tmp_path / name)), logits(model))
        assert {path.name for path in (tmp_path / name).iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_a_failure_while_saving_leaves_the_old_files(tmp_path, monkeypatch):
    model = adapt()
    save_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(WeGeFTConfig.__mro__[1], "save_pretrained", fails)
    for directory in ("adapter", "fresh"):
        with pytest.raises(OSError, match="disk full"):
            save_adapter(randomize(model, seed=4), tmp_path / directory)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"model: got LlamaForCausalLM, expected a module with adapters"):
        save_adapter(llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_name: got 'nope', expected one of \['default'\]"):
        save_adapter(adapt(), tmp_path / "adapter", "nope")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(adapt(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
