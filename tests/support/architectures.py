"""The architectures that people adapt, built small from their configs: a model, the layers to adapt, a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.support.cases import IDS, bert, gpt2, llama, seeded
from tests.support.device import DEVICE

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def qwen2() -> nn.Module:
    """Biases on q, k and v; embeddings tied to the head."""
    config = Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    return seeded(lambda: Qwen2ForCausalLM(config))


def roberta() -> nn.Module:
    config = RobertaConfig(**SMALL, num_labels=3, max_position_embeddings=32)
    return seeded(lambda: RobertaForSequenceClassification(config))


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return seeded(lambda: T5ForConditionalGeneration(config))


def vit() -> nn.Module:
    sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return seeded(lambda: ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)))


def whisper() -> nn.Module:
    config = WhisperConfig(
        vocab_size=61,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return seeded(lambda: WhisperForConditionalGeneration(config))


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], nn.Module]
    targets: list[str]
    batch: dict[str, torch.Tensor]

    def make(self) -> nn.Module:
        """The model, with weights of the size that trained ones have: with those that transformers starts from, models
        this small hardly look at their input, and no adapter shows in what they say."""
        model = self.build()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                    parameter.copy_(values)
        return model

    def output(self, model: nn.Module) -> Any:
        """The model's output on the batch, whose floats get the model's dtype."""
        dtype = next(parameter.dtype for parameter in model.parameters())
        return model(
            **{key: value.to(dtype) if value.is_floating_point() else value for key, value in self.batch.items()}
        )

    def logits(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return self.output(model).logits


TOKENS = {"input_ids": IDS}
ENCODED = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16, device=DEVICE).sin().reshape(2, 3, 16, 16)}
SOUNDS = {
    "input_features": torch.linspace(-9, 9, 2 * 8 * 16, device=DEVICE).cos().reshape(2, 8, 16),
    "decoder_input_ids": IDS[:, :5],
}

ARCHITECTURES = {
    "llama": Architecture(llama, ["q_proj", "k_proj", "down_proj"], TOKENS),
    "qwen2": Architecture(qwen2, ["q_proj", "v_proj", "up_proj"], TOKENS),
    "gpt2": Architecture(gpt2, ["c_attn", "c_proj"], TOKENS),  # Conv1D; two layers called c_proj, K = 32 and K = 128
    "bert": Architecture(bert, ["query", "dense"], TOKENS),
    "roberta": Architecture(roberta, ["query", "value"], TOKENS),
    "t5": Architecture(t5, ["q", "v", "wo"], ENCODED),
    "vit": Architecture(vit, ["q_proj", "v_proj", "fc1"], IMAGES),
    "whisper": Architecture(whisper, ["q_proj", "v_proj", "fc2"], SOUNDS),
}


def unet() -> nn.Module:
    """Of diffusers, which has to be installed."""
    from diffusers import UNet2DConditionModel

    return seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
