"""Where adapters go: tied embeddings, experts, peft's and transformers' ways in, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import LlamaForCausalLM

from genft_modules import FusedGenLinear, LoRAConfig, WeGeFTConfig
from tests.support.architectures import ARCHITECTURES
from tests.support.cases import CASES, DEVICE, KINDS, llama, logits, randomize


def layers(model: nn.Module) -> dict[str, FusedGenLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedGenLinear)}


@pytest.mark.filterwarnings("ignore:Model")  # peft warns of tied weights in every adapter
@pytest.mark.parametrize(("architecture", "head"), [("qwen2", "lm_head"), ("t5", "lm_head"), ("gpt2", "lm_head")])
def test_merging_into_a_tied_head_leaves_the_embeddings_alone(architecture, head):
    on = ARCHITECTURES[architecture]
    model = randomize(get_peft_model(on.make(), LoRAConfig(r=2, target_modules=[head, *on.targets])), std=0.2)
    base = model.get_base_model()
    tied = base.get_input_embeddings().weight
    assert base.get_submodule(head).base_layer.weight is tied
    want, embeddings = on.logits(model), tied.clone()
    model.merge_adapter()
    torch.testing.assert_close(on.logits(model), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(base.get_input_embeddings().weight, embeddings)
    model.unmerge_adapter()
    assert torch.equal(on.logits(model), want)
    assert base.get_submodule(head).base_layer.weight is base.get_input_embeddings().weight  # tied as before
    merged = model.merge_and_unload()
    torch.testing.assert_close(on.logits(merged), want, rtol=1e-4, atol=1e-4)
    assert not merged.config.tie_word_embeddings  # and saved as two


@pytest.mark.parametrize("case", KINDS)
def test_peft_injects_without_a_model_around(case):
    config = CASES[case](target_modules=["q_proj", "v_proj"])
    model = inject_adapter_in_model(config, llama(), "mine")
    assert isinstance(model, LlamaForCausalLM)
    torch.testing.assert_close(logits(model), logits(llama()))
    randomize(model)
    state = get_peft_model_state_dict(model, adapter_name="mine")
    for fields in ({}, {"state_dict": state}, {"low_cpu_mem_usage": True}):
        again = inject_adapter_in_model(CASES[case](target_modules=["q_proj", "v_proj"]), llama(), "mine", **fields)
        assert set(layers(again)) == set(layers(model))
        low_memory = {"low_cpu_mem_usage": True} if "low_cpu_mem_usage" in fields else {}
        assert not set_peft_model_state_dict(again, state, adapter_name="mine", **low_memory).unexpected_keys
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("case", KINDS)
def test_a_model_built_on_meta_gets_its_weights_later(case):
    adapted = randomize(get_peft_model(llama(), CASES[case](target_modules=["q_proj", "down_proj"])))
    config = llama().config
    with torch.device("meta"):
        base = LlamaForCausalLM(config).eval()
    model = get_peft_model(base, CASES[case](target_modules=["q_proj", "down_proj"]))
    assert all(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(adapted.state_dict(), assign=True)
    rotary = model.get_base_model().model
    rotary.rotary_emb = type(rotary.rotary_emb)(config).to(DEVICE)  # a buffer that no checkpoint has
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(adapted))


class Experts(nn.Module):
    """A mixture whose experts are ordinary layers: each token goes to one of them."""

    def __init__(self, count: int = 3, k: int = 8, n: int = 12) -> None:
        super().__init__()
        self.router = nn.Linear(k, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(k, n), nn.GELU(), nn.Linear(n, k)) for _ in range(count))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):  # an expert may get no token at all
            y[chosen == index] = expert(x[chosen == index])
        return y


@pytest.mark.parametrize("case", KINDS)
def test_experts_that_are_layers(case):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, device=DEVICE)
    model = Experts().to(DEVICE)
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([0.0, 0.0, -100.0]))  # the last expert is idle
    want = model(x)
    model = get_peft_model(model, CASES[case](target_modules=r"experts\.\d\.(0|2)"))
    torch.testing.assert_close(model(x), want)
    assert len(layers(model)) == 6
    randomize(model, std=0.3)
    found = model(x)
    assert not torch.allclose(found, want)
    found.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    torch.testing.assert_close(model.merge_and_unload()(x), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Conv1d(1, 1, 1), "Conv1d"),
        (lambda: nn.Conv2d(1, 1, 1), "Conv2d"),
        (lambda: nn.Embedding(3, 3), "Embedding"),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear"),
        (lambda: nn.LSTM(2, 2), "LSTM"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
    ],
)
def test_other_layers_are_refused_by_name(make, name):
    with pytest.raises(TypeError, match=rf"target_modules: it: base_layer: got {name}, expected torch.nn.Linear"):
        get_peft_model(nn.ModuleDict({"it": make()}), WeGeFTConfig(r=2, target_modules=["it"]))


def test_hotswapping_is_refused_by_peft(tmp_path):
    """It knows the layers of its own LoRA only, and says so; `load_adapter` and `set_adapter` are the way."""
    model = get_peft_model(llama(), LoRAConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but GENFT_LORA"):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device=DEVICE)


@pytest.mark.parametrize(
    ("make", "targets", "adapted"),
    [("gpt2", None, {"c_attn"}), ("t5", None, {"q", "v"}), ("bert", None, {"query", "value"})],
)
def test_the_usual_layers_of_an_architecture(make, targets, adapted):
    model = get_peft_model(ARCHITECTURES[make].make(), LoRAConfig(r=2, target_modules=targets))
    assert {name.rpartition(".")[2] for name in layers(model)} == adapted


@pytest.mark.parametrize("gradients", [True, False])
def test_a_transformer_encoder_of_torch_calls_its_adapted_layers(gradients):
    """In evaluation its layers have a fast path that takes their weights and calls nothing."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).to(DEVICE)
    x = torch.randn(2, 3, 8, device=DEVICE)
    plain = encoder.eval()(x)
    model = randomize(get_peft_model(encoder, LoRAConfig(r=2, target_modules=["linear1", "linear2"])), std=0.5).eval()
    with torch.set_grad_enabled(gradients):
        found = model(x)
        assert (found - plain).abs().max() > 0.01
        model.merge_adapter()
        torch.testing.assert_close(model(x), found, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain)


SUMMED = ("wegeft", "gift_gelu", "lora", "peanut", "sas", "grft", "genft")


def weighted(case: str) -> PeftModel:
    model = get_peft_model(llama(), CASES[case](target_modules=["q_proj", "down_proj"]))
    model.add_adapter("second", CASES[case](target_modules=["q_proj", "o_proj"]))
    for index, name in enumerate(("default", "second")):
        model.set_adapter(name)
        randomize(model, seed=index, std=0.2)
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("case", SUMMED)
def test_weighted_sums_of_adapters(case, tmp_path):
    model = weighted(case)
    before = logits(model)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
    assert torch.equal(logits(model), before)
    found = layers(model.get_base_model())
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "down_proj", "o_proj"}
    for name, layer in found.items():
        parts = {"default": 0.7, "second": -0.4}
        want = sum(w * layer.get_delta_weight(n) for n, w in parts.items() if n in layer.genft_generators)
        torch.testing.assert_close(layer.get_delta_weight("sum"), want, rtol=1e-4, atol=1e-5)
        assert not any(p.requires_grad for p in layer.adapter_parameters("sum").values()), name
    model.set_adapter("sum")
    want = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "sum")
    assert isinstance(loaded.peft_config["default"], LoRAConfig)
    assert torch.equal(logits(loaded), want)
    model.delete_adapter("sum")
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_a_weighted_sum_of_a_given_rank_is_the_best_one():
    model = weighted("lora")
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum", combination_type="svd", svd_rank=3)
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "exact")
    for layer in layers(model).values():
        u, s, vh = torch.linalg.svd(layer.get_delta_weight("exact"))
        torch.testing.assert_close(layer.get_delta_weight("sum"), u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-5)


def test_weighted_sums_refuse():
    model = weighted("lora")
    add = model.add_weighted_adapter
    full = weighted("genft_gelu")
    saved = get_peft_model(llama(), LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    names = ["default", "second"]
    for call, message in (
        (lambda: add(names, [1.0], "sum"), "weights: got 1 for 2 adapters"),
        (lambda: add([], [], "sum"), "weights: got 0 for 0 adapters"),
        (lambda: add(["default", "third"], [1.0, 1.0], "sum"), "adapters: 'third' does not exist"),
        (lambda: add(names, [1.0, 1.0], "second"), "adapter_name: 'second' already exists in the model"),
        (
            lambda: add(names, [1.0, 1.0], "sum", "ties"),
            r"combination_type: got 'ties', expected one of \('cat', 'svd'\)",
        ),
        (lambda: add(names, [1.0, 1.0], "sum", "cat", 4), "svd_rank: got 4, expected None"),
        (lambda: full.add_weighted_adapter(names, [1.0, 1.0], "sum"), r"'default' \(genft\) has full rank in .*q_proj"),
        (lambda: saved.add_weighted_adapter(["default"], [1.0], "sum"), "'default' also trains full modules"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="weights of 'second': got 'a', expected a number"):
        add(names, [1.0, "a"], "sum")
    assert list(model.peft_config) == names
