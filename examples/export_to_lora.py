"""Export adapters to LoRA for peft: exact if ΔW has low rank, else with a given maximum error."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama

from genft_modules import GenFTConfig, WeGeFTConfig, export_lora

input_ids = torch.arange(12)[None]
targets = ["q_proj", "v_proj"]
adapters = {
    "wegeft": (WeGeFTConfig(r=8, target_modules=targets), {}),
    "genft": (
        GenFTConfig(
            generator_share_dim=6,
            individual_features=2,
            inner_activation="gelu",
            outer_activation="gelu",
            target_modules=targets,
        ),
        {"max_error": 0.01},  # full rank: truncated SVD with at most this error per layer
    ),
}
for name, (config, how) in adapters.items():
    model = get_peft_model(tiny_llama(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # random values instead of training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
        want = model(input_ids).logits
    layers = export_lora(model, f"{name}-as-lora", **how)
    for layer in layers:
        print(
            f"{name:>7} {layer.name}: rank {layer.rank}, {'exact' if layer.exact else 'truncated'}, {layer.error:.1e}"
        )
    assert all(layer.error <= how.get("max_error", 1e-5) for layer in layers)

    # The rest does not need genft: it is a LoRA adapter of peft.
    served = PeftModel.from_pretrained(tiny_llama(), f"{name}-as-lora").eval()
    assert type(served.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        difference = float((served(input_ids).logits - want).abs().max() / want.abs().max())
    print(f"{name:>7} maximum difference of the logits: {difference:.1e} of the largest logit")
    assert difference < (1e-4 if name == "wegeft" else 0.05)
