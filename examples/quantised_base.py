"""Adapters on quantised layers.

With a quantisation package supported by transformers, load the quantised model and adapt it as any other:

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model = get_peft_model(model, WeGeFTConfig(r=64, wegeft_alpha=128))

To run without such a package, this example defines a quantised layer itself, with in_features, out_features, a packed
weight `qweight`, and `dequantize` for methods that read W0.
"""

import torch
from peft import get_peft_model
from tiny import batches, tiny_data, tiny_llama
from torch import nn

from genft_modules import GenFTConfig, WeGeFTConfig


class Int8Linear(nn.Module):
    """Int8 weights with a scale per row."""

    reads = 0

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def dequantize(self) -> torch.Tensor:
        Int8Linear.reads += 1
        return self.qweight * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight * self.scales).to(x.dtype).t()


def quantised_llama() -> nn.Module:
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, Int8Linear(module))
    return model


targets = ["q_proj", "v_proj", "down_proj"]
for config in (
    WeGeFTConfig(r=8, wegeft_alpha=16, target_modules=targets),  # edits the input: does not read W0
    GenFTConfig(generator_share_dim=6, individual_features=2, target_modules=targets),  # reads W0 in each pass
):
    Int8Linear.reads = 0
    torch.manual_seed(1)
    model = get_peft_model(quantised_llama(), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in batches(tiny_data()):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{config.method}: loss {losses[0]:.3f} → {losses[-1]:.3f}, W0 dequantised {Int8Linear.reads} times")
    assert losses[-1] < losses[0]
    assert (Int8Linear.reads == 0) == (config.method == "wegeft")
