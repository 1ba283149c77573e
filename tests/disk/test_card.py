"""The card beside an adapter says what it is and how to load it, and keeps what others wrote."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from genft_modules import METHODS, WeGeFTConfig, card, export_lora, files, load_adapter, save_adapter
from genft_modules.card import CARD, Facts, updated
from tests.support.cases import CASES, KINDS, MODELS, llama, logits, randomize

TARGETS = MODELS["llama"][1]
BASE = "someone/some-llama"
FACTS = Facts("wegeft", True, BASE, "LlamaForCausalLM")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """peft asks the hub for the configuration of a base model that has a name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def adapt(case: str = "wegeft", base: str = BASE, **fields) -> PeftModel:
    model = llama()
    model.config._name_or_path = model.name_or_path = base
    return randomize(get_peft_model(model, CASES[case](target_modules=TARGETS, **fields)))


def parts(path: Path) -> tuple[dict, str]:
    """Header and text, as the hub reads them."""
    text = path.read_text(encoding="utf-8")
    header, rest = re.match(r"---\n(.*?)^---\n(.*)", text, re.DOTALL | re.MULTILINE).groups()
    assert ModelCard(text).text.strip() == rest.strip()
    return yaml.safe_load(header), rest


def run(text: str, adapter: Path, base: Path) -> torch.nn.Module:
    """What the snippet of a card makes, with its two paths filled in."""
    (code,) = re.findall(r"```python\n(.*?)```", text[text.index(card.START) :], re.DOTALL)
    namespace: dict = {}
    exec(code.replace(BASE, str(base)).replace("path/to/this/adapter", str(adapter)), namespace)
    return namespace["model"]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    llama().save_pretrained(directory)
    return directory


SAVES = {
    "save_adapter": lambda model, directory: save_adapter(model, directory),
    "save_pretrained": lambda model, directory: model.save_pretrained(directory),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("case", KINDS)
def test_a_saved_adapter_has_a_card(case, save, tmp_path, on_disk):
    model = adapt(case)
    save(model, tmp_path / "adapter")
    header, text = parts(tmp_path / "adapter" / CARD)
    method = model.peft_config["default"].method
    assert header["base_model"] == BASE
    assert header["library_name"] == "peft"
    assert {"genft", method} <= set(header["tags"])
    assert "license" not in header
    assert f"A {card.METHODS[method]} adapter for the base model `{BASE}`." in text
    assert "`import genft_modules`" in text
    assert "`license:`" in text
    assert text.count(card.START) == text.count(card.END) == 1
    assert text.index(card.START) < text.index("## Model Details")  # of peft's own card, which is there as well
    assert torch.equal(logits(run(text, tmp_path / "adapter", on_disk)), logits(model))


def test_an_exported_lora_has_a_card(tmp_path, on_disk):
    model = adapt("wegeft")
    export_lora(model, tmp_path / "lora")
    header, text = parts(tmp_path / "lora" / CARD)
    assert header == {"base_model": BASE, "library_name": "peft", "tags": ["lora"]}
    assert "A LoRA (arXiv 2106.09685) adapter for the base model" in text
    assert "Converted from a WeGeFT (arXiv 2312.00700) adapter, exactly" in text
    assert "genft_modules" not in text
    assert "`license:`" in text
    # the class of the base model is known where the adapter came from the disk, or says its task
    save_adapter(model, tmp_path / "adapter")
    base = llama()
    base.config._name_or_path = base.name_or_path = BASE
    export_lora(load_adapter(base, tmp_path / "adapter"), tmp_path / "again")
    text = parts(tmp_path / "again" / CARD)[1]
    torch.testing.assert_close(logits(run(text, tmp_path / "again", on_disk)), logits(model))


def test_an_exported_lora_says_its_error(tmp_path):
    model = adapt("genft_gelu")
    layers = export_lora(model, tmp_path / "lora", rank=2)
    assert (
        f"with a relative error of ΔW of at most {max(layer.error for layer in layers):.1e}"
        in parts(tmp_path / "lora" / CARD)[1]
    )


def test_every_method_has_a_name():
    assert card.METHODS.keys() == METHODS.keys()


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("header", ["", "---\nlicense: mit # mine\nlanguage: [de]\n---\n"], ids=["bare", "header"])
def test_what_a_user_wrote_stays(header, save, tmp_path):
    mine = (
        "# My adapter\n\nTrained on letters.  \n\n```python\n# Model Card for Model ID\n```\n\n## Results\n\nGood ones."
    )
    (tmp_path / CARD).write_text(header + mine, encoding="utf-8")
    for case in ("wegeft", "gift_mlp"):  # the second time there is a block of the first
        save(adapt(case), tmp_path)
        fields, text = parts(tmp_path / CARD)
        assert mine in text
        assert text.count(card.START) == 1
        assert ("WeGeFT" in text, "GIFT" in text) == (case == "wegeft", case != "wegeft")
        assert fields["base_model"] == BASE
        assert (fields.get("license"), fields.get("language")) == (("mit", ["de"]) if header else (None, None))
    (tmp_path / CARD).write_text((tmp_path / CARD).read_text() + "\nMore of mine.\n")
    save(adapt(), tmp_path)
    text = parts(tmp_path / CARD)[1]
    assert text.index(mine) < text.index(card.START) < text.index("More of mine.")


def test_save_adapter_leaves_a_users_header_to_the_byte(tmp_path):
    header = "---\nlicense: mit # mine\ntags: [letters]\nbase_model: another/name\nlibrary_name: other\n---\n"
    (tmp_path / CARD).write_text(header + "Mine.\n")
    save_adapter(adapt(), tmp_path)
    assert (tmp_path / CARD).read_text().startswith(header + "Mine.\n")


def test_a_header_follows_the_adapter(tmp_path):
    save_adapter(adapt("wegeft"), tmp_path)
    save_adapter(adapt("gift_mlp", base="someone/another"), tmp_path)
    header, text = parts(tmp_path / CARD)
    assert header["base_model"] == "someone/another"
    assert "gift" in header["tags"]
    assert "wegeft" not in header["tags"]
    assert "`someone/another`" in text


def test_the_same_adapter_makes_the_same_card(tmp_path):
    for name in ("save_adapter", "save_pretrained"):
        SAVES[name](adapt(), tmp_path / name)
        first = (tmp_path / name / CARD).read_bytes()
        SAVES[name](adapt(), tmp_path / name)
        assert (tmp_path / name / CARD).read_bytes() == first


def test_each_adapter_of_a_model_has_its_card(tmp_path):
    model = adapt("wegeft")
    model.add_adapter("second", CASES["wegeft"](target_modules=["o_proj"]))
    model.save_pretrained(tmp_path / "both")
    assert "WeGeFT" in parts(tmp_path / "both" / CARD)[1]
    header, text = parts(tmp_path / "both" / "second" / CARD)
    assert header["tags"] == ["genft", "wegeft"]
    assert "# WeGeFT adapter for" in text
    save_adapter(model, tmp_path / "one", "second")
    assert parts(tmp_path / "one" / CARD) == (header, text)


def test_the_files_name_the_import_for_those_who_meet_peft_without_it(tmp_path, monkeypatch):
    """All that peft says then is the adapter's type."""
    save_adapter(adapt(), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["import_first"] == "genft_modules"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of fields that peft does not know
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == WeGeFTConfig.from_pretrained(str(tmp_path)).to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"import_first": "os"}))
    with pytest.raises(ValueError, match="import_first: got 'os', expected"):  # nothing is imported by its name
        PeftConfig.from_pretrained(str(tmp_path))
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, fields["peft_type"])
    with pytest.raises(KeyError) as raised:
        PeftModel.from_pretrained(llama(), str(tmp_path))
    assert f"peft says `KeyError: {raised.value}`" in (tmp_path / CARD).read_text()


def test_an_adapter_of_peft_itself_needs_no_import(tmp_path):
    (tmp_path / CARD).write_text("Mine.\n")
    save_adapter(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "Mine.\n" in text
    assert "Loading it only needs peft." in text
    assert "genft_modules" not in text


def test_transformers_own_way_makes_a_card_too(tmp_path):
    model = llama()
    model.add_adapter(CASES["wegeft"](target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    header, text = parts(tmp_path / CARD)
    assert "WeGeFT" in text
    assert header["tags"] == ["genft", "wegeft"]


def unreadable(path: Path) -> None:
    path.write_bytes(b"\xff\xfe caf\xe9")


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft's, of a base model that is not there
@pytest.mark.parametrize("spoil", [unreadable, Path.mkdir], ids=["not-utf-8", "a-directory"])
def test_a_card_that_cannot_be_written_costs_no_adapter(spoil, tmp_path):
    model = adapt()
    directory = tmp_path / "adapter"
    save_adapter(adapt(), directory)
    (directory / CARD).unlink()
    spoil(directory / CARD)
    before = (directory / CARD).read_bytes() if (directory / CARD).is_file() else None
    randomize(model, seed=7)
    with pytest.warns(UserWarning, match=r"README\.md: not updated with"):
        save_adapter(model, directory)
    assert torch.equal(logits(load_adapter(llama(), directory)), logits(model))
    assert before is None or (directory / CARD).read_bytes() == before


def test_a_broken_header_is_no_matter_to_save_adapter(tmp_path):
    (tmp_path / CARD).write_text("---\n{[: not yaml\n---\nMine.\n")
    save_adapter(adapt(), tmp_path)
    assert (tmp_path / CARD).read_text().startswith("---\n{[: not yaml\n")
    assert "Mine.\n" in (tmp_path / CARD).read_text()
    load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_crash_leaves_a_whole_card_or_the_former_one(save, tmp_path, monkeypatch):
    """peft writes its part in place; ours comes in one step, and never before the adapter's own files."""
    save(adapt(), tmp_path)
    (tmp_path / CARD).write_text(f"Mine.\n\n{card.block(FACTS)}\n")

    class Killed(BaseException):
        pass

    def replace(source, target, really=os.replace):
        if str(target).endswith(CARD):
            raise Killed
        really(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(Killed):
            save(randomize(adapt(), seed=9), tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "Mine.\n" in text
    assert text.count(card.START) == text.count(card.END) == 1
    load_adapter(llama(), tmp_path)
    save(adapt(), tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_mark_that_lost_its_end_swallows_nothing():
    text = f"{card.START}\nMine.\n"
    once = updated(text, FACTS)
    assert text in once
    twice = updated(once, FACTS)
    assert text in twice
    assert twice == once


def test_line_ends_and_indented_tags_stay():
    text = "---\r\ntags:\r\n  - letters\r\n---\r\nMine.\r\n"
    card_ = updated(text, FACTS)
    header = yaml.safe_load(card_.split("---")[1])
    assert set(header["tags"]) == {"letters", "genft", "wegeft"}
    assert header["base_model"] == BASE
    assert "Mine.\r\n" in card_
    assert updated(card_, FACTS) == card_


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({"task_type": "SEQ_CLS"}, ["from transformers import AutoModelForSequenceClassification"]),
        ({"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}}, ["base = ...  #"]),
        ({"auto_mapping": "LlamaForCausalLM"}, ["base = ...  #"]),
        ({"auto_mapping": {"base_model_class": "a; b", "parent_library": "transformers.x"}}, ["base = ...  #"]),
        ({"base_model_name_or_path": 'odd"\nname'}, ['for the base model `odd" name`.']),
        ({}, ["for an unnamed base model."]),
    ],
)
def test_what_the_configuration_does_not_say(config, lines):
    text = updated("", Facts.of({"peft_type": "GENFT_NEW", **config}))
    for line in lines:
        assert line in text
    header = yaml.safe_load(text.split("---")[1])
    assert header["tags"] == ["genft", "new"]
    assert ("base_model" in header) == ("base_model_name_or_path" in config)
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")
