"""Which layers share which factors, and what that costs: WeGeFT's and GIFT's rules, and the published counts."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from genft_modules import FusedGenLinear, GIFTConfig, WeGeFTConfig
from tests.support.cases import gpt2, llama, logits, randomize

PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def groups(model: nn.Module) -> dict[str, set[str]]:
    """Key of the shared factors → the layers that use them."""
    container = model.base_model.shared_generators.genft_shared["default"]
    return {
        key: {
            name
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, FusedGenLinear) and factors in layer.genft_generators["default"].shared
        }
        for key, factors in container.items()
    }


def trainable(model: PeftModel) -> int:
    return model.get_nb_trainable_parameters()[0]


def test_one_pair_per_type_across_depth():
    model = get_peft_model(llama(), WeGeFTConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert groups(model) == {
        kind: {f"model.layers.{depth}.self_attn.{kind}" for depth in (0, 1)} for kind in ("q_proj", "v_proj")
    }
    first, second = (
        model.get_base_model().model.layers[depth].self_attn.q_proj.adapter_parameters()["psi"] for depth in (0, 1)
    )
    assert first is second
    assert trainable(model) == 2 * 2 * 4 * 32


def test_a_type_splits_where_k_or_r_differs():
    model = get_peft_model(gpt2(), WeGeFTConfig(r=4, target_modules=["c_proj"], rank_pattern={"h.1.attn.c_proj": 2}))
    assert groups(model) == {  # c_proj follows the attention (K = 32) and the MLP (K = 128)
        "c_proj": {"transformer.h.0.attn.c_proj"},
        "c_proj_in_features128_r4": {"transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"},
        "c_proj_in_features32_r2": {"transformer.h.1.attn.c_proj"},
    }


def test_tied_groups():
    tied = [["q_proj", "k_proj"], [r".*layers\.0\..*v_proj", "o_proj"]]
    model = get_peft_model(llama(), WeGeFTConfig(r=4, tied_modules=tied, target_modules=[*PAPER[:3], "o_proj"]))
    attention = [f"model.layers.{depth}.self_attn." for depth in (0, 1)]
    assert groups(model) == {
        "tied_0": {path + kind for path in attention for kind in ("q_proj", "k_proj")},
        "tied_1": {attention[0] + "v_proj", attention[0] + "o_proj", attention[1] + "o_proj"},
    }
    assert trainable(model) == 3 * 2 * 4 * 32  # the second v_proj has its own
    assert "pair.phi" in dict(
        model.get_base_model().get_submodule(attention[1] + "v_proj").genft_generators["default"].named_parameters()
    )


def test_tied_groups_must_fit():
    fields = {"target_modules": PAPER, "r": 4}
    with pytest.raises(
        ValueError, match=r"tied_modules: .*down_proj has in_features = 48, r = 4, expected in_features = 32"
    ):
        get_peft_model(llama(), WeGeFTConfig(tied_modules=[["q_proj", "down_proj"]], **fields))
    with pytest.raises(ValueError, match=r"tied_modules: .*r = 2, expected in_features = 32, r = 4"):
        get_peft_model(llama(), WeGeFTConfig(tied_modules=[["q_proj", "k_proj"]], rank_pattern={"k_proj": 2}, **fields))
    with pytest.warns(RuntimeWarning, match=r"tied_modules: \['qproj'\] match none"):
        get_peft_model(llama(), WeGeFTConfig(tied_modules=[["qproj", "k_proj"]], **fields))


def test_scale_belongs_to_the_layer():
    config = WeGeFTConfig(
        r=4, wegeft_alpha=8, alpha_pattern={"layers.1.self_attn.q_proj": 2}, target_modules=["q_proj"]
    )
    model = randomize(get_peft_model(llama(), config)).get_base_model()
    for depth, scale in ((0, 2.0), (1, 0.5)):
        layer = model.model.layers[depth].self_attn.q_proj
        pair = layer.adapter_parameters()
        torch.testing.assert_close(
            layer.get_delta_weight(), scale * layer.base_layer.weight @ pair["phi"].t() @ pair["psi"]
        )


def test_layers_with_the_names_of_module_dict_attributes():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.keys(x) + self.values(x)

    model = get_peft_model(Attention(), WeGeFTConfig(r=2, target_modules=["keys", "values"]))
    assert set(groups(model)) == {"keys_", "values_"}
    model(torch.ones(1, 4)).sum().backward()


def test_gift_shares_by_name_or_all():
    config = GIFTConfig(r=4, block="mlp", target_modules=["q_proj", "v_proj"])
    assert set(groups(get_peft_model(llama(), config))) == {"q_proj", "v_proj"}
    config.share_projections = True
    model = get_peft_model(llama(), config)
    assert len(groups(model)["all"]) == 4
    with pytest.raises(ValueError, match=r"share_projections: .*in_features = 48, expected in_features = 32"):
        get_peft_model(llama(), GIFTConfig(share_projections=True, target_modules=PAPER))
    mixer = GIFTConfig(r=4, block="mlp_mixer", share_projections=True, target_modules=["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="tokens = 16, expected in_features = 32, tokens = 32"):
        get_peft_model(llama(), mixer)


def test_gift_on_a_fused_qkv(tmp_path):
    config = GIFTConfig(r=4, enable_gift={"c_attn": [True, False, True]}, target_modules=["c_attn", "c_fc"])
    model = randomize(get_peft_model(gpt2(), config))
    assert set(groups(model)) == {"c_attn_0", "c_attn_2", "c_fc"}
    delta = model.get_base_model().transformer.h[0].attn.c_attn.get_delta_weight()
    assert delta.shape == (96, 32)
    assert [bool(torch.count_nonzero(third)) for third in delta.chunk(3)] == [True, False, True]
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), want)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"enable_gift: got 5 flags for transformer\.h\.0\.attn\.c_attn"):
        get_peft_model(gpt2(), GIFTConfig(enable_gift={"c_attn": [True] * 5}, target_modules=["c_attn"]))
    with pytest.warns(RuntimeWarning, match=r"enable_gift: \['qkv'\] match none"):
        get_peft_model(gpt2(), GIFTConfig(enable_gift={"qkv": [True] * 3}, target_modules=["c_attn"]))


LLAMA_2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA_3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32} | {
    "num_key_value_heads": 8
}


@pytest.mark.parametrize(("fields", "count"), [(LLAMA_2_7B, 3_506_176), (LLAMA_3_8B, 3_932_160)], ids=["2-7B", "3-8B"])
def test_published_counts_on_llama(fields, count):
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(num_attention_heads=32, **fields))
    model = get_peft_model(base, WeGeFTConfig(r=64, wegeft_alpha=128, target_modules=PAPER))
    assert trainable(model) == count
    assert set(groups(model)) == set(PAPER)
    # GIFT keeps the same two matrices per name; its MLP works in r = 64 dimensions, 128 hidden.
    model = get_peft_model(model.unload(), GIFTConfig(r=64, target_modules=PAPER))
    assert trainable(model) == count
    model = get_peft_model(model.unload(), GIFTConfig(r=64, block="mlp", target_modules=PAPER))
    assert trainable(model) == count + 5 * (64 * 128 + 128 + 128 * 64 + 64)


def test_count_on_gpt2():
    with torch.device("meta"):
        base = GPT2LMHeadModel(GPT2Config())
    model = get_peft_model(base, WeGeFTConfig(r=8, target_modules=["c_attn", "c_proj"]))
    assert trainable(model) == 2 * 8 * (768 + 768 + 3072)
