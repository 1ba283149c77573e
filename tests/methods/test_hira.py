"""HiRA here and in peft: the same start, outputs, gradients and updates, and peft's own adapters loaded."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from genft_modules import FusedGenLinear, HiRAConfig, WeGeFTConfig, load_peft_hira
from genft_modules.methods import forms
from tests.support.cases import DEVICE, IDS, MODELS, bert, gpt2, llama, logits, randomize
from tests.support.truth import dropped

K, N = 10, 6
TARGETS = MODELS["llama"][1]


def theirs(config: peft.HiraConfig, base: nn.Module) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on fan_in_fan_out and the like
        return get_peft_model(base, config)


def pair(make=nn.Linear, **fields) -> tuple[nn.Module, FusedGenLinear]:
    """peft's layer, and ours on the same weight with the same values, in float64."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": make().to(DEVICE, torch.float64)})
    linear = make().to(DEVICE, torch.float64)
    linear.load_state_dict(holder["layer"].state_dict())
    model = theirs(peft.HiraConfig(target_modules=["layer"], **fields), holder)
    randomize(model.to(torch.float64), std=0.5)
    layer = FusedGenLinear.from_linear(linear, HiRAConfig(**fields)).train()
    with torch.no_grad():
        for name, parameter in layer.adapter_parameters().items():
            parameter.copy_(getattr(holder["layer"], name)["default"])
    return holder["layer"], layer


LAYERS = {
    "Linear": lambda: nn.Linear(K, N),
    "without bias": lambda: nn.Linear(K, N, bias=False),
    "Conv1D": lambda: Conv1D(N, K),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_equals_peft(kind):
    layer, ours = pair(LAYERS[kind], r=3)
    x, cotangent = (torch.randn(2, 5, size, device=DEVICE, dtype=torch.float64) for size in (K, N))
    found = []
    for module in (layer, ours):
        own = x.clone().requires_grad_()
        y = module(own)
        (y * cotangent).sum().backward()
        found.append({"y": y, "x": own.grad})
    found[0] |= {name: getattr(layer, name)["default"].grad for name in ("hira_A", "hira_B")}
    found[1] |= {name: parameter.grad for name, parameter in ours.adapter_parameters().items()}
    # What peft calls the delta is the factor of W0; Conv1D stores W0ᵀ.
    delta = layer.get_delta_weight("default") * layer.get_base_layer().weight
    found[0]["delta"] = delta.t() if ours.transposed else delta
    found[1]["delta"] = ours.get_delta_weight()
    for name, want in found[0].items():
        assert torch.count_nonzero(want), name
        torch.testing.assert_close(found[1][name], want, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("hooked", [False, True])
def test_dropout_is_that_of_peft_with_the_same_mask(hooked, monkeypatch):
    """x is dropped before ΔW and not before W0, in training only; no mask and no dropped x are saved."""
    layer, ours = pair(lambda: nn.Linear(K, N), r=3, hira_dropout=0.4)
    if hooked:
        ours.base_layer.register_forward_hook(lambda module, args, output: None)
    seed = torch.tensor([7], device=DEVICE)
    monkeypatch.setattr(forms, "draw_seed", lambda device: seed)
    drop = layer.hira_dropout["default"]
    monkeypatch.setattr(drop, "forward", lambda x: dropped(x, 0.4, seed) if drop.training else x)
    x, cotangent = (torch.randn(5, size, device=DEVICE, dtype=torch.float64) for size in (K, N))
    found = []
    for module, parameters in (
        (layer, [layer.hira_A["default"], layer.hira_B["default"]]),
        (ours, list(ours.adapter_parameters().values())),
    ):
        own, saved = x.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.data_ptr()) or t, lambda t: t):
            y = module(own)
        found.append([y, *torch.autograd.grad(y, [own, *parameters], cotangent)])
    given = {t.data_ptr() for t in (own, seed, ours.base_layer.weight, *ours.adapter_parameters().values())}
    assert set(saved) <= given
    for want, value in zip(*found, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[1][0], ours.eval()(x))
    torch.testing.assert_close(ours(x), layer.eval()(x))


def test_dropout_keeps_small_updates_and_leading_shapes():
    """In bfloat16, W0's product is added to the update: dropped, an update of 10⁻³ still reaches y in full."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 128, 256, device=DEVICE), torch.randn(256, 256, device=DEVICE) / 16
    h, b = torch.randn(256, 4, device=DEVICE), torch.randn(256, 4, device=DEVICE) / 2000
    form = forms.Generated(h, b, dropout=0.2, hadamard=True)
    x, weight = x.bfloat16(), weight.bfloat16()
    bias = torch.ones(256, device=DEVICE, dtype=torch.bfloat16)

    def updates(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        y = form.linear(x, weight, None, "reference") - nn.functional.linear(x, weight)
        torch.manual_seed(seed)
        return y.double(), form.update(x, weight, "reference").double()

    found, want = updates(3)
    assert found.shape == (2, 128, 256)
    assert abs(float((found * want).sum() / want.square().sum()) - 1) < 0.05
    assert form.linear(x[0, :0], weight, bias, "reference").shape == (0, 256)
    assert form.linear(x[0, 0], weight, bias, "reference").shape == (256,)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initialisation_is_that_of_peft(init):
    drawn = []
    for config in (peft.HiraConfig, HiRAConfig):
        torch.manual_seed(2)
        made = config(r=16, target_modules=["layer"], init_weights=init)
        model = theirs(made, nn.ModuleDict({"layer": nn.Linear(300, 200)}))
        drawn.append({tuple(p.shape): p for _, p in model.named_parameters() if p.requires_grad})
    assert set(drawn[0]) == set(drawn[1]) == {(16, 300), (200, 16)}
    for shape, their in drawn[0].items():
        torch.testing.assert_close(drawn[1][shape].abs().mean(), their.abs().mean(), rtol=0.1, atol=0)
        torch.testing.assert_close(drawn[1][shape].abs().max(), their.abs().max(), rtol=0.4, atol=0)


def saved(folder, *, base=llama, **fields) -> torch.Tensor:
    """An adapter that stock peft saves, and the logits of its model."""
    model = randomize(theirs(peft.HiraConfig(**{"r": 3, "target_modules": TARGETS, **fields}), base()), std=0.5)
    model.save_pretrained(folder)
    return logits(model.eval())


def test_loads_adapters_that_peft_has_saved(tmp_path):
    fields = {"r": 4, "hira_dropout": 0.1, "task_type": "CAUSAL_LM"}
    want = saved(tmp_path / "theirs", **fields)
    model = load_peft_hira(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.peft_config["default"]
    assert {name: getattr(config, name) for name in fields} == fields
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)

    model = load_peft_hira(llama(), tmp_path / "theirs", adapter_name="mine", is_trainable=True)
    model(input_ids=IDS).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 6 * 2
    assert all(parameter.grad is not None for parameter in trained)


def test_ranks_are_those_of_the_tensors(tmp_path):
    """peft applies rank_pattern to a layer's further adapters, not to its first."""
    fields = {"r": 3, "target_modules": TARGETS, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}
    model = theirs(peft.HiraConfig(**fields), llama())
    model.add_adapter("second", peft.HiraConfig(**fields))
    model.set_adapter("second")
    randomize(model, std=0.5).save_pretrained(tmp_path, selected_adapters=["default", "second"])
    for folder, name, ranks in (("", "default", {3}), ("second", "second", {2, 3})):
        model.set_adapter(name)
        found = load_peft_hira(llama(), tmp_path / folder)
        torch.testing.assert_close(logits(found), logits(model.eval()), rtol=1e-4, atol=1e-5)
        assert {len(p) for key, p in found.named_parameters() if key.endswith("hira_A")} == ranks


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (gpt2, {"target_modules": MODELS["gpt2"][1], "fan_in_fan_out": True}),
        (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    ],
)
def test_conv1d_and_a_head_come_along(base, fields, tmp_path):
    want = saved(tmp_path, base=base, **fields)
    torch.testing.assert_close(logits(load_peft_hira(base(), tmp_path)), want, rtol=1e-4, atol=1e-5)


def test_other_adapters_and_settings_are_refused(tmp_path):
    model = llama()
    names = list(model.state_dict())
    get_peft_model(llama(), WeGeFTConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / "ours")
    get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / "lora")
    for folder, message in (
        ("ours", r"expected peft's own HIRA; load genft adapters with PeftModel"),
        ("lora", r"adapter of type PeftType.LORA, expected peft's own HIRA$"),
    ):
        with pytest.raises(ValueError, match=message):
            load_peft_hira(model, tmp_path / folder)
    for change, message in (
        ({"init_weights": "nope"}, "init_weights: got 'nope'"),
        ({"target_modules": ["q_proj"]}, "unknown: .*k_proj.hira_A"),
    ):
        saved(tmp_path / "changed")
        config = json.loads((tmp_path / "changed" / "adapter_config.json").read_text())
        (tmp_path / "changed" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_peft_hira(model, tmp_path / "changed")
    embedding = theirs(peft.HiraConfig(r=2, target_modules=["embed_tokens"]), llama())
    embedding.save_pretrained(tmp_path / "embedding")
    with pytest.raises((TypeError, ValueError), match="embed_tokens"):
        load_peft_hira(model, tmp_path / "embedding")
    assert list(model.state_dict()) == names
