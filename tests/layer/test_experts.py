"""Stacked experts: every W_e + ΔW_e by an edit of the tokens, with every implementation that a CPU has."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from genft_kernels import group_rows
from genft_modules import METHODS, FusedGenExperts, GIFTConfig, InputEdit, WeGeFTConfig
from tests.support.cases import CASES, DEVICE, REPRESENTATIVES
from tests.support.experts import (
    IDS,
    TARGETS,
    adapted,
    moe,
    naive_logits,
    nemotron_experts,
    stacks,
    written_out,
)
from tests.support.watchers import Inside

# pairs of model and implementation: each model, each implementation, each with and without a pair per expert
RUNS = [
    ("mixtral", "eager", True),
    ("mixtral", "grouped_mm", False),
    ("qwen2", "batched_mm", True),
    ("qwen3", "grouped_mm", True),
    ("qwen3", "batched_mm", False),
    ("olmoe", "grouped_mm", True),
    ("deepseek", "batched_mm", True),
    ("deepseek", "eager", False),
    ("gpt_oss", "eager", True),
    ("gpt_oss", "eager", False),
    ("gpt_oss", "batched_mm", False),
    ("gpt_oss", "grouped_mm", True),
    ("llama4", "bmm", True),
    ("llama4", "bmm", False),
]
CONFIGS = {
    "wegeft": (lambda **kw: WeGeFTConfig(r=3, wegeft_alpha=6, **kw), 2.0),
    "gift": (lambda **kw: GIFTConfig(r=3, **kw), 1.0),
}


@pytest.mark.filterwarnings("ignore:The loop of")
@pytest.mark.parametrize(("name", "implementation", "tied"), RUNS)
def test_logits_and_gradients_are_those_of_the_weights_written_out(name, implementation, tied):
    # transformers' grouped_mm takes no float64
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    make, scale = CONFIGS["gift" if name in ("qwen3", "llama4") else "wegeft"]
    model = adapted(moe(name, implementation, dtype), make(tied_experts=tied, target_modules=TARGETS))
    layers = stacks(model.get_base_model())
    assert layers
    plain = moe(name, "batched_mm", torch.float64).requires_grad_(False)
    factors = [factor for layer in layers.values() for factor in layer.adapter_parameters().values()]
    assert all(factor.dim() == (2 if tied else 3) for factor in factors)

    found = model(input_ids=IDS).logits
    (found.double().square().sum()).backward()
    gradients = [factor.grad.double() for factor in factors]
    model.double()
    want = naive_logits(plain, {key: written_out(layer, scale) for key, layer in layers.items()}, input_ids=IDS)
    truth = torch.autograd.grad(want.square().sum(), factors)

    assert (want - plain(input_ids=IDS).logits).abs().max() > 1e-2
    room = 1e-6 if dtype == torch.float64 else 2e-5  # models compute norms in float32
    torch.testing.assert_close(found.double(), want, rtol=room, atol=room)
    for gradient, expected in zip(gradients, truth, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, rtol=room, atol=room * float(expected.abs().max()) * 10)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_without_a_gate(implementation):
    experts = nemotron_experts()
    experts.config._experts_implementation = implementation
    plain = copy.deepcopy(experts)
    layer = FusedGenExperts.from_experts(experts, WeGeFTConfig(r=3, wegeft_alpha=6))
    nn.init.normal_(layer.adapter_parameters()["up_proj.phi"], std=0.3)
    nn.init.normal_(layer.adapter_parameters()["down_proj.phi"], std=0.3)
    x, index = torch.randn(7, 16, device=DEVICE), torch.randn(7, 4, device=DEVICE).topk(2).indices
    with torch.no_grad():
        found = layer(x, index, torch.full((7, 2), 0.5, device=DEVICE))
        for name, weight in written_out(layer, 2.0).items():
            getattr(plain, name).copy_(weight)
        torch.testing.assert_close(found, plain(x, index, torch.full((7, 2), 0.5, device=DEVICE)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_per_expert_is_that_of_the_grouped_operation(dtype):
    """With kernels as without, also for experts without tokens."""
    form = InputEdit(torch.randn(4, 3, 16, device=DEVICE), torch.randn(4, 3, 16, device=DEVICE) * 0.1, 0.5)
    rows = group_rows(torch.tensor([0, 0, 2, 2, 2, 3], device=DEVICE), 4)
    x = torch.randn(6, 16, device=DEVICE).to(dtype).requires_grad_()
    found, kernels = (form.grouped_edit(x, x, rows, backend) for backend in ("reference", "triton"))
    room = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, kernels, rtol=room, atol=room)
    for run in (found, kernels):
        (gradient,) = torch.autograd.grad(run.float().square().sum(), x)
        each = [torch.eye(16, device=DEVICE) + 0.5 * form.psi[e].t() @ form.phi[e] for e in (0, 0, 2, 2, 2, 3)]
        want = torch.stack([2 * (one @ (x[at].detach().float() @ one)) for at, one in enumerate(each)])
        torch.testing.assert_close(gradient.float(), want, rtol=4 * room, atol=4 * room)


class Biggest(Inside):
    """The most elements of a tensor made, views aside."""

    elements = 0

    def see(self, function, out) -> None:
        if not function.is_view:
            tensors = [tensor for tensor in torch.utils._pytree.tree_leaves(out) if isinstance(tensor, torch.Tensor)]
            self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_is_as_large_as_the_experts(tied):
    model = moe("mixtral", "grouped_mm")
    experts = model.model.layers[0].mlp.experts
    layer = FusedGenExperts.from_experts(experts, WeGeFTConfig(r=2, tied_experts=tied))
    smaller = min(experts.gate_up_proj.numel(), experts.down_proj.numel())
    x, index = torch.randn(6, 16, requires_grad=True, device=DEVICE), torch.randn(6, 4, device=DEVICE).topk(2).indices
    with Biggest() as seen:
        layer(x, index, torch.full((6, 2), 0.5, device=DEVICE)).sum().backward()
    assert 0 < seen.elements < smaller
    nn.init.normal_(layer.adapter_parameters()["down_proj.phi"])
    with Biggest() as seen:
        unloaded = layer.unload_and_optionally_merge_module(True, False, None)
    assert unloaded is experts
    assert seen.elements < smaller


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_merging_is_undone_to_the_bit(name):
    model = adapted(moe(name, dtype=torch.bfloat16), WeGeFTConfig(r=3, target_modules=TARGETS[:1]), std=0.1)
    model.add_adapter("other", WeGeFTConfig(r=2, tied_experts=False, target_modules=TARGETS))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".other." in key:
                parameter.normal_(std=0.1)
    model.base_model.set_adapter(["default", "other"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    want = model(input_ids=IDS).logits
    (layer,) = stacks(model).values()
    original = layer.frozen_weight("gate_up_proj", 1).clone()

    model.merge_adapter(["default"])
    model.merge_adapter(["other"])  # changes a projection that the first one did not
    base = layer.base_layer.gate_up_proj[1]
    assert not torch.equal(base.t() if layer.transposed else base, original)
    assert torch.equal(layer.frozen_weight("gate_up_proj", 1), original)
    torch.testing.assert_close(model(input_ids=IDS).logits, want, rtol=0.1, atol=0.1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"load_state_dict: \['default', 'other'\] are merged"):
        model.load_state_dict(before)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=IDS).logits, want)


def test_a_merge_that_is_not_finite_changes_nothing():
    model = adapted(moe("mixtral"), WeGeFTConfig(r=2, target_modules=TARGETS))
    (layer,) = stacks(model).values()
    layer.adapter_parameters()["down_proj.phi"].data[0, 0] = torch.inf
    before = [parameter.clone() for parameter in layer.base_layer.parameters()]
    with pytest.raises(ValueError, match="safe_merge: NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert not layer.merged
    assert all(map(torch.equal, before, layer.base_layer.parameters()))


@pytest.mark.parametrize(("name", "tied"), [("mixtral", True), ("mixtral", False), ("llama4", False)])
def test_mixed_batches_give_each_sample_its_own_adapter(name, tied):
    model = adapted(moe(name), WeGeFTConfig(r=3, tied_experts=tied, target_modules=[*TARGETS, "q_proj"]))
    model.add_adapter("other", WeGeFTConfig(r=2, target_modules=TARGETS))
    for key, parameter in model.named_parameters():
        if ".other." in key:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.cat([IDS, IDS.flip(0)])
    names = ["default", "__base__", "other", "default"]
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names).logits
        for at, one in enumerate(names):
            if one == "__base__":
                with model.disable_adapter():
                    want = model(input_ids=ids).logits
            else:
                model.set_adapter(one)
                want = model(input_ids=ids).logits
            torch.testing.assert_close(found[at], want[at], rtol=1e-5, atol=1e-5)
        (layer,) = stacks(model).values()
        with pytest.raises(ValueError, match="adapter_names: got 4 names for 18 tokens"):
            layer(torch.randn(72 if name == "llama4" else 18, 16, device=DEVICE), adapter_names=names)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_one_graph_and_gradients_with_checkpointing(name):
    """A pair per expert in one adapter and one for all in another, both active."""
    torch._dynamo.reset()
    model = adapted(moe(name), WeGeFTConfig(r=3, tied_experts=False, target_modules=TARGETS)).train()
    model.add_adapter("other", WeGeFTConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    (layer,) = stacks(model).values()
    x = torch.randn(20 if name == "llama4" else 5, 16, device=DEVICE)
    routing = (
        () if name == "llama4" else (torch.randn(5, 4, device=DEVICE).topk(2).indices, torch.rand(5, 2, device=DEVICE))
    )
    factors = [factor for one in ("default", "other") for factor in layer.adapter_parameters(one).values()]

    def gradients(run) -> list[torch.Tensor]:
        y = run(x.clone().requires_grad_(), *routing)
        return [y, *torch.autograd.grad(y.square().sum(), factors)]

    want = gradients(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    checkpointed = lambda *args: torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)  # noqa: E731
    for run in (compiled, checkpointed):
        for found, expected in zip(gradients(run), want, strict=True):
            room = 1e-5 * float(expected.detach().abs().max())  # a pair per expert is multiplied in another order
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=room)
    assert "_apply_gate" not in layer.base_layer.__dict__


def test_half_precision_keeps_small_updates():
    """Of an update far below the last place of the tokens, the mean is kept; rounding to nearest would lose it all."""
    layer = FusedGenExperts.from_experts(
        moe("mixtral", dtype=torch.bfloat16).model.layers[0].mlp.experts,
        WeGeFTConfig(r=1, wegeft_alpha=1, tied_experts=False),
        targets=["gate_up_proj"],
    )
    phi, psi = (layer.adapter_parameters()[f"gate_up_proj.{name}"] for name in ("phi", "psi"))
    nn.init.constant_(phi, 1e-4)
    nn.init.constant_(psi, 1.0)
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.rand(400, 16, device=DEVICE).add(1).bfloat16()
    layer(x, torch.randint(4, (400, 1), device=DEVICE), torch.ones(400, 1, dtype=torch.bfloat16, device=DEVICE))
    update = (seen[0].double().sum() - x.double().sum()) / (x.double().sum() * 16e-4)
    assert 0.8 < update < 1.2


def test_under_autocast():
    model = adapted(moe("mixtral"), WeGeFTConfig(r=3, target_modules=TARGETS))
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        with torch.autocast(DEVICE, torch.bfloat16):
            found = model(input_ids=IDS).logits
    assert found.dtype in (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.float(), want, rtol=0.2, atol=0.2)


def test_modules_that_are_refused():
    longcat = LongcatFlashExperts(
        LongcatFlashConfig(hidden_size=8, expert_ffn_hidden_size=4, n_routed_experts=2, zero_expert_num=1)
    )
    for module in (longcat, nn.Linear(2, 2), nn.ModuleList()):
        with pytest.raises(TypeError, match=rf"base_layer: got {type(module).__name__}, expected stacked experts"):
            FusedGenExperts(module)
    experts = moe("mixtral").model.layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"targets: got \['up_proj'\], expected names of \['gate_up_proj', 'down_proj"):
        FusedGenExperts.from_experts(experts, WeGeFTConfig(r=2), targets=["up_proj"])
    layer = FusedGenExperts.from_experts(experts, WeGeFTConfig(r=2), targets=["gate_up_proj"])
    with pytest.raises(ValueError, match="projection: got 'down_proj', expected one of"):
        layer.get_delta_weight("default", "down_proj", 0)
    with pytest.raises(ValueError, match=r"enable_wegeft: got flags for experts\.gate_up_proj, expected none"):
        FusedGenExperts.from_experts(experts, WeGeFTConfig(r=2, enable_wegeft={"gate_up_proj": [True, False]}))


@pytest.mark.parametrize("case", [*REPRESENTATIVES, "gift_gelu", "gift_sigmoid_biases"])
def test_configurations_that_edit_no_input_are_refused(case):
    experts = moe("mixtral").model.layers[0].mlp.experts
    if case in ("wegeft", "wegeft_own", "gift"):
        FusedGenExperts.from_experts(experts, CASES[case]())
        return
    with pytest.raises(TypeError, match=r"config: .*Config cannot adapt experts, (because|expected)"):
        FusedGenExperts.from_experts(experts, CASES[case]())


def test_dropout_of_w0_is_refused():
    with pytest.raises(TypeError, match=r"expected wegeft_dropout = 0, got 0\.1"):
        get_peft_model(moe("mixtral"), WeGeFTConfig(r=2, wegeft_dropout=0.1, target_modules=TARGETS))


def test_a_loop_that_writes_out_the_gate():
    """It is left when down_proj is adapted, and refused by name if it comes back."""
    model = moe("mixtral", "eager")
    model = get_peft_model(model, WeGeFTConfig(r=2, target_modules=TARGETS[:1]))
    assert model.config._experts_implementation == "eager"
    model = moe("mixtral", "eager")
    with pytest.warns(UserWarning, match="experts_implementation is now 'grouped_mm', was 'eager'"):
        model = get_peft_model(model, WeGeFTConfig(r=2, target_modules=TARGETS))
    assert model.config._experts_implementation == "grouped_mm"
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"down_proj of MixtralExperts cannot be adapted with .*'eager'"):
        model(input_ids=IDS)
    model = moe("mixtral")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError, match=r"cannot be adapted with experts_implementation 'sonicmoe'"):
        get_peft_model(model, WeGeFTConfig(r=2, target_modules=TARGETS))


def test_every_method_is_covered():
    assert {CASES[case]().method for case in REPRESENTATIVES} == set(METHODS)
