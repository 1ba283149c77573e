"""Parts of a fused weight adapted separately, as layers of their own, by every method that can."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from genft_modules import FusedGenLinear, GenFTConfig, GIFTConfig, LoRAConfig, WeGeFTConfig
from tests.support.architectures import SMALL
from tests.support.cases import DEVICE, gpt2, logits, randomize, seeded

K, N = 10, 6
FLAGS = [True, False, True]
FUSED = {
    "wegeft": lambda **kw: WeGeFTConfig(r=4, wegeft_alpha=6, enable_wegeft=kw.pop("enable", {}), **kw),
    "gift": lambda **kw: GIFTConfig(r=4, block_kwargs={"act_layer": "gelu"}, enable_gift=kw.pop("enable", {}), **kw),
    "genft": lambda **kw: GenFTConfig(
        generator_share_dim=3, individual_features=2, enable_genft=kw.pop("enable", {}), **kw
    ),
    "genft_gelu": lambda **kw: GenFTConfig(
        generator_share_dim=3,
        individual_features=2,
        inner_activation="gelu",
        outer_activation="gelu",
        enable_genft=kw.pop("enable", {}),
        **kw,
    ),
    "lora": lambda **kw: LoRAConfig(r=4, lora_alpha=6, enable_lora=kw.pop("enable", {}), **kw),
}
methods = pytest.mark.parametrize("method", FUSED)


@methods
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_part_is_as_a_layer_of_its_own(method, backend):
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "reference" else torch.float32
    linear = nn.Linear(K, 3 * N).to(DEVICE, dtype)
    config = FUSED[method](enable={"qkv": FLAGS})
    qkv = randomize(FusedGenLinear.from_linear(linear, config, name="attn.qkv", backend=backend))
    delta = qkv.get_delta_weight()
    assert torch.count_nonzero(delta[N : 2 * N]) == 0
    fused = qkv.adapter_parameters()
    for index, rows in ((0, slice(0, N)), (2, slice(2 * N, 3 * N))):
        part = nn.Linear(K, N).to(DEVICE, dtype)
        part.weight.data = linear.weight[rows].detach().clone()
        alone = FusedGenLinear.from_linear(part, FUSED[method]())
        with torch.no_grad():
            for name, parameter in alone.adapter_parameters().items():
                parameter.copy_(fused[f"{index}.{name}"] if f"{index}.{name}" in fused else fused[name])
        torch.testing.assert_close(delta[rows], alone.get_delta_weight())
    x = torch.randn(7, K, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(qkv(x), linear(x) + x @ delta.t(), rtol=1e-4, atol=1e-4)


def phi3() -> nn.Module:
    """Gate and up are one nn.Linear, and so are q, k and v."""
    return seeded(lambda: Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)))


@methods
@pytest.mark.parametrize(
    ("base", "layer", "flags"),
    [(gpt2, "c_attn", FLAGS), (phi3, "gate_up_proj", [False, True]), (phi3, "qkv_proj", FLAGS)],
    ids=["gpt2-qkv", "phi3-gate-up", "phi3-qkv"],
)
def test_models(method, base, layer, flags, tmp_path):
    model = get_peft_model(base(), FUSED[method](enable={layer: flags}, target_modules=[layer, "o_proj", "c_fc"]))
    torch.testing.assert_close(logits(model), logits(base()))
    randomize(model)
    want = logits(model)
    for name, module in model.named_modules():
        if isinstance(module, FusedGenLinear):
            parts = module.get_delta_weight().chunk(len(flags))
            expected = flags if name.endswith(layer) else [True] * len(flags)
            assert [bool(torch.count_nonzero(part)) for part in parts] == expected
    model(input_ids=torch.arange(6, device=DEVICE)[None]).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), want)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)


def test_wegeft_shares_a_pair_per_part():
    config = WeGeFTConfig(r=4, enable_wegeft={"c_attn": FLAGS}, target_modules=["c_attn", "c_fc"])
    container = get_peft_model(gpt2(), config).base_model.shared_generators.genft_shared["default"]
    assert set(container) == {"c_attn_0", "c_attn_2", "c_fc"}


@pytest.mark.parametrize(("config", "field"), [(WeGeFTConfig, "enable_wegeft"), (LoRAConfig, "enable_lora")])
def test_refusals(config, field):
    with pytest.raises(TypeError, match=rf"{field}: got \[True\]"):
        config(**{field: [True]})
    with pytest.raises(ValueError, match=rf"{field}\['qkv'\]: got \[False\], expected at least one True"):
        config(**{field: {"qkv": [False]}})
    with pytest.raises(ValueError, match=rf"{field}: got 5 flags for transformer\.h\.0\.attn\.c_attn"):
        get_peft_model(gpt2(), config(**{field: {"c_attn": [True] * 5}, "target_modules": ["c_attn"]}))
    with pytest.warns(RuntimeWarning, match=rf"{field}: \['qkv'\] match none"):
        get_peft_model(gpt2(), config(**{field: {"qkv": FLAGS}, "target_modules": ["c_attn"]}))


def test_dropout_of_a_fused_weight():
    torch.manual_seed(0)
    for config in (
        LoRAConfig(r=4, lora_dropout=0.5, enable_lora={".*": FLAGS}),
        WeGeFTConfig(r=4, wegeft_dropout=0.5, enable_wegeft={".*": FLAGS}),
    ):
        layer = randomize(FusedGenLinear.from_linear(nn.Linear(K, 3 * N).to(DEVICE, torch.float64), config))
        x = torch.randn(5, K, dtype=torch.float64, device=DEVICE)
        want = layer.eval()(x)
        mean = torch.stack([layer.train()(x).detach() for _ in range(200)])
        assert not torch.equal(mean[0], mean[1])
        assert ((mean.mean(0) - want).abs() < 6 * mean.std(0) / mean.shape[0] ** 0.5 + 1e-9).all()
