"""The methods with their options, and models of a few thousand parameters to put them into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from genft_modules import (
    METHODS,
    GeneratorConfig,
    GenFTConfig,
    GIFTConfig,
    GRFTConfig,
    HiRAConfig,
    LoRAConfig,
    PeanutConfig,
    SaSConfig,
    WeGeFTConfig,
)
from tests.support import device
from tests.support.device import DEVICE


def genft(inner: str, outer: str, **kw: Any) -> GenFTConfig:
    fields = {"generator_share_dim": 3, "individual_features": 2, "inner_activation": inner, "outer_activation": outer}
    return GenFTConfig(**{**fields, **kw})


# name → config of rank 4 (GenFT: 3 + 2) with the given further fields
CASES: dict[str, Callable[..., GeneratorConfig]] = {
    "wegeft": lambda **kw: WeGeFTConfig(r=4, wegeft_alpha=6, **kw),
    "wegeft_own": lambda **kw: WeGeFTConfig(r=4, tied_modules=None, **kw),
    "wegeft_halves": lambda **kw: WeGeFTConfig(r=4, enable_wegeft={".*": [False, True]}, **kw),
    "gift": lambda **kw: GIFTConfig(r=4, **kw),
    "gift_gelu": lambda **kw: GIFTConfig(r=4, block_kwargs={"act_layer": "gelu"}, **kw),
    "gift_sigmoid_biases": lambda **kw: GIFTConfig(
        r=4, block_kwargs={"act_layer": "sigmoid"}, in_projection_bias=True, out_projection_bias=True, **kw
    ),
    "gift_mlp": lambda **kw: GIFTConfig(r=4, block="mlp", block_kwargs={"norm_layer": "ln", "num_blocks": 2}, **kw),
    "gift_mlp_mixer": lambda **kw: GIFTConfig(r=4, block="mlp_mixer", **kw),
    "gift_transformer": lambda **kw: GIFTConfig(r=4, block="transformer", block_kwargs={"num_heads": 2}, **kw),
    "gift_pamcat_attn": lambda **kw: GIFTConfig(r=4, block="pamcat_attn", **kw),
    "gift_pamcat_transformer": lambda **kw: GIFTConfig(r=4, block="pamcat_transformer", **kw),
    "lora": lambda **kw: LoRAConfig(r=4, lora_alpha=6, **kw),
    "peanut": lambda **kw: PeanutConfig(r=4, depth=2, act_fn="silu", scaling=0.7, **kw),
    "hira": lambda **kw: HiRAConfig(r=4, **kw),
    "sas": lambda **kw: SaSConfig(
        **{"r_shared": 2, "r_specific": 2, "embedding_dim": 3, "hidden_dim": 5, "chunk_dim": 4, "scaling": 0.7, **kw}
    ),
    "grft": lambda **kw: GRFTConfig(k=4, selection="random", **kw),
    "grft_column": lambda **kw: GRFTConfig(k=4, orientation="column", selection="random", **kw),
    "lora_halves": lambda **kw: LoRAConfig(r=3, enable_lora={".*": [True, True]}, **kw),
    "genft": lambda **kw: genft("none", "none", **kw),
    "genft_gelu": lambda **kw: genft("gelu", "gelu", **kw),
    "genft_vit": lambda **kw: genft(
        "none", "leakyrelu", **{"ratio_W0": 1.4, "ratio_on": "factors", "generator_bias": False, **kw}
    ),
    "genft_column": lambda **kw: genft("relu", "tanh", stages="column", **kw),
    "genft_row": lambda **kw: genft("tanh", "none", stages="row", **kw),
}
# one per way of keeping and applying parameters: shared edit, own edit, shared low rank with a block, own low rank,
# low rank that is partly shared, generated, low rank from parameters in lists, low rank by a shared network, slices
# with their indices
KINDS = ("wegeft", "wegeft_own", "gift_mlp", "lora", "genft", "genft_gelu", "peanut", "sas", "grft")
REPRESENTATIVES = tuple(dict.fromkeys((*METHODS, *KINDS)))  # and every method: for tests too dear to run with all cases

# the methods that drop something, by the field that says how much
DROPS = {
    "wegeft": "wegeft_dropout",
    "lora": "lora_dropout",
    "hira": "hira_dropout",
    "genft": "drop",
    "genft_gelu": "drop",
}

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "Linear": nn.Linear,
    "Linear_no_bias": lambda k, n: nn.Linear(k, n, bias=False),
    "Conv1D": lambda k, n: Conv1D(n, k),
}


def llama(**kw: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **kw,
    )
    return seeded(lambda: LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return seeded(lambda: BertForSequenceClassification(config))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "k_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),  # two layers called c_proj, with K = 32 and K = 128
    "bert": (bert, ["query", "dense"]),
}

IDS = torch.arange(18, device=DEVICE).reshape(2, 9) * 7 % 61


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def randomize(module: nn.Module, seed: int = 1, std: float = 0.1) -> nn.Module:
    """Gives every trainable parameter another value, so that ΔW is not zero."""
    device.seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return module


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    device.seed(0)
    return make().to(DEVICE).eval()
