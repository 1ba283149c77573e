"""Models of one layer with stacked experts, and the same with every W_e + ΔW_e written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from genft_modules import FusedGenExperts, GeneratorConfig
from tests.support.cases import randomize, seeded
from tests.support.device import DEVICE

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(18, device=DEVICE).reshape(2, 9) * 7 % 61
SIZES = {
    "vocab_size": 61,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
}
SMALL = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
LATENT = {f"{name}_dim": 8 for name in ("qk_rope_head", "qk_nope_head", "v_head")} | {
    f"{name}_lora_rank": 8 for name in ("q", "kv")
}

# name → a model of one layer with 4 experts, gate_up [48, 16] and down [16, 24]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4)),
    "qwen2": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SMALL,
            intermediate_size=20,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts=4,
        )
    ),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, intermediate_size=20, moe_intermediate_size=24, num_experts=4)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_key_value_heads=1, intermediate_size=24, num_experts=4)),
    "deepseek": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES,
            **LATENT,
            num_key_value_heads=2,
            intermediate_size=20,
            moe_intermediate_size=24,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, intermediate_size=24, num_local_experts=4)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**SMALL, intermediate_size=24, intermediate_size_mlp=20, num_local_experts=4)
    ),
}


def moe(name: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose experts matter: the weights are large, those of the router most."""
    model = seeded(MODELS[name])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "gate.weight" in key or "router" in key else 0.3)
    model.to(dtype)
    if name != "llama4":  # its experts have one way of their own
        model.set_experts_implementation(implementation)
    return model


def adapted(model: nn.Module, config: GeneratorConfig, std: float = 0.3) -> PeftModel:
    """The model with an adapter whose ΔW is not zero, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    found = get_peft_model(model, config).to(dtype)
    randomize(found, std=std)
    return found.eval()


def stacks(model: nn.Module) -> dict[str, FusedGenExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedGenExperts)}


def written_out(layer: FusedGenExperts, scale: float, adapter: str = "default") -> dict[str, Tensor]:
    """The parameters W_e + s (W_e φᵀ) ψ of every expert, stacked as the model stores them; differentiable."""
    factors = layer.adapter_parameters(adapter)
    found = {}
    for name in {key.partition(".")[0] for key in factors}:
        phi, psi = factors[f"{name}.phi"], factors[f"{name}.psi"]
        psi = psi if psi.shape == phi.shape else psi.mT  # GIFT's is [K, r]
        stored = getattr(layer.base_layer, name).detach()
        weights = stored.mT if layer.transposed else stored
        each = [
            weight + scale * (weight @ (phi if phi.dim() == 2 else phi[e]).t()) @ (psi if psi.dim() == 2 else psi[e])
            for e, weight in enumerate(weights)
        ]
        found[name] = torch.stack([weight.t() for weight in each] if layer.transposed else each)
    return found


def naive_logits(plain: nn.Module, weights: dict[str, dict[str, Tensor]], **batch: Any) -> Tensor:
    """The logits of `plain` with these parameters in its experts, by module."""
    parameters = {f"{name}.{key}": tensor for name, stack in weights.items() for key, tensor in stack.items()}
    return torch.func.functional_call(plain, parameters, kwargs=batch).logits


def nemotron_experts() -> nn.Module:
    """Experts without a gate."""
    config = NemotronHConfig(hidden_size=16, n_routed_experts=4, moe_intermediate_size=24, num_hidden_layers=1)
    experts = seeded(lambda: NemotronHExperts(config))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts
