"""Adapters in the released GenFT code's formats: written here with its keys, loaded, and held to its formulas."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from genft_modules import FusedGenLinear, WeGeFTConfig, load_released_genft
from tests.support.cases import DEVICE, IDS, bert, gpt2, llama, logits

D, SHARED, OWN = 32, 3, 2
FACTORS = {"share_1_a": (SHARED, D), "share_1_b": (D, SHARED), "share_2_a": (SHARED, D), "share_2_b": (D, SHARED)}
BIASES = {"share_1_a": SHARED + OWN, "share_1_b": D, "share_2_a": SHARED + OWN, "share_2_b": D}


def drawn(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape)


def generator(prefix: str, bias: bool) -> dict[str, torch.Tensor]:
    tensors = {f"{prefix}genft_{name}.linear.weight": drawn(*shape) for name, shape in FACTORS.items()}
    if bias:
        tensors |= {f"{prefix}genft_{name}.linear.bias": drawn(size) for name, size in BIASES.items()}
    return tensors


def pairs(modules: list[str]) -> dict[str, torch.Tensor]:
    own = {f"{name}.genft_individual_weight_a": drawn(OWN, D) for name in modules}
    return own | {f"{name}.genft_individual_weight_b": drawn(D, OWN) for name in modules}


def released_d2(weight, tensors, module, settings, factor_ratio=1.0):
    """D2 of the released generator for `weight`, from a checkpoint's tensors."""
    sigma = {"none": lambda z: z, "gelu": F.gelu, "leakyrelu": F.leaky_relu}
    inner, outer = (sigma[settings[f"{name}_activation"].lower()] for name in ("inner", "outer"))
    one = {key.rpartition("genft_")[2]: tensor for key, tensor in tensors.items() if ".linear." in key}
    d = weight
    for stage in "12":
        for side, dim, act in (("a", 0, inner), ("b", 1, outer)):
            own = tensors[f"{module}.genft_individual_weight_{side}"]
            factor = torch.cat([one[f"share_{stage}_{side}.linear.weight"], own], dim)
            d = act(F.linear(d, factor_ratio * factor, one.get(f"share_{stage}_{side}.linear.bias")))
        d = d if stage == "2" else d.t()
    return d


# ---- a peft folder

PEFT = {
    "peft_type": "GENFT",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "somebody/roberta",
    "generator_share_dim": SHARED,
    "individual_features": OWN,
    "individual_init_a": "kaiming_uniform",
    "individual_init_b": "kaiming_uniform",
    "ratio_W0": 0.5,
    "inner_activation": "None",
    "outer_activation": "None",
    "scaling": 0.3,
    "drop": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier", "score"],
    "exclude_modules": None,
    "layers_pattern": None,
    "layers_to_transform": None,
}
LAYERS = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]


def peft_checkpoint(folder, layers=LAYERS, head=True, **settings):
    """As the released code saves it: the generator once for the model and once more in every layer."""
    torch.manual_seed(1)
    tensors = pairs([f"base_model.model.{name}" for name in layers])
    shared = generator("base_model.generator.", bias=True)
    tensors |= shared
    for name in layers:
        copies = {key.replace("base_model.", f"base_model.model.{name}.", 1): t.clone() for key, t in shared.items()}
        tensors |= copies
    if head:
        tensors |= {"base_model.model.classifier.weight": drawn(3, D), "base_model.model.classifier.bias": drawn(3)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT, **settings}))
    return tensors


@pytest.mark.parametrize("activation", ["None", "gelu"])
def test_a_peft_checkpoint_gives_the_released_outputs(activation, tmp_path):
    fields = {"inner_activation": activation, "outer_activation": activation}
    tensors = peft_checkpoint(tmp_path / "released", **fields)
    plain = bert()
    with torch.no_grad():
        for name in LAYERS:
            weight = plain.get_submodule(name).weight
            d2 = released_d2(0.5 * weight.cpu(), tensors, f"base_model.model.{name}", {**PEFT, **fields})
            weight += 0.3 * d2.to(DEVICE)
        plain.classifier.weight.copy_(tensors["base_model.model.classifier.weight"])
        plain.classifier.bias.copy_(tensors["base_model.model.classifier.bias"])
    want = logits(plain)

    model = load_released_genft(bert(), tmp_path / "released")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config = model.peft_config["default"]
    assert (config.orientation, config.ratio_on, config.generator_bias, config.drop) == ("peft", "weight", True, 0.1)
    assert config.task_type == "SEQ_CLS"

    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(bert(), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)


def test_how_it_is_loaded(tmp_path):
    peft_checkpoint(tmp_path, inner_activation="gelu")
    model = load_released_genft(bert(), tmp_path, adapter_name="mine", backend="reference", is_trainable=True)
    assert model.active_adapter == "mine"
    layer = model.get_base_model().get_submodule(LAYERS[0])
    assert layer.genft_generators["mine"].backend == "reference"
    model(input_ids=IDS).logits.sum().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum("specific" in key for key in trained) == 2 * len(LAYERS)
    assert sum("shared" in key or "bias_" in key for key in trained) == 8
    assert any("classifier" in key for key in trained)
    half = load_released_genft(bert().to(torch.bfloat16), tmp_path)
    assert {p.dtype for key, p in half.named_parameters() if "genft_" in key} == {torch.float32}


def test_a_peft_checkpoint_as_a_torch_file_and_without_own_targets(tmp_path):
    tensors = peft_checkpoint(tmp_path, target_modules=None)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    model = load_released_genft(bert(), tmp_path)
    assert [n for n, m in model.get_base_model().named_modules() if isinstance(m, FusedGenLinear)] == LAYERS


def test_without_specific_pairs_w0_has_no_ratio(tmp_path):
    tensors = peft_checkpoint(tmp_path, individual_features=0)
    kept = {key: t for key, t in tensors.items() if "individual" not in key}
    kept = {key: t[:SHARED] if key.endswith("_a.linear.bias") else t for key, t in kept.items()}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    model = load_released_genft(bert(), tmp_path)
    assert model.peft_config["default"].ratio_W0 == 1.0


# ---- a ViT's torch file

VIT = {
    "generator_share_dim": SHARED,
    "individual_features": OWN,
    "individual_init_a": "zero",
    "individual_init_b": "zero",
    "ratio_W0": 1.4,
    "inner_activation": "None",
    "outer_activation": "leakyrelu",
    "scaling": 0.8,
    "dpr": 0.1,
    "bias": False,
    "class_num": 5,
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class TimmLike(nn.Module):
    def __init__(self, depth=11):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


def timm_like(depth=11) -> nn.Module:
    torch.manual_seed(0)
    return TimmLike(depth).to(DEVICE).eval()


def vit(depth=11) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 40, "num_hidden_layers": depth, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5)).to(DEVICE).eval()


def vit_checkpoint(folder, depth=11, bias=False, **settings):
    """As the released code saves it: what trained, each parameter once, the generator under the first block."""
    torch.manual_seed(1)
    tensors = pairs([f"blocks.{i}.attn" for i in range(depth)]) | generator("blocks.0.attn.gen.", bias)
    tensors |= {"head.weight": drawn(5, D), "head.bias": drawn(5)}
    folder.mkdir(exist_ok=True)
    torch.save({"epoch": 10, "model": tensors, "best_acc": 0.5}, folder / "best_model.pt")
    (folder / "args.yaml").write_text(yaml.safe_dump({**VIT, "bias": bias, **settings}))
    return tensors


@pytest.mark.parametrize("bias", [False, True])
def test_a_vit_checkpoint_on_fused_qkv(bias, tmp_path):
    tensors = vit_checkpoint(tmp_path / "released", bias=bias)
    plain = timm_like()
    with torch.no_grad():
        for i, block in enumerate(plain.blocks):
            for third in (0, 2):
                rows = block.attn.qkv.weight.chunk(3)[third]
                rows += 0.8 * released_d2(rows.cpu(), tensors, f"blocks.{i}.attn", VIT, 1.4).t().to(DEVICE)
        plain.head.load_state_dict({key: tensors[f"head.{key}"] for key in ("weight", "bias")})
    x = torch.randn(2, 6, D, device=DEVICE)
    want = plain(x)
    model = load_released_genft(timm_like(), tmp_path / "released")
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].drop == 0.1
    model.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(timm_like(), tmp_path / "ours")
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_a_vit_checkpoint_on_separate_projections(tmp_path):
    """Blocks go by number: 10 is the last of eleven."""
    tensors = vit_checkpoint(tmp_path)
    plain = vit()
    with torch.no_grad():
        for i, block in enumerate(plain.vit.layers):
            for linear in (block.attention.q_proj, block.attention.v_proj):
                d2 = released_d2(linear.weight.cpu(), tensors, f"blocks.{i}.attn", VIT, 1.4)
                linear.weight += 0.8 * d2.t().to(DEVICE)
        plain.classifier.load_state_dict({key: tensors[f"head.{key}"] for key in ("weight", "bias")})
        image = torch.randn(2, 3, 8, 8, device=DEVICE)
        want = plain(image).logits
        model = load_released_genft(vit(), tmp_path / "best_model.pt", rename={"head": "classifier"})
        torch.testing.assert_close(model(image).logits, want, rtol=1e-4, atol=1e-5)
    (tmp_path / "args.yaml").unlink()
    names = {"target_modules": ["q_proj", "v_proj"], "settings": VIT, "rename": {"head": "classifier"}}
    with torch.no_grad():
        assert torch.equal(load_released_genft(vit(), tmp_path, **names)(image).logits, model(image).logits)


def test_a_vit_checkpoint_is_data_and_nothing_else(tmp_path):
    vit_checkpoint(tmp_path)
    torch.save({"model": {}, "hook": Attention()}, tmp_path / "best_model.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_released_genft(timm_like(), tmp_path)


# ---- refusals


def rewritten(folder, change):
    """The peft checkpoint with other tensors."""
    tensors = peft_checkpoint(folder)
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = f"base_model.model.{LAYERS[0]}."
REFUSED = {
    "no checkpoint": ("has neither adapter_config.json nor best_model.pt", lambda f: f.mkdir(), bert),
    "another method": ("adapter of type 'LORA', expected", lambda f: peft_checkpoint(f, peft_type="LORA"), bert),
    "ours": (
        "'GENFT_GENFT', .* PeftModel.from_pretrained",
        lambda f: peft_checkpoint(f, peft_type="GENFT_GENFT"),
        bert,
    ),
    "unknown key": (
        r"unknown keys \['base_model.model.x.genft_gate'\]",
        lambda f: rewritten(f, lambda t: t.update({"base_model.model.x.genft_gate": drawn(2)})),
        bert,
    ),
    "missing factor": (
        r"keys \['genft_share_2_b.linear.weight'\] are missing",
        lambda f: rewritten(f, lambda t: [t.pop(key) for key in list(t) if "2_b.linear.weight" in key]),
        bert,
    ),
    "half a pair": (
        rf"keys \['{LAYERS[0]}.genft_individual_weight_b'\] are missing",
        lambda f: rewritten(f, lambda t: t.pop(Q + "genft_individual_weight_b")),
        bert,
    ),
    "two generators": (
        rf"'{Q}generator.genft_share_1_a.linear.weight'\] differ from other copies",
        lambda f: rewritten(f, lambda t: t[Q + "generator.genft_share_1_a.linear.weight"].add_(1)),
        bert,
    ),
    "layer that the model lacks": (
        r"unknown: \['bert.encoder.layer.7.attention.self.query.genft_individual_weight_a and _b'\]",
        lambda f: rewritten(f, lambda t: t.update(pairs(["base_model.model." + LAYERS[0].replace("0", "7")]))),
        bert,
    ),
    "layer without a pair": (
        r"missing: \['bert.encoder.layer.0.attention.self.key.genft_individual",
        lambda f: peft_checkpoint(f, target_modules=["query", "key", "value"]),
        bert,
    ),
    "pairs that the config has not": (
        r"unknown: \['bert.encoder.layer.0.attention.self.query.genft",
        lambda f: peft_checkpoint(f, individual_features=0),
        bert,
    ),
    "another module's tensor": (
        r"unknown: \['base_model.model.pooler.weight'\]",
        lambda f: rewritten(f, lambda t: t.update({"base_model.model.pooler.weight": drawn(2)})),
        bert,
    ),
    "no head": (r"missing: \['base_model.model.classifier.bias', ", lambda f: peft_checkpoint(f, head=False), bert),
    "another rank": (
        rf"shape mismatch: .*{LAYERS[0]}.genft_individual_weight_a: got \(2, 32\), expected \(4, 32\)",
        lambda f: peft_checkpoint(f, individual_features=4),
        bert,
    ),
    "no settings": (
        r"settings: \['generator_share_dim', .* are missing",
        lambda f: (vit_checkpoint(f), (f / "args.yaml").unlink()),
        timm_like,
    ),
    "Conv1D": (
        "transformer.h.0.attn.c_proj.* are Conv1D",
        lambda f: peft_checkpoint(
            f, [f"transformer.h.{i}.attn.c_proj" for i in (0, 1)], False, target_modules=["attn.c_proj"]
        ),
        gpt2,
    ),
    "rectangular": (
        "down_proj has K = 48, N = 32",
        lambda f: peft_checkpoint(f, ["model.layers.0.mlp.down_proj"], False, target_modules=["down_proj"]),
        llama,
    ),
    "two shapes": (
        "adapted layers of 2 shapes",
        lambda f: vit_checkpoint(f, depth=1),
        lambda: nn.ModuleDict(
            {
                "a": nn.ModuleDict({"qkv": nn.Linear(D, 3 * D)}),
                "b": nn.ModuleDict({"qkv": nn.Linear(8, 24)}),
                "head": nn.Linear(D, 5),
            }
        ),
    ),
    "fewer blocks": (
        r"pairs for 3 blocks, .*'blocks.2.attn'\], expected as many .* 2:",
        lambda f: vit_checkpoint(f, depth=3),
        lambda: timm_like(2),
    ),
    "no attention": (
        r"target_modules: the model has none of",
        lambda f: vit_checkpoint(f),
        lambda: nn.ModuleDict({"head": nn.Linear(D, 5)}),
    ),
    "no head in the model": (r"no modules for the keys \['head.weight', 'head.bias'\]; .* rename", vit_checkpoint, vit),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_map_and_leaves_the_layers_alone(case, tmp_path):
    message, write, make = REFUSED[case]
    write(tmp_path / "released")
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_released_genft(model, tmp_path / "released")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_wegeft_adapter_is_no_released_genft(tmp_path):
    from peft import get_peft_model

    get_peft_model(bert(), WeGeFTConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GENFT_WEGEFT"):
        load_released_genft(bert(), tmp_path)
