"""GenFT: the two stages in all their settings against formulas written out, sharing, starts, counts, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from genft_kernels import draw_seed
from genft_kernels.dropout import keep_mask
from genft_modules import FusedGenLinear, Generated, GenFTConfig, GIFTConfig, LoRAConfig, LowRank, WeGeFTConfig
from genft_modules.methods import forms
from tests.support.cases import DEVICE, LAYERS, genft, gpt2, llama, logits, randomize
from tests.support.grids import pairwise
from tests.support.watchers import Allocations

SIGMA = {"none": lambda z: z, "relu": F.relu, "leakyrelu": F.leaky_relu, "gelu": F.gelu, "tanh": torch.tanh}
SAME = {"rtol": 1e-10, "atol": 1e-10}


def stages_of(config) -> str:
    return {"column": "1", "row": "2", "column_row": "12"}[config.stages]


def by_hand(weight, parameters, config, masks=None):
    """ΔW [N, K] as the paper writes it, D1 and D2 in full. `masks`: for D1 if it is followed by D2, and for ΔW."""
    ratio = config.ratio_W0
    inner, outer = SIGMA[config.inner_activation], SIGMA[config.outer_activation]
    masks = list(masks or ())
    d = weight if config.ratio_on == "factors" else ratio * weight
    for t in stages_of(config):
        pair = "specific_" if "specific_a" in parameters else f"specific_{t}_"
        a = torch.cat([parameters[f"shared_{t}_a"], *(parameters[key] for key in [pair + "a"] if key in parameters)])
        b = torch.cat([parameters[f"shared_{t}_b"], *(parameters[key] for key in [pair + "b"] if key in parameters)], 1)
        if config.ratio_on == "factors":
            a, b = ratio * a, ratio * b
        bias_a = parameters.get(f"bias_{t}_a", torch.zeros(len(a)).to(a))[: len(a)]
        bias_b = parameters.get(f"bias_{t}_b", torch.zeros(len(b)).to(b))
        d = outer(inner((d if t == "1" else d.t()) @ a.t() + bias_a) @ b.t() + bias_b)
        if t == stages_of(config)[-1] and t == "2" and config.orientation == "vit":
            d = d.t()
        if masks:
            d = d * masks.pop(0) / (1 - config.drop)
    return config.scaling * d


def layer_of(config, k=10, n=10, kind="Linear", name="layer", **how) -> FusedGenLinear:
    torch.manual_seed(0)
    linear = LAYERS[kind](k, n).to(DEVICE, torch.float64)
    return randomize(FusedGenLinear.from_linear(linear, config, name=name, **how), std=0.3)


def weight_of(layer):
    weight = layer.base_layer.weight.detach()
    return weight.t() if layer.transposed else weight


def agrees(layer, config, delta_by_hand=by_hand) -> None:
    """Output, ΔW and every gradient of the layer, as autograd has them from the formula."""
    n, k = weight_of(layer).shape
    parameters = layer.adapter_parameters()
    x = torch.randn(7, k, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cotangent = torch.randn(7, n, dtype=torch.float64, device=DEVICE)
    delta = delta_by_hand(weight_of(layer), parameters, config)
    assert torch.count_nonzero(delta)
    y = x @ (weight_of(layer) + delta).t()
    y = y if layer.bias is None else y + layer.bias
    leaves = [x, *parameters.values()]
    torch.testing.assert_close(layer.get_delta_weight(), delta, **SAME)
    torch.testing.assert_close(layer(x), y, **SAME)
    for got, want, name in zip(
        torch.autograd.grad(layer(x), leaves, cotangent),
        torch.autograd.grad(y, leaves, cotangent),
        ["x", *parameters],
        strict=True,
    ):
        assert torch.count_nonzero(want), name
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}", **SAME)


# ---- the formula


STAGES = ["column", "row", "column_row"]
SIZES = [(10, 10), (12, 7), (7, 12)]


@pytest.mark.parametrize(
    ("outer", "stages", "sizes", "kind"), pairwise(list(SIGMA), STAGES, SIZES, ["Linear", "Conv1D"]), ids=str
)
def test_stages_on_square_and_rectangular_weights(outer, stages, sizes, kind):
    config = genft("gelu", outer, stages=stages, ratio_W0=1.5, scaling=0.7)
    layer = layer_of(config, *sizes, kind)
    square = sizes[0] == sizes[1] or stages != "column_row"
    assert {name for name in layer.adapter_parameters() if name.startswith("specific")} == (
        {"specific_a", "specific_b"} if square else {f"specific_{t}_{side}" for t in (1, 2) for side in "ab"}
    )
    agrees(layer, config)


@pytest.mark.parametrize(
    ("stages", "outer", "orientation", "ratio_on", "bias"),
    pairwise(STAGES, ["none", "tanh"], ["vit", "peft"], ["weight", "factors"], [True, False]),
)
def test_orientation_ratio_and_biases(stages, outer, orientation, ratio_on, bias):
    fields = {"stages": stages, "orientation": orientation, "ratio_on": ratio_on, "generator_bias": bias}
    config = genft("leakyrelu", outer, ratio_W0=1.4, scaling=0.5, **fields)
    agrees(layer_of(config), config)


@pytest.mark.parametrize("inner", SIGMA)
@pytest.mark.parametrize("outer", ["none", "gelu"])
def test_inner_activations_and_no_specific_pair(inner, outer):
    config = genft(inner, outer, individual_features=0, ratio_W0=0.8)
    layer = layer_of(config)
    assert not any(name.startswith("specific") for name in layer.adapter_parameters())
    agrees(layer, config)


@pytest.mark.parametrize("stages", ["column", "row", "column_row"])
def test_the_shortcut_is_the_generated_path(stages):
    """Where σ is none and nothing is dropped, low rank and generated are two ways to the same layer."""
    layer = layer_of(genft("gelu", "none", stages=stages), 12, 9)
    generator, weight = layer.genft_generators["default"], weight_of(layer)
    generated = generator._update(weight, 0.0)
    low = layer.genft_generators["default"].form(weight)
    assert type(generated) is Generated
    assert type(low) is LowRank
    x = torch.randn(5, 12, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(generated.linear(x, weight, None, "auto"), low.linear(x, weight, None, "auto"), **SAME)
    torch.testing.assert_close(generated.update(x, weight, "auto"), low.update(x, weight, "auto"), **SAME)
    torch.testing.assert_close(generated.delta_weight(weight), low.delta_weight(weight), **SAME)
    with pytest.raises(ValueError, match="got σ = tanh, dropout = 0 and hadamard = False, expected none, 0 and False"):
        Generated(generated.h, generated.b, activation="tanh").low_rank()


def test_which_form():
    for outer, drop, training, form in (
        ("none", 0.0, True, LowRank),
        ("none", 0.2, True, Generated),
        ("none", 0.2, False, LowRank),
        ("gelu", 0.0, True, Generated),
        ("gelu", 0.2, False, Generated),
    ):
        layer = layer_of(genft("gelu", outer, drop=drop)).train(training)
        assert type(layer.genft_generators["default"].form(weight_of(layer))) is form
        assert type(layer.genft_generators["default"].form(weight_of(layer), dropout=False)) is (
            LowRank if outer == "none" else Generated
        )


# ---- dropout


@pytest.mark.parametrize("outer", ["none", "gelu"])
@pytest.mark.parametrize(
    ("stages", "sizes", "backend"),
    [
        *((stages, sizes, "reference") for stages in ("column", "row", "column_row") for sizes in ((10, 10), (12, 7))),
        ("column_row", (12, 7), "triton"),
    ],
    ids=str,
)
def test_dropout_is_exact(stages, sizes, backend, outer):
    """The masks of D1 and of ΔW come from two seeds, drawn in that order."""
    config = genft("tanh", outer, stages=stages, drop=0.3)
    layer = layer_of(config, *sizes, backend=backend)
    if backend == "triton":
        layer.to(torch.float32)
    n, k = weight_of(layer).shape
    x = torch.randn(6, k, device=DEVICE, dtype=weight_of(layer).dtype, requires_grad=True)
    torch.manual_seed(21)
    y = layer(x)
    torch.manual_seed(21)
    masks = [keep_mask(draw_seed(DEVICE), 0.3, range(n), range(k)) for _ in config.stages.split("_")]
    assert 0 < sum(int(mask.sum()) for mask in masks) < len(masks) * n * k
    delta = by_hand(weight_of(layer), layer.adapter_parameters(), config, masks)
    want = layer.base_layer(x) + x @ delta.t()
    tolerance = SAME if backend == "reference" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(y, want, **tolerance)
    leaves = [x, *layer.adapter_parameters().values()]
    for got, truth in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(got, truth, **tolerance)


# ---- the start


@pytest.mark.parametrize("stages", ["column", "row", "column_row"])
@pytest.mark.parametrize("outer", ["none", "leakyrelu", "gelu", "tanh"])
def test_starts_at_zero_and_leaves_it(outer, stages):
    torch.manual_seed(0)
    config = genft("gelu", outer, stages=stages)
    assert config.starts_at_zero
    layer = FusedGenLinear.from_linear(nn.Linear(10, 10), config).to(DEVICE)
    assert torch.count_nonzero(layer.get_delta_weight()) == 0
    parameters = layer.adapter_parameters()
    optimizer = torch.optim.Adam(parameters.values(), lr=0.03)
    x, target = torch.randn(2, 50, 10, device=DEVICE)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.98 * losses[0]
    assert all(torch.count_nonzero(parameter.grad) for parameter in parameters.values())


def test_released_starts():
    starts = {"zero": 0.0, "kaiming_uniform": 1 / 1000**0.5, "xavier_uniform": (6 / 1050) ** 0.5, "normal": 0.05}
    for name, bound in starts.items():
        config = GenFTConfig(generator_share_dim=20, individual_features=50, individual_init_a=name)
        config.individual_init_b = name
        layer = FusedGenLinear.from_linear(nn.Linear(1000, 1000), config)
        own = layer.adapter_parameters()
        assert own["specific_a"].abs().max() <= bound
        if name == "normal":
            assert own["specific_b"].std().item() == pytest.approx(0.01, rel=0.05)
        else:  # nn.init takes the last size as fan_in, which for b is the rank
            assert own["specific_b"].abs().max() <= {"kaiming_uniform": 1 / 50**0.5}.get(name, bound)
        assert all((name == "zero") == (torch.count_nonzero(own[f"specific_{side}"]) == 0) for side in "ab")
        for stage in (1, 2):  # as nn.Linear(1000, 20) and nn.Linear(20, 1000) start
            assert 0.9 / 1000**0.5 < own[f"shared_{stage}_a"].abs().max() <= 1 / 1000**0.5
            assert 0.9 / 20**0.5 < own[f"shared_{stage}_b"].abs().max() <= 1 / 20**0.5
            assert 0.7 / 1000**0.5 < own[f"bias_{stage}_a"].abs().max() <= 1 / 1000**0.5
            assert 0.7 / 20**0.5 < own[f"bias_{stage}_b"].abs().max() <= 1 / 20**0.5
        assert torch.count_nonzero(layer.get_delta_weight())


def test_relu_starts_where_it_can_train():
    config = genft("gelu", "relu")
    assert not config.starts_at_zero
    layer = FusedGenLinear.from_linear(nn.Linear(10, 10), config).to(DEVICE)
    layer(torch.randn(4, 10, device=DEVICE)).square().sum().backward()
    assert any(torch.count_nonzero(parameter.grad) for parameter in layer.adapter_parameters().values())


def test_names_of_activations_as_released():
    for name in (None, "None", "NONE", "none"):
        assert GenFTConfig(inner_activation=name, outer_activation=name) == GenFTConfig()
    assert GenFTConfig(outer_activation="LeakyReLU").outer_activation == "leakyrelu"


# ---- several adapters, other base layers


ADAPTERS = {
    "generated": genft("gelu", "gelu"),
    "tanh": genft("none", "tanh", stages="column"),
    "low": genft("none", "none"),
    "edit": WeGeFTConfig(r=2),
    "lora": LoRAConfig(r=2),
    "dropping": LoRAConfig(r=2, lora_dropout=0.5),
    "gift": GIFTConfig(r=2, block="mlp"),
}


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(
    "names",
    [
        ("generated", "lora"),
        ("edit", "generated"),
        ("edit", "lora", "generated"),
        ("generated", "tanh"),
        ("lora", "tanh", "gift", "generated", "low"),
        ("dropping", "generated", "edit"),
    ],
    ids="+".join,
)
def test_beside_other_adapters(names, kind, monkeypatch):
    operations = []
    function = forms.generated_linear
    monkeypatch.setattr(
        forms,
        "generated_linear",
        lambda x, weight, *a, **kw: operations.append(weight) or function(x, weight, *a, **kw),
    )
    torch.manual_seed(0)
    layer = FusedGenLinear.from_linear(LAYERS[kind](12, 9).to(DEVICE, torch.float64), ADAPTERS[names[0]], names[0])
    for name in names[1:]:
        layer.add_adapter(name, ADAPTERS[name])
    layer.set_adapter(list(names))
    randomize(layer, std=0.3).eval()
    x = torch.randn(7, 12, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = layer(x)
    want = layer.base_layer(x) + x @ sum(layer.get_delta_weight(name) for name in names).t()
    torch.testing.assert_close(y, want, **SAME)
    own = [p for name in names for p in layer.adapter_parameters(name).values()]
    for got, truth in zip(
        torch.autograd.grad(y.square().sum(), [x, *own]),
        torch.autograd.grad(want.square().sum(), [x, *own]),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)
    # The first carries the base layer's product; W0 of the others is one zero.
    assert len(operations) == sum(name in ("generated", "tanh") for name in names)
    assert operations[0].data_ptr() == layer.base_layer.weight.data_ptr()
    assert all(weight.untyped_storage().nbytes() == 8 for weight in operations[1:])

    layer.merge()
    torch.testing.assert_close(layer(x), want, **SAME)


def test_beside_others_under_autocast():
    torch.manual_seed(0)
    layer = FusedGenLinear.from_linear(nn.Linear(12, 9).to(DEVICE), ADAPTERS["generated"])
    layer.add_adapter("tanh", ADAPTERS["tanh"])
    layer.set_adapter(["default", "tanh"])
    randomize(layer)
    x = torch.randn(7, 12, device=DEVICE)
    want = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda *_: None)  # and where the base layer makes its own product
    for _ in range(2):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), want, rtol=0.03, atol=0.03)
        handle.remove()


def test_a_weight_without_elements_is_refused():
    layer = layer_of(genft("gelu", "gelu"))
    layer.base_layer.weight = nn.Parameter(torch.zeros(10, 10, dtype=torch.int8, device=DEVICE), requires_grad=False)
    for call in (lambda: layer(torch.zeros(2, 10, device=DEVICE)), layer.get_delta_weight):
        with pytest.raises(TypeError, match=r"base_layer: Linear cannot be dequantised to a weight \[10, 10\]"):
            call()


def test_the_released_orientation_wants_square_weights():
    for name, stages in (("a.down_proj", "column_row"), ("", "row")):
        with pytest.raises(ValueError, match=rf"orientation: got 'peft', .*{name or 'the layer'} has K = 12, N = 9"):
            FusedGenLinear.from_linear(
                nn.Linear(12, 9), genft("none", "none", orientation="peft", stages=stages), name=name
            )
    FusedGenLinear.from_linear(nn.Linear(12, 9), genft("none", "none", orientation="peft", stages="column"))
    model = llama()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"down_proj has K = 48, N = 32; expected 'vit'"):
        get_peft_model(model, genft("none", "none", orientation="peft", target_modules=["q_proj", "down_proj"]))
    assert list(model.state_dict()) == names


# ---- fused qkv


def thirds_by_hand(weight, parameters, config, masks=None):
    flags = config.enable_genft["qkv"]
    return torch.cat(
        [
            by_hand(rows, parameters, config) if adapted else torch.zeros_like(rows)
            for rows, adapted in zip(weight.chunk(len(flags)), flags, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("bias", "form", "outer", "flags"),
    pairwise(
        [True, False],
        [("column", "vit"), ("row", "vit"), ("row", "peft"), ("column_row", "vit"), ("column_row", "peft")],
        ["none", "gelu"],
        [[True, False, True], [False, True], [True, True, False, True]],
    ),
    ids=str,
)
def test_row_blocks(bias, form, outer, flags, monkeypatch):
    stages, orientation = form
    """One pair for all blocks, one operation, and nothing for the blocks that are not adapted, biases or not."""
    fields = {"enable_genft": {"qkv": flags}, "stages": stages, "orientation": orientation, "generator_bias": bias}
    config = genft("tanh", outer, ratio_W0=1.3, **fields)
    layer = layer_of(config, 10, 10 * len(flags), name="blocks.0.attn.qkv")
    operations = []
    for name in ("lowrank_linear", "generated_linear"):
        function = getattr(forms, name)
        monkeypatch.setattr(forms, name, lambda *a, f=function, **kw: operations.append(f) or f(*a, **kw))
    layer(torch.randn(2, 10, dtype=torch.float64, device=DEVICE))
    assert len(operations) == 1
    assert {"specific_a", "specific_b", "shared_2_a" if stages != "column" else "shared_1_a"} <= set(
        layer.adapter_parameters()
    )
    agrees(layer, config, thirds_by_hand)
    delta = layer.get_delta_weight().chunk(len(flags))
    assert [bool(torch.count_nonzero(block)) for block in delta] == flags


def test_row_blocks_of_another_shape_and_of_a_conv1d():
    config = genft("tanh", "gelu", enable_genft={"qkv": [True, False, True]})
    agrees(layer_of(config, 12, 15, "Conv1D", name="qkv"), config, thirds_by_hand)
    with pytest.raises(ValueError, match="enable_genft: got 3 flags for qkv"):
        layer_of(config, 12, 16, name="qkv")


def test_row_blocks_drop_each_its_own_elements():
    config = genft("tanh", "gelu", drop=0.3, enable_genft={"qkv": [True, False, True]})
    layer = layer_of(config, 10, 30, name="qkv")
    x = torch.randn(6, 10, dtype=torch.float64, device=DEVICE)
    torch.manual_seed(4)
    y = layer(x)
    torch.manual_seed(4)
    first = [keep_mask(draw_seed(DEVICE), 0.3, range(10), range(10)) for _ in range(2)]
    last = keep_mask(draw_seed(DEVICE), 0.3, range(30), range(10)).chunk(3)
    q, k, v = weight_of(layer).chunk(3)
    parameters = layer.adapter_parameters()
    deltas = [by_hand(rows, parameters, config, [first[i], last[2 * i]]) for i, rows in enumerate((q, v))]
    delta = torch.cat([deltas[0], torch.zeros_like(k), deltas[1]])
    torch.testing.assert_close(y, layer.base_layer(x) + x @ delta.t(), **SAME)


def test_a_model_with_fused_qkv(tmp_path):
    config = genft("gelu", "gelu", enable_genft={"c_attn": [True, False, True]}, target_modules=["c_attn", "c_fc"])
    model = randomize(get_peft_model(gpt2(), config))
    assert set(model.base_model.shared_generators.genft_shared["default"]) == {
        "generator_32x32",  # the thirds of c_attn
        "generator_128x32",
    }
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), want)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)
    with pytest.warns(RuntimeWarning, match=r"enable_genft: \['qkv'\] match none"):
        get_peft_model(gpt2(), genft("none", "none", enable_genft={"qkv": [True]}, target_modules=["c_attn"]))


# ---- sharing


def shared(model: PeftModel) -> nn.ModuleDict:
    return model.base_model.shared_generators.genft_shared["default"]


def test_shared_once_per_shape(tmp_path):
    model = randomize(get_peft_model(llama(), genft("gelu", "gelu", target_modules="all-linear")))
    shapes = {
        f"{layer.out_features}x{layer.in_features}" for layer in model.modules() if isinstance(layer, FusedGenLinear)
    }
    assert set(shared(model)) == {f"generator_{shape}" for shape in shapes}
    layers = model.get_base_model().model.layers
    first, second = (layers[depth].self_attn.q_proj.adapter_parameters() for depth in (0, 1))
    other = layers[1].self_attn.o_proj.adapter_parameters()
    for name in first:
        assert (first[name] is second[name] is other[name]) == (not name.startswith("specific"))
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), want)
    duplicate = copy.deepcopy(model)
    randomize(duplicate, seed=8)
    assert torch.equal(logits(model), want)
    assert not torch.allclose(logits(duplicate), want)


def test_one_pair_per_block(tmp_path):
    targets = ["q_proj", "k_proj", "o_proj"]
    model = randomize(get_peft_model(llama(), genft("gelu", "gelu", individual_per_block=True, target_modules=targets)))
    assert set(shared(model)) == {
        "generator_32x32",
        "generator_16x32",
        *(f"specific_model-layers-{depth}-self_attn" for depth in (0, 1)),  # q and o
        *(f"specific_model-layers-{depth}-self_attn_in_features32_out_features16_r2" for depth in (0, 1)),  # k
    }
    attention = model.get_base_model().model.layers[1].self_attn
    q, o = (getattr(attention, name).adapter_parameters()["specific_a"] for name in ("q_proj", "o_proj"))
    assert q is o
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), want)


def test_rank_pattern_and_layers_to_transform():
    config = genft("gelu", "none", rank_pattern={r"layers\.1\..*": 5, "o_proj": 0}, target_modules=["q_proj", "o_proj"])
    model = randomize(get_peft_model(llama(), config))
    for depth, r in ((0, 2), (1, 5)):
        layer = model.get_base_model().model.layers[depth].self_attn.q_proj
        parameters = layer.adapter_parameters()
        assert parameters["specific_a"].shape == (r, 32)
        assert parameters["bias_1_a"].shape == (3 + 5,)  # shared by all ranks: a layer takes the first of it
        delta = by_hand(weight_of(layer), parameters, config)
        torch.testing.assert_close(layer.get_delta_weight(), delta, rtol=1e-4, atol=1e-6)
    assert "specific_a" not in model.get_base_model().model.layers[0].self_attn.o_proj.adapter_parameters()
    config = genft("gelu", "gelu", layers_to_transform=[1], target_modules=["q_proj", "v_proj"])
    adapted = [name for name, m in get_peft_model(llama(), config).named_modules() if isinstance(m, FusedGenLinear)]
    assert [name.rpartition("layers.")[2] for name in adapted] == ["1.self_attn.q_proj", "1.self_attn.v_proj"]


# ---- counts of the paper's settings


def trainable(model: nn.Module, config: GenFTConfig) -> int:
    return get_peft_model(model, config).get_nb_trainable_parameters()[0]


def test_published_counts():
    with torch.device("meta"):
        roberta = RobertaForSequenceClassification(RobertaConfig())
        vit = ViTForImageClassification(ViTConfig())
        timm_like = nn.ModuleDict({f"blocks_{i}": nn.ModuleDict({"qkv": nn.Linear(768, 2304)}) for i in range(12)})
        llama_7b = LlamaForCausalLM(LlamaConfig())
    glue = {"generator_share_dim": 24, "individual_features": 2, "ratio_W0": 0.5, "scaling": 0.05, "drop": 0.1}
    assert trainable(roberta, GenFTConfig(**glue, target_modules=["query", "value"])) == 149_044
    images = {"generator_share_dim": 32, "individual_features": 5, "ratio_W0": 1.4, "outer_activation": "leakyrelu"}
    images |= {"ratio_on": "factors", "generator_bias": False, "drop": 0.1}
    config = GenFTConfig(**images, individual_per_block=True, target_modules=["q_proj", "v_proj"])
    assert trainable(vit, config) == 190_464
    config = GenFTConfig(**images, enable_genft={"qkv": [True, False, True]}, target_modules=["qkv"])
    assert trainable(timm_like, config) == 190_464
    alpaca = {
        "generator_share_dim": 4,
        "individual_features": 4,
        "inner_activation": "gelu",
        "outer_activation": "gelu",
    }
    assert trainable(llama_7b, GenFTConfig(**alpaca, target_modules=["q_proj", "v_proj"])) == 2_170_896


# ---- memory


@pytest.mark.parametrize(
    ("fields", "blocks"),
    [
        ({"inner_activation": "gelu", "outer_activation": "gelu"}, 1),
        ({"inner_activation": "gelu", "outer_activation": "gelu", "drop": 0.1}, 1),
        ({"outer_activation": "leakyrelu", "generator_bias": False, "ratio_on": "factors"}, 3),
        ({"inner_activation": "tanh", "outer_activation": "tanh", "stages": "row", "orientation": "peft"}, 1),
        ({"outer_activation": "none"}, 3),
    ],
    ids=["gelu", "dropout", "qkv", "row", "low rank"],
)
def test_no_step_allocates_the_weights_size(fields, blocks):
    """Within the operations too, forward and backward; the panels of the reference are smaller than W0."""
    d = 1536
    flags = [True, False, True] if blocks == 3 else [True]
    config = GenFTConfig(generator_share_dim=4, individual_features=2, enable_genft={"qkv": flags}, **fields)
    layer = FusedGenLinear.from_linear(nn.Linear(d, d * blocks).to(DEVICE), config, name="qkv", backend="reference")
    layer.add_adapter("second", genft("none", "tanh"), backend="reference")
    layer.set_adapter(["default", "second"])
    randomize(layer)
    x = torch.randn(3, d, device=DEVICE, requires_grad=True)
    with Allocations(x, *layer.parameters()) as seen:
        layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.adapter_parameters().values())
    assert 3 * d * 4 < seen.largest < d * d * 4


def peak_bytes(run) -> int:
    """The most memory that `run` held at one time, from the trace of the allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            most = max(most, now)
    return most


def test_memory_beyond_the_frozen_layer():
    """P4 on the CPU: all that a step holds at one time, factors and gradients of the adapter included."""
    d = 4096
    linear = nn.Linear(d, d).requires_grad_(False)
    fields = {"inner_activation": "gelu", "outer_activation": "gelu"}
    config = GenFTConfig(generator_share_dim=4, individual_features=4, **fields)
    layer = FusedGenLinear.from_linear(linear, config, backend="reference")
    x = torch.randn(16, d, requires_grad=True)

    def step(module: nn.Module) -> int:
        x.grad = None
        return peak_bytes(lambda: module(x).sum().backward())

    assert 0 < step(layer) - step(linear) <= 0.05 * linear.weight.nbytes
