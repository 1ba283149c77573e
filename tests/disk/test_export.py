"""Adapters as plain LoRA: exact where ΔW has low rank, else within the stated error; loaded by stock peft."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from genft_modules import FusedGenLinear, GIFTConfig, WeGeFTConfig, export_lora, lora_config, lora_state_dict
from genft_modules.disk.export import _rank_for, targets_of
from tests.support.cases import CASES, IDS, KINDS, MODELS, genft, gpt2, llama, logits, randomize

TARGETS = MODELS["llama"][1]
FULL_RANK = {"hira", "genft_gelu", "genft_vit", "genft_column"}


def adapt(case: str, name: str = "llama", **fields) -> PeftModel:
    base, targets = MODELS[name]
    return randomize(get_peft_model(base(), CASES[case](target_modules=targets, **fields)))


def layers(model: nn.Module) -> dict[str, FusedGenLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, FusedGenLinear)
    }


@pytest.mark.parametrize("case", CASES)
def test_a_low_rank_update_is_exact_and_any_other_within_the_error(case, tmp_path):
    model = adapt(case, "gpt2")
    exported = export_lora(model, tmp_path / "lora", max_error=1e-3)
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert type(config) is LoraConfig
    assert config.fan_in_fan_out
    assert config.r == config.lora_alpha
    assert config.rank_pattern == config.alpha_pattern
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert [layer.name for layer in exported] == list(layers(model))
    assert len(tensors) == 2 * len(exported)
    for layer in exported:
        a, b = (tensors[f"base_model.model.{layer.name}.lora_{side}.weight"] for side in "AB")
        delta = layers(model)[layer.name].get_delta_weight().detach().double()
        error = float((b.double() @ a.double() - delta).norm() / delta.norm())
        assert layer.exact == (case not in FULL_RANK)
        assert error <= (2e-7 if layer.exact else 1e-3)  # float32 rounds by 6e-8
        assert layer.error == pytest.approx(error, abs=2e-7)
        assert a.shape[0] == b.shape[1] == layer.rank
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "lora")
    assert not layers(loaded)
    plain, want = logits(gpt2()), logits(model)
    change = (want - plain).norm()
    assert change > 0
    assert (logits(loaded) - want).norm() <= (1e-2 if case in FULL_RANK else 3e-5) * change
    if case in FULL_RANK:
        for function in (lora_state_dict, lora_config):
            with pytest.raises(ValueError, match=r"has full rank in transformer\.h\.0"):
                function(model)
        return
    in_memory = lora_state_dict(model)
    assert in_memory.keys() == tensors.keys()
    assert all(torch.equal(in_memory[key].cpu(), tensor) for key, tensor in tensors.items())
    ours = lora_config(model).to_dict()
    assert ours == {**config.to_dict(), "inference_mode": False, "peft_version": ours["peft_version"]}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_other_architectures(case, name, tmp_path):
    model = adapt(case, name)
    export_lora(model, tmp_path / "lora", max_error=1e-5)
    loaded = PeftModel.from_pretrained(MODELS[name][0](), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-5)


def test_it_loads_where_there_is_no_genft(tmp_path):
    for case in ("wegeft", "gift_mlp", "genft_gelu"):
        model = adapt(case)
        export_lora(model, tmp_path / case, max_error=1e-5)
        torch.save({"ids": IDS.cpu(), "logits": logits(model).cpu()}, tmp_path / case / "want.pt")
    llama().save_pretrained(tmp_path / "base")
    code = """
import sys
sys.modules["genft_modules"] = sys.modules["genft_kernels"] = None  # importing them is an ImportError
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, *adapters = sys.argv[1:]
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    want = torch.load(adapter + "/want.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=want["ids"]).logits, want["logits"], rtol=1e-4, atol=1e-5)
print("same logits")
"""
    places = [str(tmp_path / name) for name in ("base", "wegeft", "gift_mlp", "genft_gelu")]
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "same logits\n", done.stderr


def test_a_stated_rank_is_kept_and_the_error_is_that_of_the_best_approximation(tmp_path):
    model = adapt("genft_gelu")
    exported = export_lora(model, tmp_path / "lora", rank=1)
    for layer in exported:
        s = torch.linalg.svdvals(layers(model)[layer.name].get_delta_weight().detach().double())
        assert layer.rank == 1
        assert layer.error == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-3)
    assert PeftConfig.from_pretrained(tmp_path / "lora").rank_pattern == {}
    few = export_lora(model, tmp_path / "few", rank=1000)  # more than there are
    assert {layer.rank for layer in few} == {16, 32}


def test_the_rank_for_an_error():
    s = torch.tensor([3.0, 2.0, 1.0, 0.0])
    whole = 14**0.5
    assert _rank_for(s, 0.9) == 1
    assert _rank_for(s, 5**0.5 / whole + 1e-6) == 1
    assert _rank_for(s, 5**0.5 / whole - 1e-6) == 2
    assert _rank_for(s, 1 / whole - 1e-6) == 3
    assert _rank_for(s, 1e-12) == 3
    assert _rank_for(torch.zeros(4), 0.1) == 1


def test_layers_of_different_rank_get_patterns_that_fit_one_layer_each(tmp_path):
    torch.manual_seed(0)

    def inner(*names: str) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    model = nn.Sequential()
    model.add_module("a", inner("q", "k"))
    model.add_module("b", nn.ModuleDict({"a": inner("q", "k"), "aXq": nn.Linear(8, 8), "q": nn.Linear(8, 8)}))
    config = WeGeFTConfig(r=2, target_modules=r"a\.q|b\.a\.q|b\.aXq", rank_pattern={r"^a\.q": 3, "aXq": 1})
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = randomize(get_peft_model(model, config))
    want = {name: layer.get_delta_weight() for name, layer in layers(adapted).items()}
    ranks = {layer.name: layer.rank for layer in export_lora(adapted, tmp_path / "lora")}
    assert ranks == {"a.q": 3, "b.a.q": 2, "b.aXq": 1}
    plain = adapted.unload()
    assert plain.state_dict().keys() == base.keys()
    lora = PeftModel.from_pretrained(plain, tmp_path / "lora")
    found = {name.removeprefix("base_model.model."): m for name, m in lora.named_modules() if hasattr(m, "lora_A")}
    assert {name: m.r["default"] for name, m in found.items()} == ranks
    for name, module in found.items():
        torch.testing.assert_close(module.get_delta_weight("default"), want[name])


def test_targets_are_short_where_they_can_be():
    names = ["", "l", "l.0", "l.0.q", "l.0.k", "l.1", "l.1.q", "l.1.k"]
    assert targets_of(["l.0.q", "l.1.q"], names) == ["q"]
    assert targets_of(["l.1.q"], names) == ["l.1.q"]
    assert targets_of(["l.0.q"], [*names, "e.l.0.q"]) == r"l\.0\.q"


def test_parts_of_a_fused_weight(tmp_path):
    for index, config in enumerate(
        (
            GIFTConfig(r=3, target_modules=["c_attn"], enable_gift={"c_attn": [True, False, True]}),
            genft("none", "none", target_modules=["c_attn"], enable_genft={"c_attn": [True, False, True]}),
        )
    ):
        model = randomize(get_peft_model(gpt2(), config))
        exported = export_lora(model, tmp_path / str(index))
        assert all(layer.exact for layer in exported)
        tensors = load_file(tmp_path / str(index) / "adapter_model.safetensors")
        for layer in exported:
            b = tensors[f"base_model.model.{layer.name}.lora_B.weight"]
            assert not b[32:64].any()
            assert b[:32].any()
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path / str(index))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "wegeft_only"])
def test_modules_to_save_and_biases_come_along(bias, tmp_path):
    model = adapt("wegeft", "bert", modules_to_save=["classifier"], bias=bias)
    export_lora(model, tmp_path / "lora")
    assert PeftConfig.from_pretrained(tmp_path / "lora").bias == ("all" if bias == "all" else "lora_only")
    loaded = PeftModel.from_pretrained(MODELS["bert"][0](), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), logits(adapt("wegeft", "bert")), atol=1e-3)  # they make a difference


def test_tensors_in_memory_are_copies_and_are_refilled():
    model = adapt("wegeft", "bert", modules_to_save=["classifier"], bias="all")
    tensors = lora_state_dict(model, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    randomize(model, seed=2)
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    own = {key: id(tensor) for key, tensor in tensors.items()}
    assert lora_state_dict(model, out=tensors) is tensors
    assert {key: id(tensor) for key, tensor in tensors.items()} == own
    want = lora_state_dict(model, dtype=torch.bfloat16)
    assert all(torch.equal(tensors[key], want[key]) for key in want)
    same = {key for key in want if torch.equal(want[key], before[key])}
    assert same == {"base_model.model.classifier.original_module.bias"}  # which bias="all" saves, and nothing trains
    for wrong, said in (
        ({"out": tensors, "dtype": torch.float16}, "dtype"),
        ({"out": {}}, "out: got dict with other keys"),
        ({"out": {key: tensor[:1] for key, tensor in tensors.items()}}, "has shape"),
        ({"adapter_name": "no"}, "adapter_name"),
    ):
        with pytest.raises(ValueError, match=said):
            lora_state_dict(model, **wrong)


def test_one_of_several_adapters_merged_or_not(tmp_path):
    model = adapt("wegeft")
    want = logits(model)
    model.add_adapter("other", CASES["wegeft_own"](target_modules=["q_proj", "o_proj"]))
    model.set_adapter("other")
    randomize(model, seed=2)
    other = logits(model)
    model.merge_adapter()
    export_lora(model, tmp_path / "default")
    assert export_lora(model, tmp_path / "other", adapter_name="other")[0].rank == 4
    for name, expected in (("default", want), ("other", other)):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_transformers_and_layers_swapped_by_hand(tmp_path):
    model = llama()
    model.add_adapter(CASES["lora"](target_modules=TARGETS))
    randomize(model)
    export_lora(model, tmp_path / "own")
    loaded = llama()
    loaded.load_adapter(str(tmp_path / "own"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)

    model = llama()
    layer = FusedGenLinear.from_linear(model.get_submodule("model.layers.1.self_attn.q_proj"), CASES["gift"]())
    model.set_submodule("model.layers.1.self_attn.q_proj", randomize(layer))
    export_lora(model, tmp_path / "hand")
    assert PeftConfig.from_pretrained(tmp_path / "hand").target_modules == {"model.layers.1.self_attn.q_proj"}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "hand")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_and_half_precision(tmp_path):
    model = get_peft_model(llama().to(torch.bfloat16), CASES["wegeft"](target_modules=TARGETS))
    assert {layer.error for layer in export_lora(model, tmp_path / "fresh")} == {0.0}
    randomize(model)
    export_lora(model, tmp_path / "trained")
    assert {t.dtype for t in load_file(tmp_path / "trained" / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path / "trained")
    exact = PeftModel.from_pretrained(llama(), tmp_path / "trained")
    ours = (logits(model).float() - logits(exact)).abs().max()
    theirs = (logits(loaded).float() - logits(exact)).abs().max()
    assert theirs <= 2 * ours  # both round as bfloat16 does


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: got 0, expected an integer >= 1"),
        ({"rank": 1.5}, TypeError, "rank: got 1.5"),
        ({"max_error": 0.0}, ValueError, "max_error: got 0.0, expected 0 < max_error < 1"),
        ({"max_error": 1}, ValueError, "max_error: got 1"),
        ({"max_error": "small"}, TypeError, "max_error: got 'small', expected a number"),
        ({"max_error": 0.1, "rank": 4}, ValueError, "max_error, rank: got 0.1 and 4, expected one of them"),
        ({}, ValueError, r"got neither, .*layers.0.self_attn.q_proj has full rank"),
        ({"max_error": 1e-12}, ValueError, r"max_error: got 1e-12, which torch.float32 cannot reach in .*q_proj"),
        ({"adapter_name": "nope", "rank": 2}, ValueError, "adapter_name: got 'nope', but no layer"),
    ],
)
def test_mistakes_write_nothing(fields, error, message, tmp_path):
    model = adapt("genft_gelu")
    with pytest.raises(error, match=message):
        export_lora(model, tmp_path / "lora", **fields)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    model = adapt("lora")
    for name, message in (("file", "is a file"), ("full", "not empty")):
        with pytest.raises(ValueError, match=message):
            export_lora(model, tmp_path / name)
    with pytest.raises(ValueError, match="model: got a single layer"):
        export_lora(FusedGenLinear.from_linear(nn.Linear(4, 4), CASES["lora"]()), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapter_name: got .*, but no layer"):
        export_lora(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "lora")
    meta = get_peft_model(llama().to("meta"), CASES["lora"](target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"model: the weight of model.layers.0.self_attn.q_proj is on the meta device"):
        export_lora(meta, tmp_path / "lora")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(LoraConfig, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        export_lora(adapt("lora"), Path(tmp_path) / "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["wegeft", "genft_gelu", "grft", "peanut"])
def test_what_is_not_finite_is_not_exported(case, value, tmp_path):
    model = adapt(case)
    layer = list(layers(model).values())[1]
    next(iter(layer.adapter_parameters().values())).data.view(-1)[0] = value
    with pytest.raises(
        ValueError, match=r"adapter_name: ΔW of 'default' has non-finite elements in model\.layers\.0\."
    ):
        export_lora(model, tmp_path / "lora", max_error=0.1)
    assert not (tmp_path / "lora").exists()


def test_a_saved_head_that_is_not_finite_is_not_exported(tmp_path):
    model = adapt("lora", modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"has non-finite elements in base_model\.model\.lm_head\.weight"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
