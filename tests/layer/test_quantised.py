"""Quantised base layers: the same outputs, gradients and ΔW as on the weights that they stand for, and W0 in floating
point only for a moment. Packages that are not installed are skipped; layers of their protocol always run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from genft_modules import FusedGenLinear, export_lora, load_adapter, save_adapter
from genft_modules.methods import weights
from tests.support.cases import CASES, DEVICE, IDS, llama, logits, randomize
from tests.support.watchers import Int8Linear

K, N = 128, 96
EDITS = {"wegeft", "wegeft_own", "gift"}  # they never look at W0
READS = {case for case in CASES if case.startswith(("gift_", "peanut", "hira", "genft", "wegeft_halves"))}


class LikeGPTQ(Int8Linear):
    """Other names, and W0ᵀ, as in GPTQ packages."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.infeatures, self.outfeatures = self.in_features, self.out_features
        del self.in_features, self.out_features

    def dequantize_weight(self) -> Tensor:
        return self.dequantize().t()


class Opaque(Int8Linear):
    """A kernel that nobody can look into, as AWQ's."""

    dequantize = None


def _sizes(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def _bnb4(linear: nn.Linear, **options: Any) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*_sizes(linear), compute_dtype=torch.float32, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def _bnb8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*_sizes(linear), has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def _torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def quantised(linear: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(copy.deepcopy(linear))
        quantization.quantize_(model, getattr(quantization, config)())
        return model[0]

    return quantised


def _hqq(linear: nn.Linear) -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    return hqq.HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device=DEVICE, del_orig=False)


PACKAGES = {
    "protocol": Int8Linear,
    "like GPTQ": LikeGPTQ,
    "bnb nf4": lambda linear: _bnb4(linear, quant_type="nf4", compress_statistics=False),
    "bnb fp4 nested": lambda linear: _bnb4(linear, quant_type="fp4"),
    "bnb nf4 in bfloat16": lambda linear: _bnb4(linear, quant_type="nf4", quant_storage=torch.bfloat16),
    "bnb int8": _bnb8,
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
    "hqq": _hqq,
}


def pair(case: str, quantise: Callable[[nn.Linear], nn.Module], k: int = K, n: int = N, **fields: Any):
    """(a layer on a quantised base, the same adapter on an nn.Linear with the weight that the base stands for)."""
    torch.manual_seed(0)
    linear = nn.Linear(k, n).to(DEVICE)
    base = quantise(linear)
    plain = nn.Linear(k, n).to(DEVICE)
    with torch.no_grad():
        weight = base.qweight * base.scales if isinstance(base, Int8Linear) else dequantize_module_weight(base)
        plain.weight.copy_(weight)
        plain.bias.copy_(linear.bias)
    ours = randomize(FusedGenLinear.from_linear(base, CASES[case](**fields)))
    wanted = FusedGenLinear.from_linear(plain, CASES[case](**fields))
    wanted.genft_generators.load_state_dict(ours.genft_generators.state_dict())
    return ours, wanted


def results(layer: FusedGenLinear, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    parameters = list(layer.adapter_parameters().values())
    cotangent = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
    return [y, *torch.autograd.grad((y * cotangent).sum(), [x, *parameters])]


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_on_the_weight_it_stands_for(case):
    ours, wanted = pair(case, Int8Linear)
    base = ours.base_layer
    x = torch.randn(7, K, device=DEVICE)
    for got, want in zip(results(ours, x), results(wanted, x), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    assert (base.reads > 0) == (case in READS)
    torch.testing.assert_close(ours.get_delta_weight(), wanted.get_delta_weight(), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"merge: Int8Linear has a Tensor of torch.int8, .* loaded without quant"):
        ours.merge()
    assert not ours.merged


@pytest.mark.parametrize("case", ["wegeft", "gift_mlp", "lora", "genft", "genft_gelu", "genft_row"])
@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "protocol"])
def test_packages(package, case):
    ours, wanted = pair(case, PACKAGES[package])
    x = torch.randn(7, K, device=DEVICE)
    base = ours.base_layer
    # a package's product may round x or W0; what is ours is the difference to it
    made = base(x) - wanted.base_layer(x)
    assert made.abs().max() < 0.1
    assert ours(x).dtype == x.dtype
    if case in EDITS:
        edited = results(ours, x)
        for got, want in zip(edited, results(wanted, x), strict=True):
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * float(want.detach().abs().max()))
    else:
        torch.testing.assert_close(ours(x) - base(x), wanted(x) - wanted.base_layer(x), rtol=1e-4, atol=1e-4)
        for got, want in zip(results(ours, x)[2:], results(wanted, x)[2:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.get_delta_weight(), wanted.get_delta_weight(), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"merge: .* without quantisation"):
        ours.merge()


@pytest.mark.parametrize("package", [name for name in PACKAGES if name.startswith(("bnb", "torchao"))])
def test_rows_are_those_of_the_whole(package, monkeypatch):
    torch.manual_seed(0)
    base = PACKAGES[package](nn.Linear(K, N).to(DEVICE))
    whole = dequantize_module_weight(base)
    seen = []
    rows = weights._rows
    monkeypatch.setattr(weights, "_rows", lambda *arguments: seen.append(rows(*arguments)) or seen[-1])
    monkeypatch.setattr(weights, "_whole", lambda *_: pytest.fail("W0 as a whole"))
    monkeypatch.setattr(weights, "PANEL", 40 * K)
    a = torch.randn(3, K, device=DEVICE)
    got = weights.weight_features(weights.QuantisedWeight(base)[8:90], a, activation="gelu")
    assert [len(panel) for panel in seen] == [40, 40, 2]
    torch.testing.assert_close(torch.cat(seen), whole[8:90], rtol=0, atol=0)
    torch.testing.assert_close(got, nn.functional.gelu(whole[8:90].float() @ a.t()), rtol=1e-4, atol=1e-4)


DROPPING = {"wegeft dropout": {"wegeft_dropout": 0.3}, "hira dropout": {"hira_dropout": 0.3}}


@pytest.mark.parametrize("case", [*sorted(READS), *DROPPING])
def test_panels_of_bounded_size_and_nothing_kept(case, monkeypatch):
    fields = DROPPING.get(case, {})
    ours, wanted = pair(case.partition(" ")[0], Int8Linear, **fields)
    base, sizes = ours.base_layer, []

    def rows(layer: Int8Linear, start: int, stop: int) -> Tensor:
        sizes.append((stop - start) * K)
        return (layer.qweight * layer.scales)[start:stop]

    monkeypatch.setattr(weights, "_gives_rows", lambda layer: True)
    monkeypatch.setattr(weights, "_rows", rows)
    monkeypatch.setattr(weights, "PANEL", 20 * K)
    x = torch.randn(7, K, device=DEVICE)
    torch.manual_seed(3)
    outcome = results(ours.train(bool(fields)), x)
    if case != "wegeft dropout":  # where the masks differ: each panel has its own
        torch.manual_seed(3)
        for got, want in zip(outcome, results(wanted.train(bool(fields)), x), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    assert all(torch.isfinite(result).all() for result in outcome)
    assert len(sizes) >= 6  # in forward, and anew in backward; one case adapts half of the rows
    assert max(sizes) <= 20 * K
    with saving() as saved:
        ours(x)
    with saving() as by_base:  # which keeps its weight for dX
        base(x.clone().requires_grad_())
    assert sum(size >= N * K for size in saved) <= sum(size >= N * K for size in by_base)


@contextmanager
def saving() -> Iterator[list[int]]:
    """The numbers of elements in memory of what autograd saves."""
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def test_the_mask_of_w0_is_drawn_anew_for_each_panel_and_again_in_backward(monkeypatch):
    ours, _ = pair("wegeft", Int8Linear, wegeft_dropout=0.5)
    monkeypatch.setattr(weights, "_gives_rows", lambda layer: True)
    monkeypatch.setattr(weights, "_rows", lambda layer, i, j: torch.ones(j - i, K, device=DEVICE))
    monkeypatch.setattr(weights, "PANEL", 48 * K)
    weight = weights.QuantisedWeight(ours.base_layer)
    a = torch.rand(3, K, device=DEVICE, requires_grad=True)
    h = weights.weight_features(weight, a, dropout=0.5, seed=torch.tensor([7], device=DEVICE))
    assert not torch.equal(h[:48], h[48:])
    (gradient,) = torch.autograd.grad(h.sum(), a)
    # the gradient of Σ drop(1) Aᵀ is the column sums of the mask, the same that made h
    torch.testing.assert_close((gradient * a).sum(), h.sum())


def test_a_layer_that_nobody_can_look_into():
    opaque = Opaque(nn.Linear(K, N))
    for case in ("wegeft", "lora"):
        layer = randomize(FusedGenLinear.from_linear(opaque, CASES[case]()))
        assert layer(torch.randn(2, K)).shape == (2, N)
    layer = FusedGenLinear.from_linear(opaque, CASES["genft_gelu"]())
    for call in (lambda: layer(torch.randn(2, K)), layer.get_delta_weight):
        with pytest.raises(
            TypeError, match=r"base_layer: Opaque cannot be dequantised .*\[96, 128\], .* such as WeGeFT"
        ):
            call()


def test_what_is_no_linear_layer_is_refused():
    class Sized(nn.Module):
        in_features = out_features = 3

    for layer in (Sized(), nn.Bilinear(2, 2, 2), nn.Identity()):
        with pytest.raises(TypeError, match=f"base_layer: got {type(layer).__name__}, expected torch.nn.Linear"):
            FusedGenLinear(layer)


def quantised_llama(quantise: Callable[[nn.Linear], nn.Module] = Int8Linear) -> nn.Module:
    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantise(module))
    return model.requires_grad_(False)


@pytest.mark.parametrize("package", ["protocol", "bnb nf4", "bnb int8", "torchao int8", "hqq"])
@pytest.mark.parametrize("case", ["wegeft", "genft_gelu"])
def test_a_models_whole_life(package, case, tmp_path):
    base = quantised_llama(PACKAGES[package])
    plain = logits(base)
    kinds = {name: type(module) for name, module in base.named_modules()}
    model = get_peft_model(base, CASES[case](target_modules=["q_proj", "down_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    torch.testing.assert_close(logits(model), plain, rtol=1e-3, atol=1e-3)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    want = logits(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(quantised_llama(PACKAGES[package]), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-5)
    exported = export_lora(model, tmp_path / "lora", max_error=1e-4)
    assert all(layer.error <= 1e-4 for layer in exported)
    with pytest.raises(TypeError, match="without quantisation"):
        again.merge_and_unload()
    with model.disable_adapter():
        plain = logits(model)  # anew, because after a backward pass bitsandbytes' int8 product rounds in another way
    unloaded = model.unload()
    assert {name: type(module) for name, module in unloaded.named_modules()} == kinds
    torch.testing.assert_close(logits(unloaded), plain)
