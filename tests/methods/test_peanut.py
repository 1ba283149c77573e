"""PEANuT here and in peft: the same start, outputs, gradients and updates, and peft's own adapters loaded."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.activations import ACT2FN

from genft_modules import FusedGenLinear, PeanutConfig, WeGeFTConfig, load_peft_peanut
from tests.support.cases import DEVICE, IDS, MODELS, bert, llama, logits, randomize

K, N = 10, 6
TARGETS = MODELS["llama"][1]


def theirs(config: peft.PeanutConfig, base: nn.Module) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on target names and the like
        return get_peft_model(base, config)


def pair(dtype: torch.dtype, **fields) -> tuple[nn.Module, dict[str, nn.Parameter], FusedGenLinear]:
    """peft's layer, its parameters by our names, and ours on the same weight with the same values."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": nn.Linear(K, N).to(DEVICE, dtype)})
    linear = nn.Linear(K, N).to(DEVICE, dtype)
    linear.load_state_dict(holder["layer"].state_dict())
    model = randomize(theirs(peft.PeanutConfig(r=3, target_modules=["layer"], **fields), holder), std=0.5).to(dtype)
    layer = FusedGenLinear.from_linear(linear, PeanutConfig(r=3, **fields)).to(dtype)
    named = {
        key.split("peanut_")[1].replace(".default", "").removesuffix(".weight"): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    mine = layer.adapter_parameters()
    assert set(named) == set(mine)
    with torch.no_grad():
        for name, parameter in named.items():
            mine[name].copy_(parameter)
    return holder["layer"], named, layer


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("act_fn", sorted(ACT2FN))
def test_equals_peft(act_fn, depth):
    # peft itself takes a prelu in float32 only
    dtype, close = (torch.float32, 1e-5) if act_fn == "prelu" else (torch.float64, 1e-10)
    layer, named, ours = pair(dtype, act_fn=act_fn, depth=depth, scaling=0.7)
    x, cotangent = torch.randn(5, K, device=DEVICE, dtype=dtype), torch.randn(5, N, device=DEVICE, dtype=dtype)
    found = []
    for module, parameters in ((layer, named), (ours, ours.adapter_parameters())):
        own = x.clone().requires_grad_()
        y = module(own)
        (y * cotangent).sum().backward()
        found.append({"y": y, "x": own.grad, "delta": module.get_delta_weight("default")})
        found[-1] |= {name: parameters[name].grad for name in named}
    for name, want in found[0].items():
        assert torch.count_nonzero(want), name
        torch.testing.assert_close(found[1][name], want, rtol=close, atol=close, msg=lambda m, n=name: f"{n}: {m}")


def test_an_activations_own_parameters_are_constants():
    for act_fn in ("prelu", "xielu"):
        layer = FusedGenLinear.from_linear(nn.Linear(K, N), PeanutConfig(r=3, act_fn=act_fn))
        assert set(layer.adapter_parameters()) == {"A", "B"}
        assert {key for key in layer.state_dict() if "genft" in key} == {
            f"genft_generators.default.{name}" for name in "AB"
        }


@pytest.mark.parametrize("init", [True, False])
def test_initialisation_is_that_of_peft(init):
    common = {"r": 16, "depth": 1, "target_modules": ["layer"], "init_weights": init}
    drawn = []
    for config in (peft.PeanutConfig(**common), PeanutConfig(**common)):
        torch.manual_seed(2)
        model = theirs(config, nn.ModuleDict({"layer": nn.Linear(300, 200)}))
        drawn.append({tuple(p.shape): p for _, p in model.named_parameters() if p.requires_grad})
    assert set(drawn[0]) == set(drawn[1]) == {(16, 200), (200, 16), (16, 16)}
    for shape, their in drawn[0].items():
        mine = drawn[1][shape]
        torch.testing.assert_close(mine.abs().mean(), their.abs().mean(), rtol=0.15, atol=0)
        torch.testing.assert_close(mine.abs().max(), their.abs().max(), rtol=0.15, atol=0)


def saved(folder, *, base=llama, **fields) -> torch.Tensor:
    """An adapter that stock peft saves, and the logits of its model."""
    config = peft.PeanutConfig(**{"r": 3, "target_modules": TARGETS, **fields})
    model = randomize(theirs(config, base()))
    model.save_pretrained(folder)
    return logits(model.eval())


@pytest.mark.parametrize("depth", [0, 2])
def test_loads_adapters_that_peft_has_saved(depth, tmp_path):
    want = saved(tmp_path / "theirs", depth=depth, act_fn="silu", scaling=0.5, task_type="CAUSAL_LM")
    model = load_peft_peanut(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.peft_config["default"]
    assert (config.depth, config.act_fn, config.scaling, config.task_type) == (depth, "silu", 0.5, "CAUSAL_LM")
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)

    model = load_peft_peanut(llama(), tmp_path / "theirs", adapter_name="mine", backend="reference", is_trainable=True)
    model(input_ids=IDS).logits.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 6 * (2 + 2 * depth)
    assert all(parameter.grad is not None for parameter in trained)
    layer = next(module for module in model.modules() if isinstance(module, FusedGenLinear))
    assert layer.genft_generators["mine"].backend == "reference"


def test_a_head_comes_along(tmp_path):
    want = saved(tmp_path, base=bert, target_modules=["query"], modules_to_save=["classifier"])
    torch.testing.assert_close(logits(load_peft_peanut(bert(), tmp_path)), want, rtol=1e-4, atol=1e-5)


def _change(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{Q}.peanut_C.weight": torch.zeros(2)}), rf"unknown: \['{Q}.peanut_C.weight'\]"),
        (lambda t: t.pop(f"{Q}.peanut_A.weight"), rf"missing: \['{Q}.peanut_A.weight'\]"),
        (lambda t: t.update({f"{Q}.peanut_encoders.1.weight": torch.zeros(3, 3)}), r"unknown: .*peanut_encoders\.1"),
        (
            lambda t: t.update({f"{Q}.peanut_B.weight": torch.zeros(32, 4)}),
            rf"shape mismatch: {Q}.peanut_B.weight: got \(32, 4\), expected \(32, 3\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message, tmp_path):
    saved(tmp_path, depth=1)
    _change(tmp_path, change)
    model = llama()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_peft_peanut(model, tmp_path)
    assert list(model.state_dict()) == names


def test_other_adapters_and_settings_are_refused(tmp_path):
    get_peft_model(llama(), WeGeFTConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"expected peft's own PEANUT; load genft adapters with PeftModel"):
        load_peft_peanut(llama(), tmp_path / "ours")
    get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=TARGETS)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapter of type PeftType.LORA, expected peft's own PEANUT$"):
        load_peft_peanut(llama(), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapter_config.json"):
        load_peft_peanut(llama(), tmp_path)
    saved(tmp_path / "newer")
    config = json.loads((tmp_path / "newer" / "adapter_config.json").read_text())
    (tmp_path / "newer" / "adapter_config.json").write_text(json.dumps(config | {"act_fn": "nope"}))
    with pytest.raises(ValueError, match="act_fn"):
        load_peft_peanut(llama(), tmp_path / "newer")


def test_settings_of_another_peft_are_refused_where_they_are_used(monkeypatch, tmp_path):
    @dataclass
    class Newer(peft.PeanutConfig):
        gate: float = 1.0

    want = saved(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in ("peft_type", "auto_mapping", "peft_version"):
        fields.pop(name, None)
    for gate in (1.0, 0.5):
        monkeypatch.setattr(peft.PeftConfig, "from_pretrained", lambda path, gate=gate: Newer(**fields, gate=gate))
        if gate == 1.0:
            torch.testing.assert_close(logits(load_peft_peanut(llama(), tmp_path)), want, rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(ValueError, match=r"unknown settings \{'gate': 0.5\}"):
                load_peft_peanut(llama(), tmp_path)
