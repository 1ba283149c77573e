"""Gradient checkpointing of an adapted model, reentrant and not, with dropout: the gradients of the run without."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.support.cases import CASES, DROPS, IDS, llama, randomize

TARGETS = ["q_proj", "k_proj", "down_proj"]


def gradients(case: str, dropout: float, reentrant: bool | None) -> dict[str, torch.Tensor]:
    """Those of one training step; reentrant None: without checkpointing."""
    fields = {DROPS[case]: dropout} if case in DROPS else {}
    model = randomize(get_peft_model(llama(attention_dropout=dropout), CASES[case](target_modules=TARGETS, **fields)))
    model.train()
    replayed: list[nn.Module] = []
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        block = model.get_base_model().model.layers[0].self_attn
        block.register_forward_hook(lambda module, args, output: replayed.append(module))
    torch.manual_seed(11)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(replayed) == (0 if reentrant is None else 2)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_without(case):
    want = gradients(case, 0.3, None)
    assert any(gradient.ne(0).any() for gradient in want.values())
    for reentrant in (False, True):
        found = gradients(case, 0.3, reentrant)
        assert found.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", DROPS)
def test_the_dropout_of_these_tests_matters(case):
    dropped, whole = gradients(case, 0.3, None), gradients(case, 0.0, None)
    assert any(not torch.allclose(dropped[name], whole[name]) for name in whole)
