"""Adapters inside a module that is not in a `PeftModel`: injected by peft, transformers or diffusers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from genft_modules import LoRAConfig, WeGeFTConfig, check_adapter, load_adapter, restore_adapter, save_adapter
from tests.support.architectures import unet
from tests.support.cases import CASES, DEVICE, KINDS, bert, llama, logits, randomize, seeded

TARGETS = ["q_proj", "down_proj"]


def injected(case: str = "wegeft", name: str = "style", **fields) -> nn.Module:
    model = llama()
    model.add_adapter(CASES[case](target_modules=TARGETS, **fields), adapter_name=name)
    return randomize(model).eval()


@pytest.mark.parametrize("case", KINDS)
def test_saved_from_transformers_and_loaded_in_every_way(case, tmp_path):
    model = injected(case)
    want = logits(model)
    save_adapter(model, tmp_path, "style")
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), want)  # a PeftModel
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), str(tmp_path))), want)
    theirs = llama()
    theirs.load_adapter(str(tmp_path))
    assert torch.equal(logits(theirs), want)
    ours = llama()
    assert load_adapter(ours, tmp_path, in_place=True) is ours
    assert torch.equal(logits(ours), want)
    assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if "genft_" in name)
    fresh = llama()
    fresh.add_adapter(check_adapter(fresh, tmp_path), adapter_name="again")
    restore_adapter(fresh, tmp_path, "again")
    assert torch.equal(logits(fresh), want)


def test_a_second_one_is_added_beside_the_first(tmp_path):
    save_adapter(injected(), tmp_path, "style")
    model = injected("genft", "first")
    first = logits(model)
    assert load_adapter(model, tmp_path, "second", is_trainable=True, in_place=True) is model
    assert torch.equal(logits(model), logits(injected()))  # the active one
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "second" in name)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="'second' already exists"):
        load_adapter(model, tmp_path, "second", in_place=True)
    with pytest.raises(TypeError, match=r"kwargs: got \['low_cpu_mem_usage'\], expected none"):
        load_adapter(model, tmp_path, "third", in_place=True, low_cpu_mem_usage=True)
    with pytest.raises(TypeError, match="in_place: got False for a module with injected adapters, expected True"):
        load_adapter(model, tmp_path, "third")
    with pytest.raises(TypeError, match="in_place: got True for a PeftModel, expected False"):
        load_adapter(load_adapter(llama(), tmp_path), tmp_path, "third", in_place=True)


def test_what_does_not_fit_leaves_a_module_alone(tmp_path):
    save_adapter(injected(), tmp_path, "style")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    model, second = llama(), injected("genft", "first")
    for target, before in ((model, list(model.state_dict())), (second, list(second.state_dict()))):
        with pytest.raises(ValueError, match="shape mismatch"):
            load_adapter(target, tmp_path, "second", in_place=True)
        assert list(target.state_dict()) == before


def test_a_plain_module_with_its_head_and_stock_lora(tmp_path):
    def net() -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)))

    x = torch.randn(3, 4, device=DEVICE)
    for number, config in enumerate(
        (
            WeGeFTConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"]),
            LoRAConfig(r=2, target_modules=["2"], bias="all"),
            LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True),
        )
    ):
        place = tmp_path / str(number)
        model = randomize(inject_adapter_in_model(config, net()), std=0.3)
        save_adapter(model, place)
        saved = json.loads((place / "adapter_config.json").read_text())
        assert saved["auto_mapping"] == {"base_model_class": "Sequential", "parent_library": nn.Sequential.__module__}
        assert saved["inference_mode"]
        assert not model.peft_config["default"].inference_mode
        for loaded in (load_adapter(net(), place), load_adapter(net(), place, in_place=True)):
            assert torch.equal(loaded(x), model(x))


def test_without_adapters_there_is_nothing_to_save(tmp_path):
    for call in (save_adapter, restore_adapter):
        with pytest.raises(
            TypeError, match="model: got BertForSequenceClassification, expected a module with adapters"
        ):
            call(bert(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_name: got 'default', expected one of \['style'\]"):
        save_adapter(injected(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ---- diffusers


def pipeline() -> Any:
    """A pipeline without what makes tensors of words, and images of latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    unused = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, **blocks),
        unet=unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
        **unused,
    ).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> torch.Tensor:
    words = torch.ones(1, 5, 8, device=DEVICE)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    return pipe(prompt_embeds=words, negative_prompt_embeds=-words, latents=start, **options).images


def test_the_round_trip_of_a_pipeline(tmp_path):
    pytest.importorskip("diffusers")
    pipe = pipeline()
    plain = latents(pipe)
    config = WeGeFTConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.unet.add_adapter(config, adapter_name="style")
    randomize(pipe.unet, std=0.3).eval()
    want = latents(pipe)
    assert not torch.allclose(want, plain)
    save_adapter(pipe.unet, tmp_path, "style")
    fresh = pipeline()
    load_adapter(fresh.unet, tmp_path, "style", in_place=True)
    assert type(fresh.unet) is type(pipe.unet)
    assert torch.equal(latents(fresh), want)
    fresh.unet.disable_adapters()  # diffusers' own functions know the adapter
    assert torch.equal(latents(fresh), plain)
    wrapped = pipeline()
    wrapped.unet = load_adapter(wrapped.unet, tmp_path)
    assert torch.equal(latents(wrapped), want)
