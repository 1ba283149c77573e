"""SaS: its formula written out, what layers share, what trains whom, and its size on ViT-B/16."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from genft_modules import FusedGenLinear, SaSConfig
from tests.support.cases import DEVICE, IDS, gpt2, llama, logits, randomize

SMALL = {"r_shared": 3, "r_specific": 2, "embedding_dim": 4, "hidden_dim": 5, "chunk_dim": 6}
TARGETS = ["q_proj", "v_proj", "up_proj"]


def by_hand(p: dict[str, torch.Tensor], n: int, k: int, config: SaSConfig) -> torch.Tensor:
    """ΔW [N, K], element by element of the generated pair."""
    made = {"p": torch.zeros(k, config.r_specific).to(p["embedding"]), "q": torch.zeros(n, config.r_specific)}
    made["q"] = made["q"].to(p["embedding"])
    first = 0
    for side, size, scale in (("p", k, k**-0.5), ("q", n, config.hidden_dim**-0.5)):
        for row in range(size):
            chunk, place = divmod(row, config.chunk_dim)
            given = p["embedding"] + p["pair.chunks"][first + chunk]
            hidden = torch.tanh(p["hypernetwork.weight"] @ given + p["hypernetwork.bias"])
            for column in range(config.r_specific):
                made[side][row, column] = (
                    scale * hidden @ p[f"hypernetwork.head_{side}"][place * config.r_specific + column]
                )
        first += -(-size // config.chunk_dim)
    return config.scaling * (p["pair.q"] @ p["pair.p"].t() + made["q"] @ made["p"].t())


@pytest.mark.parametrize(("n", "k"), [(12, 12), (7, 20), (20, 7), (1, 5)])
def test_the_update_is_the_formulas(n, k):
    config = SaSConfig(**SMALL, scaling=0.7)
    layer = randomize(FusedGenLinear.from_linear(nn.Linear(k, n).to(DEVICE, torch.float64), config), std=1)
    parameters = {name: parameter.detach() for name, parameter in layer.adapter_parameters().items()}
    torch.testing.assert_close(layer.get_delta_weight(), by_hand(parameters, n, k, config), rtol=1e-12, atol=1e-12)


def adapt(base=llama, targets=TARGETS, **fields) -> PeftModel:
    return get_peft_model(base(), SaSConfig(**{**SMALL, **fields}, target_modules=targets))


def adapted(model: PeftModel) -> dict[str, FusedGenLinear]:
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, FusedGenLinear)}


def test_one_hypernetwork_one_pair_per_shape_one_embedding_per_layer():
    model = adapt()  # q [32, 32], v [16, 32], up [48, 32] in two layers
    shared = model.base_model.shared_generators.genft_shared["default"]
    assert set(shared) == {"hypernetwork", "pair_32x32", "pair_16x32", "pair_48x32"}
    generators = {name: layer.genft_generators["default"] for name, layer in adapted(model).items()}
    assert len(generators) == 6
    for name, generator in generators.items():
        assert {key for key, _ in generator.named_parameters()} == {"embedding"}
        assert generator.hypernetwork is shared["hypernetwork"]
        assert generator.pair is shared[f"pair_{adapted(model)[name].out_features}x32"]
    assert len({tuple(generator.embedding.tolist()) for generator in generators.values()}) == 6
    chunks = (6 + 6) + (6 + 3) + (6 + 8)  # of 6 rows; the last one of 32 and of 16 is cut
    counts = 3 * (64 + 48 + 80) + 4 * chunks + 4 * 6 + 5 * (4 + 1) + 2 * 5 * 12
    assert model.get_nb_trainable_parameters()[0] == counts
    model.add_adapter("second", SaSConfig(**SMALL, target_modules=TARGETS))
    assert model.base_model.shared_generators.genft_shared["second"]["hypernetwork"] is not shared["hypernetwork"]


def test_layers_of_a_shape_have_one_shared_part_and_each_its_own():
    model = randomize(adapt(gpt2, ["c_attn"]), std=1)
    first, second = adapted(model).values()
    assert not torch.allclose(first.get_delta_weight(), second.get_delta_weight())
    with torch.no_grad():
        first.genft_generators["default"].embedding.copy_(second.genft_generators["default"].embedding)
    assert torch.equal(first.get_delta_weight(), second.get_delta_weight())
    with torch.no_grad():
        for layer in (first, second):
            layer.genft_generators["default"].hypernetwork.head_q.zero_()
    pair = first.genft_generators["default"].pair
    torch.testing.assert_close(first.get_delta_weight(), pair.q @ pair.p.t())


def test_every_layer_trains_what_is_shared():
    model = randomize(adapt())
    shared = model.base_model.shared_generators.genft_shared["default"]
    model(input_ids=IDS).logits.square().sum().backward()
    assert all(torch.count_nonzero(parameter.grad) for parameter in model.parameters() if parameter.requires_grad)
    copies = []  # the same model, each layer with a hypernetwork of its own
    for layer in adapted(model).values():
        copies.append(copy.deepcopy(shared["hypernetwork"]))
        copies[-1].zero_grad()
        layer.genft_generators["default"].refer("hypernetwork", copies[-1], own=False)
    model(input_ids=IDS).logits.square().sum().backward()
    for name, parameter in shared["hypernetwork"].named_parameters():
        parts = [each.get_parameter(name).grad for each in copies]
        assert all(torch.count_nonzero(part) for part in parts)
        torch.testing.assert_close(sum(parts), parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


def test_starts_at_zero_with_a_gradient():
    layer = FusedGenLinear.from_linear(nn.Linear(9, 7).to(DEVICE), SaSConfig(**SMALL))
    layer(torch.randn(5, 9, device=DEVICE)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.adapter_parameters().items()}
    moving = {name for name, gradient in gradients.items() if torch.count_nonzero(gradient)}
    assert moving == {"pair.q", "hypernetwork.head_q"}


def test_what_is_shared_may_be_replaced_and_be_elsewhere():
    """As FSDP and `load_state_dict(assign=True)` replace parameters, and layers are spread over devices."""
    model = randomize(adapt())
    before = logits(model)
    state = {key: 2 * tensor if "hypernetwork" in key else tensor for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    after = logits(model)
    assert not torch.allclose(after, before)
    reference = randomize(adapt())
    reference.load_state_dict(state)
    assert torch.equal(logits(reference), after)

    hypernetwork = model.base_model.shared_generators.genft_shared["default"]["hypernetwork"]
    made = hypernetwork.made(torch.zeros(6 + 3, 4, device="meta"), 32, 16)
    assert [(tensor.shape, tensor.is_meta) for tensor in made] == [((32, 2), True), ((16, 2), True)]
    assert not any(parameter.is_meta for parameter in hypernetwork.parameters())


@pytest.mark.parametrize(("projections", "count"), [(2, 29_984), (4, 30_368)])
def test_vit_b16_stays_under_the_published_budget(projections, count):
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig())
    names = [name for name, module in vit.named_modules() if isinstance(module, nn.Linear) and "attention" in name]
    assert len(names) == 48
    if projections == 2:
        names = [name for name in names if name.rpartition(".")[2] in ("query", "value", "q_proj", "v_proj")]
    model = get_peft_model(vit, SaSConfig(target_modules=names))
    assert len(adapted(model)) == 12 * projections
    trained, every = model.get_nb_trainable_parameters()
    assert trained == count < 43_000
    assert trained / every < 0.0005
