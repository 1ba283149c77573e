"""The contract of one layer, for every method: `FusedGenLinear.from_linear` and what follows."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genft_modules import FusedGenLinear, GIFTConfig, HiRAConfig, LoRAConfig, WeGeFTConfig
from genft_modules.methods import forms
from tests.support.cases import CASES, DEVICE, KINDS, LAYERS, genft, randomize
from tests.support.grids import pairwise
from tests.support.watchers import Doubling, Largest

K, N = 10, 6
all_cases = pytest.mark.parametrize("case", CASES)
all_kinds = pytest.mark.parametrize("case", KINDS)
both_layers = pytest.mark.parametrize("kind", ["Linear", "Conv1D"])


def make(case: str, kind: str = "Linear", *, seed: int = 0, start: bool = False, dtype=torch.float64) -> FusedGenLinear:
    torch.manual_seed(seed)
    linear = LAYERS[kind](K, N).to(DEVICE, dtype)
    layer = FusedGenLinear.from_linear(linear, CASES[case]())
    return layer if start else randomize(layer)


def inputs(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE, dtype)


def weight_of(layer: FusedGenLinear) -> torch.Tensor:
    """W0 [N, K]."""
    return layer.base_layer.weight.t() if layer.transposed else layer.base_layer.weight


@all_cases
@pytest.mark.parametrize("kind", LAYERS)
def test_starts_as_the_base_layer(case, kind):
    layer = make(case, kind, start=True)
    x = inputs(7)
    assert torch.count_nonzero(layer.get_delta_weight()) == 0
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-12, atol=1e-12)


SHAPES = [(), (1,), (7,), (2, 3, 5), (0,), (2, 0, 3)]


@pytest.mark.parametrize(("case", "shape", "kind"), pairwise(tuple(CASES), SHAPES, tuple(LAYERS)), ids=str)
def test_forward_is_the_base_layer_plus_x_delta(case, kind, shape):
    layer = make(case, kind)
    x = inputs(*shape)
    delta = layer.get_delta_weight()
    assert delta.shape == (N, K)
    assert torch.count_nonzero(delta) > 0
    y = layer(x)
    assert y.shape == (*shape, N)
    base = layer.base_layer(x.reshape(-1, K)).reshape(*shape, N)  # Conv1D itself takes no single row
    torch.testing.assert_close(y, base + x @ delta.t(), rtol=1e-10, atol=1e-10)


@all_cases
@both_layers
def test_only_adapter_parameters_train_and_all_of_them_do(case, kind):
    layer = make(case, kind)
    layer(inputs(7)).square().sum().backward()
    adapter = {id(parameter) for parameter in layer.adapter_parameters().values()}
    assert {id(parameter) for parameter in layer.parameters() if parameter.requires_grad} == adapter
    for name, parameter in layer.named_parameters():
        trains = id(parameter) in adapter
        assert (parameter.grad is not None) == trains, name
        if trains and not name.endswith("attn.k.bias"):  # a shift of all keys changes no attention
            assert torch.count_nonzero(parameter.grad) > 0, name


@all_cases
@both_layers
def test_merge_and_unmerge(case, kind):
    layer = make(case, kind)
    x = inputs(7)
    before, weight, delta = layer(x), layer.base_layer.weight.clone(), layer.get_delta_weight()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(weight_of(layer), (weight.t() if kind == "Conv1D" else weight) + delta)
    torch.testing.assert_close(layer(x), before, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.get_delta_weight(), delta, rtol=0, atol=0)  # made from W0, not from the merged
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(layer(x), before)
    assert layer.original_weight is None
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merge_keeps_w0_to_the_bit_in_half_precision():
    layer = make("wegeft", dtype=torch.bfloat16)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert not torch.equal(layer.base_layer.weight, weight)
    wide = weight.float() + layer.get_delta_weight()  # summed in float32, rounded once
    assert torch.equal(layer.base_layer.weight, wide.to(torch.bfloat16))
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_merged_weight_and_w0_are_not_saved_twice_and_move_together():
    layer = make("lora")
    saved = set(layer.state_dict())
    layer.merge()
    assert set(layer.state_dict()) == saved
    layer.to(torch.float32)
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.float32
    layer.merge()
    assert layer.to("meta").original_weight.is_meta


def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_layer_alone():
    layer = make("lora")
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.adapter_parameters()["lora_A"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="safe_merge"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, weight)


@both_layers
@pytest.mark.parametrize(
    "names",
    [
        ("wegeft", "wegeft"),
        ("wegeft", "gift"),
        ("lora", "gift_mlp"),
        ("wegeft", "lora", "gift_gelu"),
        ("genft", "lora"),
        ("wegeft", "genft_row"),
        ("grft", "grft_column"),
        ("wegeft", "grft", "lora"),
    ],
    ids="+".join,
)
def test_several_adapters_are_one_operation(names, kind, monkeypatch):
    operations = []
    for name in ("lowrank_linear", "input_edit_linear"):
        function = getattr(forms, name)
        monkeypatch.setattr(forms, name, lambda *a, f=function, **kw: operations.append(f) or f(*a, **kw))
    layer = make(names[0], kind)
    for index, name in enumerate(names[1:]):
        layer.add_adapter(f"more{index}", CASES[name]())
    adapters = ["default", *(f"more{index}" for index in range(len(names) - 1))]
    layer.set_adapter(adapters)
    randomize(layer)
    x = inputs(7).requires_grad_()
    deltas = [layer.get_delta_weight(name) for name in adapters]
    want = layer.base_layer(x) + x @ sum(deltas).t()
    y = layer(x)
    assert len(operations) == 1
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(want.square().sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-10, atol=1e-10)

    weight = layer.base_layer.weight.clone()
    layer.merge(adapter_names=adapters[:1])
    with pytest.warns(UserWarning, match="additionally merging"):
        layer.merge(adapter_names=adapters[1:])
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


def test_active_adapters_are_chosen_disabled_and_deleted():
    layer = make("wegeft")
    x, base = inputs(7), make("wegeft").base_layer(inputs(7))
    first = layer(x)
    layer.add_adapter("second", CASES["lora"]())
    assert torch.equal(layer(x), first)  # a new adapter does not activate itself
    layer.set_adapter("second")
    randomize(layer, seed=5)
    second = layer(x)
    assert not torch.allclose(second, first)
    assert not any(parameter.requires_grad for parameter in layer.adapter_parameters("default").values())

    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base, rtol=0, atol=0)  # disabling unmerges
    layer.enable_adapters(True)
    assert torch.equal(layer(x), second)

    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        layer.delete_adapter("second")
    assert torch.equal(layer(x), first)
    layer.delete_adapter("default")
    assert torch.equal(layer(x), base)


@all_kinds
def test_copies_are_independent(case):
    layer = make(case)
    x = inputs(7)
    before = layer(x)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(duplicate(x), before)
        randomize(duplicate, seed=7)
        assert not torch.allclose(duplicate(x), before)
        assert torch.equal(layer(x), before)


@all_cases
@both_layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, kind, dtype):
    layer = make(case, kind, dtype=dtype)
    assert all(parameter.dtype == torch.float32 for parameter in layer.adapter_parameters().values())
    x = inputs(7, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    # within what rounding the inputs of each product costs
    want = layer.base_layer(x).double() + x.double() @ layer.get_delta_weight().double().t()
    error = (y.double() - want).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * (1 + want.abs().max())
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.adapter_parameters().values())
    layer.to(dtype)  # and adapters of half precision too
    assert layer(x).dtype == dtype


@all_cases
@both_layers
def test_autocast(case, kind):
    layer = make(case, kind, dtype=torch.float32)
    x = inputs(7, dtype=torch.float32)
    want = layer(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = layer(x)
        assert layer.get_delta_weight().dtype == torch.float32
        again = layer(y.detach().repeat(1, 2)[:, :K])  # the output of a layer before it, in bfloat16
    assert y.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.03, atol=0.03)
    y.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter_parameters().values())


DROPOUTS = {
    "wegeft": WeGeFTConfig(r=4, wegeft_dropout=0.5),
    "lora": LoRAConfig(r=4, lora_dropout=0.5, init_lora_weights=False),
    "hira": HiRAConfig(r=4, hira_dropout=0.5, init_weights=False),
    "genft": genft("none", "none", drop=0.5),
    "genft_gelu": genft("gelu", "gelu", drop=0.5, stages="column"),  # two non-linear stages would bias the mean
}


@pytest.mark.parametrize("case", DROPOUTS)
@both_layers
def test_dropout_acts_in_training_only_and_is_unbiased(case, kind):
    torch.manual_seed(0)
    layer = randomize(FusedGenLinear.from_linear(LAYERS[kind](K, N).to(DEVICE, torch.float64), DROPOUTS[case]))
    x = inputs(7)
    layer.eval()
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    torch.testing.assert_close(still, layer.base_layer(x) + x @ layer.get_delta_weight().t())  # ΔW drops nothing
    mean = torch.stack([layer(x).detach() for _ in range(300)])
    deviation = mean.std(0) / mean.shape[0] ** 0.5
    assert ((mean.mean(0) - still).abs() < 6 * deviation + 1e-9).all()


@pytest.mark.parametrize("case", DROPOUTS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout(case, reentrant):
    torch.manual_seed(0)
    layer = randomize(FusedGenLinear.from_linear(nn.Linear(K, N).to(DEVICE, torch.float64), DROPOUTS[case])).train()
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(11)
        x = inputs(7).requires_grad_()
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.adapter_parameters().values())])
    for plain, replayed in zip(*gradients, strict=True):
        assert torch.equal(plain, replayed)


def test_adapters_that_drop_different_shares_of_x():
    torch.manual_seed(0)
    layer = FusedGenLinear.from_linear(nn.Linear(K, N).to(DEVICE, torch.float64), LoRAConfig(r=2, lora_dropout=0.5))
    layer.add_adapter("none", LoRAConfig(r=2))
    layer.add_adapter("edit", WeGeFTConfig(r=2))
    layer.set_adapter(["default", "none", "edit"])
    randomize(layer).train()
    x = inputs(7)
    want = layer.base_layer(x) + x @ sum(layer.get_delta_weight(name) for name in layer.active_adapters).t()
    mean = torch.stack([layer(x).detach() for _ in range(300)])
    assert ((mean.mean(0) - want).abs() < 6 * mean.std(0) / mean.shape[0] ** 0.5 + 1e-9).all()
    torch.testing.assert_close(layer.eval()(x), want)


@all_cases
def test_base_layers_that_make_their_own_product(case):
    layer = make(case)
    x = inputs(7)
    want = layer(x)
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
    assert len(seen) == 1  # the hook of a user, or of accelerate's offloading, is called
    handle.remove()
    layer(x)
    assert len(seen) == 1

    torch.manual_seed(0)
    doubling = randomize(FusedGenLinear.from_linear(Doubling(K, N).to(DEVICE, torch.float64), CASES[case]()))
    delta = doubling.get_delta_weight()
    factor = 2 if case in ("wegeft", "wegeft_own", "gift") else 1  # an edit of x goes through the base layer
    torch.testing.assert_close(doubling(x), doubling.base_layer(x) + factor * x @ delta.t(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "config",
    [*(CASES[case]() for case in KINDS), *DROPOUTS.values()],
    ids=[*KINDS, *(f"{case}_dropout" for case in DROPOUTS)],
)
def test_backends_agree(config):
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        layer = randomize(FusedGenLinear.from_linear(nn.Linear(K, N).to(DEVICE), config, backend=backend)).train()
        x = inputs(7, dtype=torch.float32).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in layer.adapter_parameters().values())])
    for reference, triton in zip(*results, strict=True):
        torch.testing.assert_close(triton, reference, rtol=1e-3, atol=1e-3)


def test_the_config_and_the_argument_choose_the_backend():
    for config, argument, want in ((None, None, "auto"), ("reference", None, "reference"), ("triton", "auto", "auto")):
        layer = FusedGenLinear.from_linear(nn.Linear(K, N), LoRAConfig(backend=config or "auto"), backend=argument)
        assert layer.genft_generators["default"].backend == want
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        FusedGenLinear.from_linear(nn.Linear(K, N), LoRAConfig(), backend="cuda")


QKV = GIFTConfig(r=2, enable_gift={"qkv": [True, False, True]}, block="mlp")


def test_fused_qkv_thirds():
    torch.manual_seed(0)
    qkv = randomize(FusedGenLinear.from_linear(nn.Linear(K, 3 * N).to(DEVICE, torch.float64), QKV, name="attn.qkv"))
    assert set(qkv.adapter_parameters()) == {
        f"{block}.{name}"
        for block in (0, 2)
        for name in ("phi", "psi", *(f"block.blocks.0.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")))
    }
    delta = qkv.get_delta_weight()
    assert torch.count_nonzero(delta[N : 2 * N]) == 0
    for index, rows in ((0, slice(0, N)), (2, slice(2 * N, 3 * N))):  # each third as a layer of its own
        linear = nn.Linear(K, N).to(DEVICE, torch.float64)
        linear.weight.data = qkv.base_layer.weight[rows].clone()
        alone = FusedGenLinear.from_linear(linear, GIFTConfig(r=2, block="mlp"))
        with torch.no_grad():
            for name, parameter in alone.adapter_parameters().items():
                parameter.copy_(qkv.adapter_parameters()[f"{index}.{name}"])
        torch.testing.assert_close(delta[rows], alone.get_delta_weight())
    x = inputs(7)
    torch.testing.assert_close(qkv(x), qkv.base_layer(x) + x @ delta.t())


@pytest.mark.parametrize(
    "config", [*(make() for make in CASES.values()), *DROPOUTS.values(), QKV], ids=lambda c: c.method
)
@both_layers
def test_no_step_makes_a_tensor_of_the_weights_size(config, kind):
    k, n = 120, 60  # N·K = 7200; the attention of a GIFT block may make N² = 3600
    layer = randomize(FusedGenLinear.from_linear(LAYERS[kind](k, n).to(DEVICE), config, name="qkv")).train()
    x = torch.randn(3, k, device=DEVICE, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert 0 < largest.elements < n * k


def test_bias_of_the_base_layer_may_train():
    layer = FusedGenLinear.from_linear(nn.Linear(K, N), LoRAConfig(bias="lora_only")).to(DEVICE)
    layer(inputs(3, dtype=torch.float32)).sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((N,), 3.0, device=DEVICE))
    assert layer.base_layer.weight.grad is None


def test_peft_sees_the_base_layer_through_it():
    layer = make("wegeft")
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.supports_lora_conversion()
    assert not make("wegeft", "Conv1D").supports_lora_conversion()
    assert "in_features=10, out_features=6" in repr(layer)


def refusals():
    linear, config = nn.Linear(K, N), WeGeFTConfig()
    layer = FusedGenLinear.from_linear(nn.Linear(K, N), config)
    yield (
        TypeError,
        "got Conv2d, expected torch.nn.Linear",
        lambda: FusedGenLinear.from_linear(nn.Conv2d(1, 1, 1), config),
    )
    yield TypeError, "got Embedding", lambda: FusedGenLinear(nn.Embedding(3, 3))
    yield TypeError, "got FusedGenLinear", lambda: FusedGenLinear(layer)
    yield TypeError, "exclude_modules", lambda: FusedGenLinear(nn.MultiheadAttention(4, 2).out_proj)
    yield TypeError, "config: got dict", lambda: FusedGenLinear.from_linear(linear, {"r": 3})
    yield ValueError, "'default' already exists", lambda: layer.add_adapter("default", config)
    yield ValueError, r"got 'other', expected one of \['default'\]", lambda: layer.get_delta_weight("other")
    yield ValueError, "got 'other'", lambda: layer.adapter_parameters("other")
    yield TypeError, "list of strings", lambda: layer.merge(adapter_names="default")
    yield ValueError, "x: last dimension 3", lambda: layer(torch.zeros(2, 3))
    yield TypeError, "weight: dtype torch.float32", lambda: layer(torch.zeros(2, K, dtype=torch.float16))
    trained = FusedGenLinear.from_linear(nn.Linear(K, N), config)
    trained.base_layer.weight.requires_grad_()
    yield ValueError, "weight: requires grad", lambda: trained(torch.zeros(2, K))
    whole = FusedGenLinear(nn.Linear(K, N))
    whole.base_layer.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    whole.add_adapter("default", config)
    yield TypeError, "merge: Linear has a Parameter of torch.int8", whole.merge


@pytest.mark.parametrize(("error", "message", "call"), [pytest.param(*it, id=it[1]) for it in refusals()])
def test_refuses_with_a_message_that_says_what_fits(error, message, call):
    with pytest.raises(error, match=message):
        call()


INPUTS = {
    "list": lambda x: x.tolist(),
    "COO": lambda x: x.to_sparse(),
    "CSR": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
}


@all_kinds
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore:.*(nested|Sparse).*")
def test_an_input_that_is_no_dense_tensor_is_named(case, kind):
    layer, x = make(case), INPUTS[kind](inputs(2).cpu())
    with pytest.raises(TypeError, match=r"^x: got .*, expected a"):
        layer(x)
    with pytest.raises(TypeError, match=r"^x: got .*, expected a"):
        layer(x, adapter_names=["default", "__base__"])
    layer.base_layer.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(TypeError, match=r"^x: got .*, expected a"):
        layer(x)


def test_from_linear_leaves_the_linear_alone_when_it_refuses():
    linear = nn.Linear(K, N)
    with pytest.raises(TypeError):
        FusedGenLinear.from_linear(linear, object())
    assert linear.weight.requires_grad


def test_says_nothing_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make("wegeft")
        layer(inputs(2))
        layer.merge()
        layer.unmerge()


def test_the_state_of_a_merged_layer_adds_its_update_once():
    layer = randomize(FusedGenLinear.from_linear(nn.Linear(6, 5), CASES["lora"]()))
    x = torch.randn(3, 6)
    want, original = layer(x), layer.base_layer.weight.detach().clone()
    layer.merge()
    assert not torch.equal(layer.base_layer.weight, original)
    state = layer.state_dict()
    torch.testing.assert_close(state["base_layer.weight"], original, rtol=0, atol=0)
    other = FusedGenLinear.from_linear(nn.Linear(6, 5), CASES["lora"]())
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), want)
    with pytest.raises(ValueError, match=r"load_state_dict: \['default'\] are merged into the layer, expected an unm"):
        layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), want)
    layer.unmerge()
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), want)
