"""Batches whose samples take different adapters: each sample gets what it gets alone with its adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from genft_modules import METHODS, FusedGenLinear
from genft_modules.layer import mixed
from genft_modules.methods import Generator
from tests.support.architectures import ARCHITECTURES
from tests.support.cases import CASES, DEVICE, DROPS, KINDS, llama, randomize
from tests.support.truth import EPSILON, error
from tests.support.watchers import Int8Linear

IDS = torch.arange(5 * 7, device=DEVICE).reshape(5, 7) * 11 % 61
NAMES = ["second", "default", "__base__", "second", "third"]


def adapt(*cases: str, architecture: str = "llama", **fields) -> PeftModel:
    """A model with the adapters "default", "second" and "third"; the last is on other layers, with another rank."""
    on = ARCHITECTURES[architecture]
    first, second, third = (cases * 3)[:3]
    model = get_peft_model(on.make(), CASES[first](target_modules=on.targets, **fields))
    model.add_adapter("second", CASES[second](target_modules=on.targets, **fields))
    narrow = CASES[third](target_modules=on.targets[1:], **fields)
    narrow.r = 2
    model.add_adapter("third", narrow)
    for index, name in enumerate(("default", "second", "third")):
        model.set_adapter(name)
        randomize(model, seed=index, std=0.2)
    model.set_adapter("default")
    return model.eval()


def alone(model: PeftModel, name: str, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits with one adapter for all."""
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(**inputs).logits
        model.set_adapter(name)
        logits = model(**inputs).logits
        model.set_adapter("default")
        return logits


def one_by_one(model: PeftModel, names: list[str], **inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [alone(model, name, **{key: value[i : i + 1] for key, value in inputs.items()}) for i, name in enumerate(names)]
    )


@pytest.mark.parametrize("case", dict.fromkeys((*METHODS, *KINDS)))
def test_each_sample_has_its_adapter(case):
    model = adapt(case)
    want = one_by_one(model, NAMES, input_ids=IDS)
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert (want[0] - alone(model, "default", input_ids=IDS[:1])[0]).abs().max() > 0.01  # it matters which one
    plain = alone(model, "__base__", input_ids=IDS)
    torch.testing.assert_close(found[2], plain[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "cases"),
    [
        ("gpt2", ("gift", "gift_gelu")),  # an edit and a low-rank update
        ("bert", ("genft", "genft_gelu")),  # a low-rank update and one of full rank
        ("t5", ("gift", "gift_mlp", "gift_gelu")),
        ("vit", ("lora",)),
        ("whisper", ("wegeft",)),
    ],
)
def test_architectures_and_forms_side_by_side(architecture, cases):
    model = adapt(*cases, architecture=architecture)
    batch = ARCHITECTURES[architecture].batch
    batch = {key: torch.cat([value, value.flip(0), value])[:5] for key, value in batch.items()}
    with torch.no_grad():
        found = model(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(found, one_by_one(model, NAMES, **batch), rtol=1e-4, atol=1e-4)


def test_equals_peft():
    """Stock peft's LoRA with the same factors, the same call."""
    ours = adapt("lora")
    on = ARCHITECTURES["llama"]
    theirs = get_peft_model(on.make(), LoraConfig(r=4, lora_alpha=6, target_modules=on.targets))
    theirs.add_adapter("second", LoraConfig(r=4, lora_alpha=6, target_modules=on.targets))
    theirs.add_adapter("third", LoraConfig(r=2, lora_alpha=6, target_modules=on.targets[1:]))
    layers = dict(ours.get_base_model().named_modules())
    for name, layer in theirs.get_base_model().named_modules():
        for adapter in getattr(layer, "lora_A", ()):
            parameters = layers[name].adapter_parameters(adapter)
            layer.lora_A[adapter].weight.data.copy_(parameters["lora_A"])
            layer.lora_B[adapter].weight.data.copy_(parameters["lora_B"])
    theirs.eval()
    with torch.no_grad():
        found, want = (model(input_ids=IDS, adapter_names=NAMES).logits for model in (ours, theirs))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_generate(architecture, way):
    """Token by token, with a cache, and with samples repeated for their beams (an encoder sees them once)."""
    model = adapt("gift", "gift_gelu", architecture=architecture)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **GENERATION[way]}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    copies = options.get("num_return_sequences", 1)
    for i, name in enumerate(NAMES):
        model.set_adapter("default" if name == "__base__" else name)
        inputs = {"input_ids": IDS[i : i + 1], **options}
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(**inputs)
        else:
            want = model.generate(**inputs)
        got = found[i * copies : (i + 1) * copies, : want.shape[1]]
        assert torch.equal(got, want), name


def test_beams_of_the_generation_config():
    model = adapt("lora")
    want = model.generate(input_ids=IDS, adapter_names=NAMES, num_beams=3, max_new_tokens=3, pad_token_id=0)
    config = copy.deepcopy(model.generation_config)
    config.update(num_beams=3, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, generation_config=config), want)


def test_updates_are_made_once_per_call_and_shared_factors_stacked_once(monkeypatch):
    model = adapt("wegeft")
    made, stacked = [], []
    for kind in (type(g) for g in model.modules() if isinstance(g, Generator)):
        form = kind.form
        monkeypatch.setattr(kind, "form", lambda self, *a, f=form, **kw: made.append(self) or f(self, *a, **kw))
        break
    stack = mixed.stack_factors
    monkeypatch.setattr(mixed, "stack_factors", lambda *lists: stacked.append(lists) or stack(*lists))
    monkeypatch.setattr(mixed, "_WORTH_STACKING", 1)
    model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=5, pad_token_id=0)
    generators = [module for module in model.modules() if isinstance(module, Generator)]
    assert len(made) == len(set(map(id, made))) == len(generators)
    assert len(stacked) == 3  # q, k and down, across depth
    before = model(input_ids=IDS, adapter_names=NAMES).logits
    with torch.no_grad():  # and a later call sees what the parameters are then
        for generator in generators:
            for parameter in generator.adapter_parameters().values():
                parameter.mul_(0.5)
    assert not torch.allclose(model(input_ids=IDS, adapter_names=NAMES).logits, before)


@pytest.mark.parametrize(("cases", "count"), [(("lora",), 1), (("wegeft",), 1), (("wegeft", "lora"), 2)], ids=str)
def test_operations_do_not_grow_with_the_adapters(cases, count, monkeypatch):
    calls = []
    function = mixed.grouped_lowrank_linear
    monkeypatch.setattr(mixed, "grouped_lowrank_linear", lambda *a, **kw: calls.append(a) or function(*a, **kw))
    layer = FusedGenLinear(nn.Linear(10, 6).to(DEVICE).requires_grad_(False))
    for index in range(6):
        layer.add_adapter(f"a{index}", CASES[cases[index % len(cases)]]())
    randomize(layer)
    layer(torch.randn(6, 3, 10, device=DEVICE), adapter_names=[f"a{index}" for index in range(6)])
    assert len(calls) == count


def test_factors_are_stacked_when_they_are_used_again(monkeypatch):
    """A single call on a CPU would take longer to copy them than to use them; the steps of decoding share the copy."""
    layer = FusedGenLinear(nn.Linear(10, 6).to(DEVICE).requires_grad_(False)).eval()
    names = [f"a{index}" for index in range(mixed._WORTH_STACKING)]
    for name in names:
        layer.add_adapter(name, CASES["lora"]())
    randomize(layer)
    stacked = []
    stack = mixed.stack_factors
    monkeypatch.setattr(mixed, "stack_factors", lambda *lists: stacked.append(lists) or stack(*lists))
    x = torch.randn(len(names), 10, device=DEVICE)
    with torch.no_grad():
        for batch, expected in ((names, 0), (mixed.mixed_batch(names), 1)):
            found = [layer(x, adapter_names=batch) for _ in range(3)]
            assert DEVICE != "cpu" or len(stacked) == expected
            for y in found[1:]:
                torch.testing.assert_close(y, found[0])


class Doubling(nn.Linear):
    """A base layer that makes its own product, as a quantised one."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("base", [nn.Linear, Doubling])
@pytest.mark.parametrize("case", ["lora", "wegeft"])
def test_one_adapter_for_all(case, base):
    layer = FusedGenLinear(base(10, 6).to(DEVICE).requires_grad_(False)).eval()
    for name in ("first", "second"):
        layer.add_adapter(name, CASES[case]())
    layer.set_adapter(["first", "second"])
    randomize(layer)
    layer.set_adapter("second")
    x = torch.randn(3, 2, 10, device=DEVICE)
    torch.testing.assert_close(layer(x, adapter_names=["second"] * 3), layer(x))


def test_a_layer_alone_with_gradients():
    """In evaluation, gradients flow: to each adapter from its own samples."""
    torch.manual_seed(0)
    layer = FusedGenLinear(nn.Linear(10, 6).to(DEVICE, torch.float64).requires_grad_(False))
    for name, case in (("edit", "wegeft"), ("low", "lora"), ("full", "genft_gelu"), ("idle", "lora")):
        layer.add_adapter(name, CASES[case]())
    layer.set_adapter(["edit", "low", "full", "idle"])
    randomize(layer, std=0.3)
    x = torch.randn(4, 3, 10, dtype=torch.float64, device=DEVICE, requires_grad=True)
    names = ["full", "edit", "__base__", "low"]
    y = layer(x, adapter_names=names)
    deltas = [0 if name == "__base__" else layer.get_delta_weight(name) for name in names]
    want = torch.stack([x[i] @ (layer.base_layer.weight + delta).t() for i, delta in enumerate(deltas)])
    want = want + layer.base_layer.bias
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    leaves = [x, *(p for name in ("edit", "low", "full") for p in layer.adapter_parameters(name).values())]
    for found, expected in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def gradients(model: PeftModel, ids: torch.Tensor, names: list[str], adapter: str) -> dict[str, torch.Tensor]:
    """Of the adapter's parameters, from a loss over its samples alone, in training."""
    model.zero_grad()
    logits = model(input_ids=ids, adapter_names=mixed.MixedBatch(tuple(names), seeds=SEEDS)).logits
    mine = [place for place, name in enumerate(names) if name == adapter]
    logits[mine].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SEEDS = {"default": 5, "second": 6, "third": 7}


# What is drawn again differs by the form: an edit, a low-rank update with dropout, a generated one, slices.
CHECKPOINTING = [("none", case) for case in dict.fromkeys((*METHODS, *KINDS))]
CHECKPOINTING += [
    (way, case) for way in ("not reentrant", "reentrant") for case in ("wegeft", "lora", "genft_gelu", "grft")
]


@pytest.mark.parametrize(("checkpointing", "case"), CHECKPOINTING)
def test_training_in_a_mixed_batch_is_training_alone(case, checkpointing):
    """In float64, with dropout: what an adapter's samples give depends on no other sample, whichever there are."""
    dropout = {DROPS[case]: 0.3} if case in DROPS else {}
    model = adapt(case, **dropout).double().train()
    model.set_requires_grad(["default", "second", "third"], True)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    for adapter in ("second", "third"):
        mine = [place for place, name in enumerate(NAMES) if name == adapter]
        found = gradients(model, IDS, NAMES, adapter)
        alone = gradients(model, IDS[mine], [adapter] * len(mine), adapter)
        assert any(f".{adapter}." in name for name in found)
        for name, gradient in found.items():
            if f".{adapter}." in name:
                assert gradient.abs().max() > 0
                torch.testing.assert_close(gradient, alone[name], rtol=1e-9, atol=1e-12, msg=name)
            else:
                assert not gradient.any(), name
        if dropout:
            model.eval()
            whole = gradients(model, IDS, NAMES, adapter)
            model.train()
            assert any(not torch.allclose(whole[name], found[name]) for name in alone)


def test_checkpointing_draws_what_the_forward_pass_drew():
    """Also the model's own dropout, next to seeds that are drawn in the call."""
    model = get_peft_model(llama(attention_dropout=0.3), CASES["lora"](target_modules=["v_proj"], lora_dropout=0.3))
    randomize(model).train()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        torch.manual_seed(11)
        model(input_ids=IDS, adapter_names=["default"] * 5).logits.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    want = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), want)


def test_base_layers_that_make_their_own_product():
    torch.manual_seed(0)
    layer = FusedGenLinear(Doubling(10, 6).to(DEVICE, torch.float64).requires_grad_(False))
    layer.add_adapter("edit", CASES["wegeft"]())
    layer.add_adapter("low", CASES["lora"]())
    layer.set_adapter(["edit", "low"])
    randomize(layer)
    x = torch.randn(3, 10, dtype=torch.float64, device=DEVICE)
    base, y = layer.base_layer(x), layer(x, adapter_names=["edit", "__base__", "low"])
    assert torch.equal(y[1], base[1])
    torch.testing.assert_close(y[0], base[0] + 2 * x[0] @ layer.get_delta_weight("edit").t())  # through the base layer
    torch.testing.assert_close(y[2], base[2] + x[2] @ layer.get_delta_weight("low").t())


def test_quantised_base_layers():
    """Edits, low-rank updates and generated ones on a weight that is only dequantised where it has to be."""
    torch.manual_seed(0)
    layer = FusedGenLinear(Int8Linear(nn.Linear(40, 24)).to(DEVICE))
    for name, case in (("edit", "wegeft"), ("low", "gift_gelu"), ("full", "genft_gelu"), ("rows", "grft")):
        layer.add_adapter(name, CASES[case]())
    layer.set_adapter(list(layer.genft_generators))
    randomize(layer)
    x = torch.randn(5, 3, 40, device=DEVICE)
    names = ["low", "edit", "__base__", "full", "rows"]
    y, base = layer(x, adapter_names=names), layer.base_layer(x)
    assert torch.equal(y[2], base[2])
    for i, name in enumerate(names):
        if name != "__base__":
            want = base[i] + x[i] @ layer.get_delta_weight(name).t()
            torch.testing.assert_close(y[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_half_precision_and_backends(backend):
    torch.manual_seed(0)
    layer = FusedGenLinear(nn.Linear(40, 24).to(DEVICE, torch.bfloat16).requires_grad_(False))
    for name, case in (("edit", "wegeft"), ("low", "lora")):
        layer.add_adapter(name, CASES[case](), backend=backend)
        layer.genft_generators[name].float()
    layer.set_adapter(["edit", "low"])
    randomize(layer)
    x = torch.randn(3, 5, 40, device=DEVICE).to(torch.bfloat16)
    y = layer(x, adapter_names=["low", "edit", "low"])
    assert y.dtype == torch.bfloat16
    for i, name in enumerate(("low", "edit", "low")):
        want = x[i].float() @ (layer.base_layer.weight.float() + layer.get_delta_weight(name)).t()
        torch.testing.assert_close(y[i].float(), want + layer.base_layer.bias.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("case", ["wegeft", "gift_gelu", "genft_gelu"])
def test_autocast(case):
    """Each sample as alone under autocast, to what bfloat16 keeps."""
    model = adapt(case)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
        found = model(input_ids=IDS, adapter_names=NAMES).logits
        want = one_by_one(model, NAMES, input_ids=IDS)
    assert found.dtype == want.dtype
    exact = one_by_one(model, NAMES, input_ids=IDS)
    assert error(found, exact) <= 2 * error(want, exact) + EPSILON[torch.bfloat16]


def test_modules_that_are_saved_in_full_take_part():
    on = ARCHITECTURES["bert"]
    model = get_peft_model(on.make(), CASES["wegeft"](target_modules=on.targets, modules_to_save=["classifier"]))
    model.add_adapter("second", CASES["wegeft"](target_modules=on.targets, modules_to_save=["classifier"]))
    for index, name in enumerate(("default", "second")):
        model.set_adapter(name)
        randomize(model, seed=index, std=0.2)
    model.eval()
    names = ["second", "__base__", "default", "second", "default"]
    with torch.no_grad():
        found = model(input_ids=IDS, adapter_names=names).logits
    torch.testing.assert_close(found, one_by_one(model, names, input_ids=IDS), rtol=1e-4, atol=1e-4)


def test_refusals():
    model = adapt("lora")

    def call(names, error, message):
        with pytest.raises(error, match=message):
            model(input_ids=IDS, adapter_names=names)
        assert not any(module._forward_pre_hooks for module in model.modules())  # nothing is left behind

    call(NAMES[:3], ValueError, "Length of `adapter_names` .* got 3 and 5 respectively")
    call([*NAMES, *NAMES], ValueError, "got 10 and 5 respectively")
    call(["default", "fourth", "__base__", "fith", "default"], ValueError, r"non-existing adapter\(s\): fith, fourth")
    call("default", TypeError, "adapter_names: got 'default', expected a list with one adapter name per sample")
    call([1, 2, 3, 4, 5], TypeError, "adapter_names: got ")
    model.merge_adapter()
    call(NAMES, ValueError, "Cannot pass `adapter_names` when there are merged adapters")
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="got 5 and 15 respectively"):  # only generate repeats samples
        model(input_ids=IDS.repeat_interleave(3, 0), adapter_names=NAMES)
    with model.disable_adapter(), torch.no_grad():  # as in peft, nothing is adapted then
        assert torch.equal(model(input_ids=IDS, adapter_names=NAMES).logits, model(input_ids=IDS).logits)
