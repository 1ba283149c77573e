"""Stacked experts in a model: which parameters are targets, what is shared, and the files."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from genft_modules import (
    FusedGenLinear,
    GIFTConfig,
    LoRAConfig,
    WeGeFTConfig,
    adapt,
    export_lora,
    lora_config,
    lora_state_dict,
)
from tests.support.cases import randomize
from tests.support.experts import IDS, TARGETS, adapted, moe, stacks

WARNED = r'"all-linear" includes 2 parameters of stacked experts, such as model\.layers\.0\.mlp\.experts\.gate_up_proj'


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def names(model: nn.Module) -> set[str]:
    """What is adapted, by short names."""
    linear = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, FusedGenLinear)}
    return linear | {projection for layer in stacks(model).values() for projection in layer.adapted()}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (TARGETS, {"gate_up_proj", "down_proj"}),
        (["experts.down_proj"], {"down_proj"}),
        (["q_proj", "gate_up_proj"], {"q_proj", "gate_up_proj"}),
        (["model.layers.0.mlp.experts.gate_up_proj"], {"gate_up_proj"}),
        (r".*\.experts\.\w+_proj", {"gate_up_proj", "down_proj"}),
        (r".*\.(q_proj|experts\.down_proj)", {"q_proj", "down_proj"}),
    ],
    ids=["both", "one", "short", "full", "expression", "expression with layers"],
)
def test_targets_are_names_of_parameters_and_stay_as_they_were(targets, found, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = adapted(moe("mixtral"), WeGeFTConfig(r=3, target_modules=targets))
    assert names(model) == found
    want = logits(model)
    assert not torch.equal(want, logits(moe("mixtral")))
    model.save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path).target_modules
    assert saved == targets if isinstance(targets, str) else set(saved) == set(targets)
    assert torch.equal(logits(PeftModel.from_pretrained(moe("mixtral"), tmp_path, low_cpu_mem_usage=True)), want)
    plain = moe("mixtral")
    plain.load_adapter(tmp_path)  # transformers' own
    assert torch.equal(logits(plain), want)


@pytest.mark.parametrize("method", [WeGeFTConfig, GIFTConfig])
def test_all_linear_includes_the_experts_and_says_so(method, tmp_path):
    with pytest.warns(UserWarning, match=WARNED):
        model = adapted(moe("mixtral"), method(r=2, target_modules="all-linear"))
    assert names(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe("mixtral"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(moe("mixtral"), method(r=2, target_modules="all-linear", exclude_modules=TARGETS))
        assert names(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        model = get_peft_model(moe("mixtral"), method(r=2, target_modules="all-linear", exclude_modules=["experts"]))
        assert names(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        model = get_peft_model(moe("mixtral"), LoRAConfig(r=2, target_modules="all-linear"))  # cannot edit tokens
        assert names(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_adapt_names_layers_alone():
    """Also where a stacked parameter has the name of a layer: the shared expert's down_proj."""
    model = adapt(moe("qwen2"), WeGeFTConfig(r=2))
    assert {"q_proj", "down_proj"} < names(model)
    assert not stacks(model)


def test_one_pair_per_type_unless_told_otherwise():
    def keys(**fields) -> list[str]:
        tuner = get_peft_model(moe("qwen2"), WeGeFTConfig(r=2, **fields)).base_model
        return sorted(tuner.shared_generators.genft_shared["default"]) if hasattr(tuner, "shared_generators") else []

    # Qwen2's shared expert has a down_proj, too, here of the same size.
    assert keys(target_modules=TARGETS) == ["down_proj_experts", "gate_up_proj_experts"]
    every = ["experts.down_proj", "shared_expert.down_proj"]
    assert keys(target_modules=every) == ["down_proj", "down_proj_experts"]
    assert keys(target_modules=every, tied_modules=[["down_proj"]]) == ["tied_0"]
    assert keys(target_modules=every, tied_modules=None) == []
    model = get_peft_model(moe("qwen2"), WeGeFTConfig(r=2, target_modules=["down_proj"]))  # the end of both names
    assert names(model) == {"down_proj"}
    assert len(stacks(model)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        config = WeGeFTConfig(r=2, rank_pattern={"experts.down_proj": 5}, target_modules=every)
        model = get_peft_model(moe("qwen2"), config)
    with pytest.warns(RuntimeWarning, match=r"rank_pattern: \['gate_up_proj'\] match none of the adapted layers"):
        get_peft_model(moe("qwen2"), WeGeFTConfig(r=2, rank_pattern={"gate_up_proj": 5}, target_modules=every))
    shared = model.base_model.shared_generators.genft_shared["default"]
    assert {key: pair.phi.shape[0] for key, pair in shared.items()} == {"down_proj": 2, "down_proj_experts": 5}
    with pytest.raises(ValueError, match=r"tied_modules: model\.layers\.0\..* has in_features = .*, expected"):
        keys(target_modules=[*TARGETS, "q_proj"], tied_modules=[[".*_proj"]])


def test_peft_injects_from_a_state():
    config = WeGeFTConfig(r=2, tied_modules=None, target_modules=["q_proj", *TARGETS])
    model = randomize(inject_adapter_in_model(config, moe("mixtral"), "mine"))
    state = {key: value for key, value in model.state_dict().items() if "genft_" in key}
    state = {key.replace(".mine.", "."): value for key, value in state.items()}
    again = inject_adapter_in_model(config, moe("mixtral"), "mine", state_dict=state)
    assert not set_peft_model_state_dict(again, state, adapter_name="mine").unexpected_keys
    assert torch.equal(logits(again), logits(model))


def test_adapters_come_and_go():
    model = adapted(moe("gpt_oss"), WeGeFTConfig(r=3, target_modules=TARGETS))
    plain, first = logits(moe("gpt_oss")), logits(model)
    model.add_adapter("other", WeGeFTConfig(r=2, target_modules=["q_proj", *TARGETS]))
    model.set_adapter("other")
    randomize(model, std=0.3)
    second = logits(model)
    assert not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="adapters: got adapters of stacked experts"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    model.set_adapter("other")
    assert torch.equal(logits(model.unload()), plain)
    assert not stacks(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoRAConfig(r=2, target_modules=TARGETS),
            r"'experts\.\w+', a parameter .*Experts\), but LoRAConfig cannot a",
        ),
        (GIFTConfig(r=2, block="mlp", target_modules=["q_proj", *TARGETS]), r"but GIFTConfig cannot adapt experts, ex"),
        (WeGeFTConfig(r=2, target_modules=["experts"]), r"the name of a parameter of it, experts\.gate_up_proj or ex"),
        (WeGeFTConfig(r=2, target_modules=["mlp.gate.weight"]), r"'mlp\.gate\.weight', a parameter .*, expected a la"),
        (WeGeFTConfig(r=2, target_modules=["gate"]), r"model\.layers\.0\.mlp\.gate: base_layer: got MixtralTopKRou"),
    ],
    ids=["lora", "block", "module", "router parameter", "router"],
)
def test_refused_by_name(config, message):
    model = moe("mixtral")
    before = list(model.state_dict())
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, config)
    assert list(model.state_dict()) == before
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


@pytest.mark.parametrize(
    ("name", "tied", "targets"),
    [
        ("mixtral", True, ["q_proj", *TARGETS]),
        ("gpt_oss", False, TARGETS),
        ("llama4", True, TARGETS),
        ("deepseek", True, ["experts.gate_up_proj"]),
    ],
)
def test_export_for_target_parameters(name, tied, targets, tmp_path):
    config = WeGeFTConfig(r=3, tied_experts=tied, rank_pattern={"experts.down_proj": 2}, target_modules=targets)
    model = adapted(moe(name), config)
    exported = export_lora(model, tmp_path / "lora")
    assert all(layer.exact and layer.error < 1e-6 for layer in exported)
    assert len(exported) == len(targets)
    assert {layer.rank for layer in exported if layer.name.endswith("down_proj")} <= {2}
    saved = PeftConfig.from_pretrained(tmp_path / "lora")
    assert type(saved) is LoraConfig
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    in_memory = lora_state_dict(model)
    assert in_memory.keys() == tensors.keys()
    assert all(torch.equal(tensor, in_memory[key]) for key, tensor in tensors.items())
    fields = ("r", "rank_pattern", "target_modules", "target_parameters")
    assert all(getattr(lora_config(model), field) == getattr(saved, field) for field in fields)
    loaded = PeftModel.from_pretrained(moe(name), tmp_path / "lora")
    assert not stacks(loaded)
    plain, want = logits(moe(name)), logits(model)
    assert (want - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    if tied and name != "llama4":  # there W_e is stored transposed, which peft is not told
        a = loaded.get_base_model().model.layers[0].mlp.experts.lora_A["default"].weight
        assert all(torch.equal(one, a[: len(a) // 4]) for one in a.chunk(4))
