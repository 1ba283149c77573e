"""What every method promises, on every architecture: one class of tests over all of `METHODS`.

A method is in as soon as it is in `METHODS` and has a case in `cases.py` under its name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from genft_modules import METHODS, FusedGenLinear
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.cases import CASES, KINDS, randomize
from tests.support.truth import EPSILON, error

# Every method; on the first architecture also every other way of keeping and applying parameters.
EVERYWHERE = (*METHODS, "genft_gelu")
FIRST, *OTHERS = ARCHITECTURES
PAIRS = [
    *((case, FIRST) for case in dict.fromkeys((*EVERYWHERE, *KINDS))),
    *((case, architecture) for architecture in OTHERS for case in EVERYWHERE),
]
# Tracing a whole model takes seconds: a few of them by turns, and of the first a block with each method.
COMPILED = [(EVERYWHERE[index], architecture) for index, architecture in enumerate(("gpt2", "bert", "vit"))]


@dataclass
class Adapted:
    """A model with an adapter whose ΔW is not zero; `plain` is the model without."""

    case: str
    on: Architecture
    model: PeftModel
    plain: nn.Module
    dense: nn.Module  # a copy of `plain` for `with_updates`

    @classmethod
    def build(cls, case: str, architecture: str) -> Adapted:
        on = ARCHITECTURES[architecture]
        model = get_peft_model(on.make(), CASES[case](target_modules=on.targets))
        return cls(case, on, randomize(model, std=0.2), on.make(), on.make())

    def config(self, **fields):
        return CASES[self.case](**{"target_modules": self.on.targets, **fields})

    def logits(self) -> torch.Tensor:
        return self.on.logits(self.model)

    def layers(self) -> dict[str, FusedGenLinear]:
        found = self.model.get_base_model().named_modules()
        return {name: layer for name, layer in found if isinstance(layer, FusedGenLinear)}

    def with_updates(self, *adapters: str) -> nn.Module:
        """The plain model with the adapters' ΔW added to its weights; the same one at each call."""
        self.dense.load_state_dict(self.plain.state_dict())
        with torch.no_grad():
            for name, layer in self.layers().items():
                for adapter in adapters:
                    delta = layer.get_delta_weight(adapter)
                    self.dense.get_submodule(name).weight += delta.t() if layer.transposed else delta
        return self.dense


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_every_method_is_here():
    methods = {method: CASES[method]().method for method in METHODS}
    assert methods == {method: method for method in METHODS}


@pytest.fixture(scope="class", params=PAIRS, ids="-".join)
def built(request) -> Adapted:
    return Adapted.build(*request.param)


@pytest.fixture
def adapted(built) -> Adapted:
    """A copy for one test, which may change it."""
    return replace(built, model=copy.deepcopy(built.model))


class TestContract:
    def test_starts_as_the_base_model(self, built):
        fresh = replace(built, model=get_peft_model(built.on.make(), built.config()))
        torch.testing.assert_close(fresh.logits(), built.on.logits(built.plain))
        targets = {name for name, _ in built.plain.named_modules() if name.rpartition(".")[2] in built.on.targets}
        assert set(fresh.layers()) == {name for name in targets if not list(built.plain.get_submodule(name).children())}
        for name, layer in fresh.layers().items():
            assert torch.count_nonzero(layer.get_delta_weight()) == 0, name

    def test_forward_is_that_of_weights_with_the_update_added(self, built):
        close(built.logits(), built.on.logits(built.with_updates("default")))
        assert (built.logits() - built.on.logits(built.plain)).abs().max() > 0.01  # and the update shows

    def test_a_training_step_changes_every_adapter_parameter_and_nothing_else(self, adapted):
        model = adapted.model.train()
        before = bits(model)
        training = trained(model)
        assert training
        assert all("genft_generators.default." in name or "genft_shared.default." in name for name in training)
        optimizer = torch.optim.AdamW(training.values(), lr=0.01)
        adapted.on.output(model).logits.square().mean().backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(training)
        optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == set(training)

    def test_saving_and_loading(self, built, tmp_path):
        want = built.logits()
        built.model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        training = trained(built.model)
        values = {name: tensor for name, tensor in saved.items() if tensor.is_floating_point()}  # the others: indices
        assert sum(tensor.numel() for tensor in values.values()) == sum(p.numel() for p in training.values())
        assert set(values) == {
            name.replace(".default", "").replace("base_model.shared", "base_model.model.shared") for name in training
        }
        for low_memory in (False, True):
            loaded = PeftModel.from_pretrained(built.on.make(), tmp_path, low_cpu_mem_usage=low_memory)
            assert torch.equal(built.on.logits(loaded), want)
            assert_same_bits(get_peft_model_state_dict(loaded), saved)
            assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())

    def test_merging_and_back(self, adapted):
        want, before = adapted.logits(), bits(adapted.model)
        adapted.model.merge_adapter(safe_merge=True)
        close(adapted.logits(), want)
        assert adapted.model.get_model_status().merged_adapters == ["default"]
        adapted.model.unmerge_adapter()
        assert_same_bits(adapted.model.state_dict(), before)
        assert torch.equal(adapted.logits(), want)
        merged = adapted.model.merge_and_unload()
        assert type(merged) is type(adapted.plain)
        assert list(merged.state_dict()) == list(adapted.plain.state_dict())
        close(adapted.on.logits(merged), want)

    def test_disabling_and_unloading(self, adapted):
        want, plain = adapted.logits(), adapted.on.logits(adapted.plain)
        with adapted.model.disable_adapter():
            assert torch.equal(adapted.logits(), plain)
        assert torch.equal(adapted.logits(), want)
        adapted.model.merge_adapter()
        with adapted.model.disable_adapter():
            assert torch.equal(adapted.logits(), plain)
        assert_same_bits(adapted.model.unload().state_dict(), adapted.plain.state_dict())

    def test_several_adapters(self, adapted):
        model, first = adapted.model, adapted.logits()
        model.add_adapter("second", adapted.config())
        assert torch.equal(adapted.logits(), first)
        model.set_adapter("second")
        assert all(".second." in name for name in trained(model))
        randomize(model, seed=5, std=0.2)
        second = adapted.logits()
        close(second, adapted.on.logits(adapted.with_updates("second")))
        model.base_model.set_adapter(["default", "second"])
        close(adapted.logits(), adapted.on.logits(adapted.with_updates("default", "second")))
        model.set_adapter("default")
        assert torch.equal(adapted.logits(), first)
        model.delete_adapter("default")
        assert not any(".default." in name for name in model.state_dict())
        model.set_adapter("second")
        assert torch.equal(adapted.logits(), second)

    def test_half_precision(self, built):
        base = built.on.make().to(torch.bfloat16)
        half = replace(built, model=get_peft_model(base, built.config()))
        training = trained(half.model)
        assert {parameter.dtype for parameter in training.values()} == {torch.float32}
        half.model.load_state_dict(
            {name: tensor for name, tensor in bits(built.model).items() if name in training}, False
        )
        logits, truth = half.logits(), built.logits()
        assert logits.dtype == torch.bfloat16
        dense = copy.deepcopy(built.with_updates("default")).to(torch.bfloat16)
        own = built.on.logits(dense)  # what bfloat16 costs without adapters
        assert error(logits, truth) <= 2 * error(own, truth) + EPSILON[torch.bfloat16]
        half.on.output(half.model).logits.float().square().mean().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in training.values())

    def test_gradient_checkpointing_gives_the_same_gradients(self, adapted):
        model = adapted.model.train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            model.zero_grad()
            torch.manual_seed(13)
            adapted.on.output(model).logits.square().mean().backward()
            gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
        plain, replayed = gradients
        for name, gradient in plain.items():
            torch.testing.assert_close(replayed[name], gradient, msg=name)


def assert_compiles(adapted: Adapted, part: nn.Module) -> None:
    want = adapted.logits()
    torch._dynamo.reset()  # the code of transformers' wrappers is one for all models, and recompiled for each
    part.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(adapted.logits(), want)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_block_compiles_as_one_graph(case):
    adapted = Adapted.build(case, FIRST)
    assert_compiles(adapted, adapted.model.get_base_model().model.layers[0])


@pytest.mark.parametrize("pair", COMPILED, ids="-".join)
def test_a_model_compiles_as_one_graph(pair):
    adapted = Adapted.build(*pair)
    assert_compiles(adapted, adapted.model.get_base_model())
