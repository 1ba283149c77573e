"""Adapters in the formats of the released WeGeFT and GIFT code: written here with their keys, loaded, and held to their
formulas."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from genft_modules import FusedGenLinear, load_released
from tests.support.cases import DEVICE, bert, gpt2, llama, logits

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of tensors that are not loaded

K = 32  # in features of the adapted layers
PREFIX = "base_model.model."
ATTENTION = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj", "v_proj")]


def drawn(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape)


def added(model: nn.Module, updates: dict[str, torch.Tensor]) -> nn.Module:
    """The model with each ΔW added to its layer's weight."""
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += update.to(DEVICE, torch.float32)
    return model


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.detach().cpu().double()


# ---- WeGeFT: a folder of a patched peft

PEFT = {
    "auto_mapping": None,
    "base_model_name_or_path": "somebody/llama",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_wegeft_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "WeGeFT",
    "r": 3,
    "rank_pattern": {},
    "alpha_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "transform_dim": {"q_proj": "input", "k_proj": "input", "v_proj": "input"},
    "wegeft_alpha": 6,
    "wegeft_dropout": 0.0,
}


def wegeft_folder(folder, pairs: dict[str, int], others=(), **settings) -> dict[str, torch.Tensor]:
    """As the released code saves it: one pair of the given rank under each of these layers."""
    torch.manual_seed(1)
    tensors = {
        f"{PREFIX}{name}.wegeft_{side}.weight": drawn(r, K) for name, r in pairs.items() for side in ("phi", "psi")
    }
    tensors |= dict(others)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT, **settings}))
    return tensors


def by_type(name: str) -> str:
    return ATTENTION[0].replace("q_proj", name.rpartition(".")[2])


# settings; the layer whose name the pair of a layer has; r and α of a layer; tied_modules of ours
WEGEFT = {
    "published": (
        {"tied_modules": [[rf"model.layers.\d+.self_attn.{name}_proj"] for name in "qkv"]},
        by_type,
        lambda name: (3, 6),
        "type",
    ),
    "nothing tied": (
        {"tied_modules": [["q_proj"], ["k_proj"], ["v_proj"]]},
        lambda name: name,
        lambda name: (3, 6),
        None,
    ),
    "tied over types, at the end of the name": (
        {"tied_modules": [[r".*q_proj", r".*k_proj"], [r".*v_proj"]]},
        lambda name: by_type(name).replace("k_proj", "q_proj"),
        lambda name: (3, 6),
        [[r".*q_proj", r".*k_proj"], [r".*v_proj"]],
    ),
    "tied by the beginning of the name": (
        {"tied_modules": [[r"model.layers.0"]]},
        lambda name: ATTENTION[0] if ".0." in name else name,
        lambda name: (3, 6),
        [[f"^{re.escape(name)}" for name in ATTENTION[:3]]],
    ),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "k_proj": 9, ATTENTION[2]: 7}},
        lambda name: name,
        lambda name: (2, 5) if "q_proj" in name else (3, 7) if name == ATTENTION[2] else (3, 6),
        None,
    ),
}


@pytest.mark.parametrize("case", WEGEFT)
def test_a_wegeft_folder_gives_the_released_outputs(case, tmp_path):
    settings, owner, sizes, tied = WEGEFT[case]
    tensors = wegeft_folder(tmp_path / "released", {owner(name): sizes(name)[0] for name in ATTENTION}, **settings)
    plain, updates = llama(), {}
    for name in ATTENTION:
        r, alpha = sizes(name)
        phi, psi = (tensors[f"{PREFIX}{owner(name)}.wegeft_{side}.weight"].double() for side in ("phi", "psi"))
        updates[name] = alpha / r * (weight(plain, name) @ phi.T) @ psi
    want = logits(added(plain, updates))
    model = load_released(llama(), tmp_path / "released")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].tied_modules == tied
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(model))


def test_a_wegeft_folder_with_a_head_and_a_torch_file(tmp_path):
    head = {f"{PREFIX}classifier.weight": drawn(3, K), f"{PREFIX}classifier.bias": drawn(3)}
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    settings = {"target_modules": ["query"], "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    tensors = wegeft_folder(tmp_path, {names[0]: 3}, head, **settings, tied_modules=[["bert.*query"]])
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    model = load_released(bert(), tmp_path, adapter_name="mine", is_trainable=True, settings={"wegeft_dropout": 0.1})
    assert model.peft_config["mine"].wegeft_dropout == 0.1
    assert torch.equal(model.classifier.modules_to_save["mine"].bias.cpu(), head[f"{PREFIX}classifier.bias"])
    assert {n for n, m in model.get_base_model().named_modules() if isinstance(m, FusedGenLinear)} == set(names)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 4


# ---- GIFT: torch files with the state of a wrapper

SIGMOID = torch.sigmoid


def linear(tensors, name, x):
    bias = tensors.get(f"{name}.bias")
    return F.linear(x, tensors[f"{name}.weight"].double(), None if bias is None else bias.double())


def gift_update(tensors, key: str, w: torch.Tensor, h) -> torch.Tensor:
    return linear(tensors, f"out_projections.{key}", h(linear(tensors, f"in_projections.{key}", w)))


def projections(key: str, r: int = 4, bias: bool = False) -> dict[str, torch.Tensor]:
    shapes = {f"in_projections.{key}.weight": (r, K), f"out_projections.{key}.weight": (K, r)}
    if bias:
        shapes |= {f"in_projections.{key}.bias": (r,), f"out_projections.{key}.bias": (K,)}
    return {name: drawn(*shape) for name, shape in shapes.items()}


def mlp(key: str) -> dict[str, torch.Tensor]:
    shapes = {"fc1.weight": (8, 4), "fc1.bias": (8,), "fc2.weight": (4, 8), "fc2.bias": (4,)}
    return {f"hypernets.{key}.blocks.0.mlp.{name}": drawn(*shape) for name, shape in shapes.items()}


# gift_parameters of the released config; h with the tensors of a key
BLOCKS = {
    "identity": ({"block_type": "simple_block", "act_layer": "identity"}, lambda t, key: lambda w: w),
    "sigmoid": ({"block_type": "simple_block", "act_layer": "sigmoid"}, lambda t, key: SIGMOID),
    "standard_sigmoid": ({"block_type": "simple_block", "act_layer": "standard_sigmoid"}, lambda t, key: SIGMOID),
    "hsigmoid": ({"block_type": "simple_block", "act_layer": "hsigmoid"}, lambda t, key: lambda w: F.relu6(w + 3) / 6),
    "mlp": (
        {"block_type": "mlp", "num_blocks": 1, "mlp_ratio": 2.0, "drop_path": 0.1, "norm_layer": "l2"},
        lambda t, key: (
            lambda w: (
                w
                + linear(
                    t,
                    f"hypernets.{key}.blocks.0.mlp.fc2",
                    F.gelu(linear(t, f"hypernets.{key}.blocks.0.mlp.fc1", F.normalize(w, dim=-1))),
                )
            )
        ),
    ),
}


def gift_folder(folder, gift_parameters, keys=("q_proj", "v_proj"), bias=False, **settings) -> dict[str, torch.Tensor]:
    """As the language models' script saves it."""
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for key in keys:
        tensors |= projections(key, bias=bias) | (mlp(key) if gift_parameters["block_type"] == "mlp" else {})
    (folder / "config").mkdir(parents=True)
    config = {"rank": 4, "dtype": "float32", "gift_parameters": gift_parameters, "model_type": "gift"}
    config |= {"target_modules": ["q_proj", "v_proj"], "enable_gift": None, "share_projections": len(keys) == 1}
    (folder / "config" / "config.json").write_text(json.dumps({**config, **settings}))
    torch.save(tensors, folder / "checkpoint.pth")
    return tensors


@pytest.mark.parametrize(
    ("block", "keys", "bias"),
    [
        ("identity", ("q_proj", "v_proj"), False),
        ("sigmoid", ("q_proj", "v_proj"), True),
        ("standard_sigmoid", ("q_proj", "v_proj"), False),
        ("hsigmoid", ("q_proj", "v_proj"), False),
        ("mlp", ("q_proj", "v_proj"), False),
        ("mlp", ("shared_projection",), False),
    ],
)
def test_a_gift_folder_gives_the_released_outputs(block, keys, bias, tmp_path):
    parameters, h = BLOCKS[block]
    tensors = gift_folder(tmp_path / "released", parameters, keys, bias)
    plain, updates = llama(), {}
    for name in ATTENTION:
        kind = name.rpartition(".")[2]
        if kind != "k_proj":
            key = kind if kind in keys else keys[0]
            updates[name] = gift_update(tensors, key, weight(plain, name), h(tensors, key))
    want = logits(added(plain, updates))
    model = load_released(llama(), tmp_path / "released")
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "ours")), logits(model))


@pytest.mark.parametrize("options", ["in the file", "beside it", "beside it, of WeGeFT", "given"])
def test_a_gift_checkpoint_of_an_image_model(options, tmp_path):
    """timm's checkpoints contain the script's options; the head is the wrapper's backbone's."""
    torch.manual_seed(1)
    head = {"weight": drawn(3, K), "bias": drawn(3)}
    tensors = projections("attention:output:dense") | {f"backbone.head.{name}": tensor for name, tensor in head.items()}
    given = {
        "hypernet_embed_dim": 4,
        "hypernet_target_modules": ["attention:output:dense"],
        "hypernet_block_num_heads": 1,
    }
    given |= {"hypernet_block_block_type": "simple_block", "hypernet_block_drop_path": 0.0, "lr": 0.1}
    content = {"epoch": 99, "arch": "vit", "state_dict": tensors, "optimizer": {"state": {}}, "metric": 99.2}
    if options == "in the file":
        content["args"] = argparse.Namespace(**given)
    elif options != "given":
        method = "wegeft" if "WeGeFT" in options else "gift"
        now = {name.replace("hypernet", method): value for name, value in given.items()}
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(now | {f"{method}_block_act_layer": "identity"}))
    torch.save(content, tmp_path / "last.pth.tar")
    settings = {"gift_parameters": {"block_type": "simple_block"}} if options == "given" else None
    plain = bert()
    names = [f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)]
    with torch.no_grad():
        plain.classifier.load_state_dict(head)
    updates = {name: gift_update(tensors, "attention:output:dense", weight(plain, name), lambda w: w) for name in names}
    want = logits(added(plain, updates))
    model = load_released(
        bert(),
        tmp_path,
        rename={"head": "classifier"},
        settings=settings,
    )
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_a_pair_for_two_parts_of_a_fused_weight(tmp_path):
    block = {"block_type": "simple_block", "act_layer": "gelu"}
    fused = {"qkv": [True, False, True]}
    tensors = gift_folder(tmp_path, block, ("shared_projection",), target_modules=["qkv"], enable_gift=fused)
    config = tmp_path / "config" / "config.json"
    text = config.read_text().replace("gift_parameters", "wegeft_parameters").replace("enable_gift", "enable_wegeft")
    config.write_text(text)  # as of the WeGeFT code
    net = nn.ModuleDict({"block": nn.ModuleDict({"qkv": nn.Linear(K, 3 * K)})}).to(DEVICE)
    thirds = weight(net, "block.qkv").chunk(3)
    parts = [gift_update(tensors, "shared_projection", thirds[i], F.gelu) for i in (0, 2)]
    layer = load_released(net, tmp_path).get_base_model().block.qkv
    want = torch.cat([parts[0], torch.zeros(K, K), parts[1]])
    torch.testing.assert_close(layer.get_delta_weight().cpu().double(), want, rtol=1e-4, atol=1e-5)


# ---- refusals

SIMPLE = BLOCKS["identity"][0]
PAIR = {ATTENTION[0]: 3, ATTENTION[3]: 3}
Q = {"target_modules": ["q_proj"]}


def gift_with(folder, **tensors):
    changed = gift_folder(folder, SIMPLE) | tensors
    torch.save({key: tensor for key, tensor in changed.items() if tensor is not None}, folder / "checkpoint.pth")


REFUSED = {
    "wegeft: a key": (
        r"unknown keys \['base_model.model.x.wegeft_mask'\]",
        lambda f: wegeft_folder(f, PAIR, {f"{PREFIX}x.wegeft_mask": drawn(2)}, **Q),
        llama,
    ),
    "wegeft: half a pair": (
        rf"keys \['{ATTENTION[2]}.wegeft_psi.weight'\] are missing",
        lambda f: wegeft_folder(f, PAIR, {f"{PREFIX}{ATTENTION[2]}.wegeft_phi.weight": drawn(3, K)}, **Q),
        llama,
    ),
    "wegeft: a layer without a pair": (
        rf"missing: \['{ATTENTION[3]}.wegeft_phi.weight and wegeft_psi.weight'\]",
        lambda f: wegeft_folder(f, {ATTENTION[0]: 3}, **Q),
        llama,
    ),
    "wegeft: the pair of another layer": (
        rf"unknown: \['{ATTENTION[3]}.wegeft_phi.*missing: \['{ATTENTION[0]}.wegeft_phi",
        lambda f: wegeft_folder(f, {ATTENTION[3]: 3}, **Q, tied_modules=[["model.*q_proj"]]),
        llama,
    ),
    "wegeft: rank": (
        r"shape mismatch: .*wegeft_phi.weight: got \(3, 32\), expected \(5, 32\)",
        lambda f: wegeft_folder(f, PAIR, **Q, r=5),
        llama,
    ),
    "wegeft: a setting": (r"unknown settings \['dora'\]", lambda f: wegeft_folder(f, PAIR, **Q, dora=True), llama),
    "wegeft: no rank": (r"settings: \['r'\] are missing", lambda f: wegeft_folder(f, PAIR, **Q, r=None), llama),
    "wegeft: the other side": (
        "transform_dim: got 'output'",
        lambda f: wegeft_folder(f, PAIR, **Q, transform_dim={"q_proj": "output"}),
        llama,
    ),
    "wegeft: fan_in_fan_out": (
        "fan_in_fan_out: got True",
        lambda f: wegeft_folder(f, PAIR, fan_in_fan_out=True),
        llama,
    ),
    "wegeft: Conv1D": (
        "are Conv1D",
        lambda f: wegeft_folder(f, {"transformer.h.0.attn.c_proj": 3}, target_modules=["h.0.attn.c_proj"]),
        gpt2,
    ),
    "wegeft: groups": ("tied_modules: got 'type'", lambda f: wegeft_folder(f, PAIR, **Q, tied_modules="type"), llama),
    "wegeft: a slow group": (
        "could take very long to match",
        lambda f: wegeft_folder(f, PAIR, **Q, tied_modules=[["(([a-z.0-9_]+)*)*!"]]),
        llama,
    ),
    "wegeft: trained biases, which it does not save": (
        r"missing: \['base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias",
        lambda f: wegeft_folder(
            f,
            {f"bert.encoder.layer.{i}.attention.self.query": 3 for i in (0, 1)},
            target_modules=["query"],
            bias="wegeft_only",
            task_type=None,
        ),
        bert,
    ),
    "gift: no names": (
        "expected tensors with names",
        lambda f: (gift_folder(f, SIMPLE), torch.save([drawn(2)], f / "checkpoint.pth")),
        llama,
    ),
    "gift: no tensor": ("unknown keys", lambda f: gift_with(f, **{"in_projections.q_proj.weight": 3}), llama),
    "gift: no dimensions": (
        "r: got 0",
        lambda f: gift_with(f, **{"in_projections.q_proj.weight": torch.tensor(1.0)}),
        llama,
    ),
    "gift: no target": ("target_modules", lambda f: gift_folder(f, SIMPLE, target_modules=[3]), llama),
    "gift: a key": ("unknown keys", lambda f: gift_with(f, extra=drawn(2)), llama),
    "gift: a half": (
        r"keys \['out_projections.q_proj'\] are missing",
        lambda f: gift_with(f, **{"out_projections.q_proj.weight": None}),
        llama,
    ),
    "gift: a bias of one": (
        "unknown: .'v_proj: phi_bias'",
        lambda f: gift_with(f, **{"in_projections.v_proj.bias": drawn(4)}),
        llama,
    ),
    "gift: a block's tensors": (
        r"q_proj: block.blocks.0.mlp.fc1.bias",
        lambda f: gift_with(f, **mlp("q_proj")),
        llama,
    ),
    "gift: shape": (
        r"q_proj: psi: got \(7, 4\), expected \(32, 4\)",
        lambda f: gift_with(f, **{"out_projections.q_proj.weight": drawn(7, 4)}),
        llama,
    ),
    "gift: layers that the model lacks": ("q_proj", lambda f: gift_folder(f, SIMPLE), bert),
    "gift: a target without a pair": (
        r"got the pairs \['q_proj', 'v_proj'\] for layer model.layers.0.self_attn.k_proj",
        lambda f: gift_folder(f, SIMPLE, target_modules=["q_proj", "k_proj", "v_proj"]),
        llama,
    ),
    "gift: a pair without a layer": (
        r"unknown: \['in_projections.v_proj'\]",
        lambda f: gift_folder(f, SIMPLE, target_modules=["q_proj"]),
        llama,
    ),
    "gift: pairs of one last name": (
        "pairs for 'self_attn:q_proj' and 'mlp:q_proj'",
        lambda f: gift_folder(f, SIMPLE, ("self_attn:q_proj", "mlp:q_proj"), target_modules=None),
        lambda: nn.ModuleDict({n: nn.ModuleDict({"q_proj": nn.Linear(K, K)}) for n in ("self_attn", "mlp")}),
    ),
    "gift: no options": (
        "settings: gift_parameters: got None",
        lambda f: (gift_folder(f, SIMPLE), (f / "config" / "config.json").unlink()),
        llama,
    ),
    "gift: softmax": (
        "act_layer: got 'softmax'",
        lambda f: gift_folder(f, {"block_type": "simple_block", "act_layer": "softmax"}),
        llama,
    ),
    "gift: a block": (
        "block_type: got 'conv'",
        lambda f: gift_folder(f, {"block_type": "conv"}),
        llama,
    ),
    "gift: clusters": (
        "cluster_activation: got 'softmax'",
        lambda f: gift_folder(f, {"block_type": "pamcat_transformer", "cluster_activation": "softmax"}),
        llama,
    ),
    "gift: an option": (
        r"gift_parameters: got \['depth'\] for 'simple_block'",
        lambda f: gift_folder(f, {"block_type": "simple_block", "depth": 2}),
        llama,
    ),
    "gift: fused parts with a pair each": (
        "enable_gift without share_projections",
        lambda f: gift_folder(f, SIMPLE, enable_gift={"qkv": [True, False, True]}),
        llama,
    ),
    "gift: shared by whom": (
        "target_modules: got None",
        lambda f: gift_folder(f, SIMPLE, ("shared_projection",), target_modules=None),
        llama,
    ),
    "gift: a head that the model lacks": (
        r"the model has no modules \['head'\]; see the argument rename",
        lambda f: gift_with(f, **{"backbone.head.weight": drawn(2)}),
        llama,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_map_and_leaves_the_layers_alone(case, tmp_path):
    message, write, make = REFUSED[case]
    write(tmp_path / "released")
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        load_released(model, tmp_path / "released")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
