"""LoRA here and in peft: the same outputs, gradients and updates from the same parameters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from genft_modules import LoRAConfig
from tests.support.cases import IDS, MODELS, logits, randomize

PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}}


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, fields) for name in MODELS for fields in ({}, {"use_rslora": True})), ("llama", PATTERNS)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_equals_peft(name, fields):
    base, targets = MODELS[name]
    common = {"r": 4, "lora_alpha": 6, "target_modules": targets, **fields}
    peft_fields = {"fan_in_fan_out": True} if name == "gpt2" else {}
    theirs = randomize(get_peft_model(base(), LoraConfig(**common, **peft_fields)))
    ours = get_peft_model(base(), LoRAConfig(**common))

    pairs = []
    state = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            layer, _, rest = key.partition(".lora_")
            pairs.append((state[f"{layer}.genft_generators.default.lora_{rest[0]}"], parameter))
    assert len(pairs) == sum(parameter.requires_grad for parameter in state.values())
    with torch.no_grad():
        for mine, their in pairs:
            mine.copy_(their)

    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=IDS).logits.square().sum().backward()
    for mine, their in pairs:
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-3, atol=1e-4 * float(their.grad.abs().max()))
    torch.testing.assert_close(logits(ours.merge_and_unload()), logits(theirs.merge_and_unload()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initialisation_is_that_of_peft(init):
    base, targets = MODELS["llama"]
    common = {"r": 4, "target_modules": targets, "init_lora_weights": init}
    drawn = []
    for config in (LoraConfig(**common), LoRAConfig(**common)):
        model = base()
        torch.manual_seed(2)
        parameters = get_peft_model(model, config).named_parameters()
        drawn.append([(name, p) for name, p in parameters if p.requires_grad])
    for (name, their), (_, mine) in zip(*drawn, strict=True):
        assert bool(torch.count_nonzero(mine)) == bool(torch.count_nonzero(their)), name
        torch.testing.assert_close(mine.abs().mean(), their.abs().mean(), rtol=0.5, atol=0)
