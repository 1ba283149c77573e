"""`adapt`: any torch module, without naming its layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from genft_modules import FusedGenLinear, LoRAConfig, WeGeFTConfig, adapt, load_adapter, save_adapter
from tests.support.architectures import ARCHITECTURES, unet
from tests.support.cases import CASES, DEVICE, KINDS, llama, randomize, seeded


class Net(nn.Module):
    """An encoder of torch's, whose out_proj is never called, a block of numbered layers and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.body = nn.Sequential(nn.Conv1d(5, 5, 1), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(self.encoder(x))).mean(1))


class Timm(Net):
    """As timm's models say where their output layer is, here not the last module; of a distilled one, the layers."""

    def __init__(self, two: bool) -> None:
        super().__init__()
        self.two = two
        self.after = nn.Linear(3, 3)

    def get_classifier(self):
        return (self.head, self.after) if self.two else self.head


class Convolutional(nn.Module):
    """Ends with a convolution, so that its last linear layer is no output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(4, 4)
        self.out = nn.Conv2d(4, 1, 1)


class Named(nn.Module):
    """A model whose output layer has peft's name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        self.body = nn.Linear(4, 4)


def vit() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=4, patch_size=2, num_labels=3))


def net() -> nn.Module:
    return seeded(Net)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
INNER = {"encoder.layers.0.linear1", "encoder.layers.0.linear2", "body.1", "body.3"}
PICKED = {
    "plain": (Net, INNER),
    "a list": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2)), {"0", "2"}),
    "timm": (lambda: Timm(two=False), INNER | {"after"}),
    "timm, two heads": (lambda: Timm(two=True), INNER),
    "ends with a convolution": (Convolutional, {"time"}),
    "named": (Named, {"body"}),
    "an architecture that peft knows": (llama, {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}),
    "one that it does not know": (
        vit,
        {f"vit.layers.0.{name}" for name in ("mlp.fc1", "mlp.fc2", *(f"attention.{n}_proj" for n in "qkvo"))},
    ),
}


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FusedGenLinear)}


@pytest.mark.parametrize("case", PICKED)
def test_the_linear_layers_but_the_output_layer(case):
    make, names = PICKED[case]
    config = WeGeFTConfig(r=2)
    model = adapt(make(), config)
    assert isinstance(model, PeftModel)
    assert adapted(model.get_base_model()) == names
    assert config.target_modules is None
    assert all(("genft_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_all_linear_layers_of_a_unet():
    pytest.importorskip("diffusers")
    linear = {name for name, module in unet().named_modules() if isinstance(module, nn.Linear)}
    assert adapted(adapt(unet(), WeGeFTConfig(r=2)).get_base_model()) == linear  # it ends with a convolution


def test_what_is_named_is_what_counts():
    assert adapted(adapt(net(), WeGeFTConfig(target_modules=["head", "body.1"])).get_base_model()) == {"head", "body.1"}
    trained = adapt(net(), WeGeFTConfig(modules_to_save=["head", "body"]))
    assert adapted(trained.get_base_model()) == {"encoder.layers.0.linear1", "encoder.layers.0.linear2"}
    assert trained.get_base_model().head.modules_to_save["default"].weight.requires_grad
    left = adapt(net(), WeGeFTConfig(exclude_modules=["linear1"]))
    assert adapted(left.get_base_model()) == INNER - {"encoder.layers.0.linear1"}
    stock = adapt(net(), LoraConfig(r=2), "mine")
    assert set(stock.targeted_module_names) == INNER
    assert list(stock.peft_config) == ["mine"]


@pytest.mark.parametrize("case", KINDS)
def test_a_plain_net_is_trained_saved_loaded_and_merged(case, tmp_path):
    plain = net()(X)
    model = adapt(net(), CASES[case](task_type=None))
    torch.testing.assert_close(model(X), plain)
    randomize(model, std=0.3)
    want = model(X)
    want.sum().backward()
    assert not torch.allclose(want, plain)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(net(), tmp_path / "adapter")
    assert torch.equal(loaded(X), model.eval()(X))
    merged = loaded.merge_and_unload()
    assert isinstance(merged, Net)
    torch.testing.assert_close(merged(X), want, rtol=1e-4, atol=1e-5)
    assert isinstance(adapt(merged, WeGeFTConfig(r=2)), PeftModel)  # again


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(TypeError, match=r"model: got dict, expected a torch\.nn\.Module"):
        adapt({}, WeGeFTConfig())
    with pytest.raises(TypeError, match="config: got dict, expected a configuration"):
        adapt(net(), {"r": 2})
    for one in (nn.Linear(3, 3), nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(4, 2)), nn.Sequential(nn.ReLU())):
        with pytest.raises(ValueError, match=f"model: {type(one).__name__} has no linear layers"):
            adapt(one, WeGeFTConfig())
    for model in (adapt(net(), LoRAConfig()), get_peft_model(ARCHITECTURES["bert"].make(), LoRAConfig())):
        for module in (model, model.get_base_model()):
            with pytest.raises(ValueError, match=r"with the adapters \['default'\], expected one without"):
                adapt(module, WeGeFTConfig())
