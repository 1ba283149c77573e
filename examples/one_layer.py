"""Replace single layers of a PyTorch model, without `get_peft_model`."""

import torch
from torch import nn

from genft_modules import FusedGenLinear, GenFTConfig, WeGeFTConfig

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
x = torch.randn(8, 32)
base = model(x).detach()
original = model[0].weight.clone()

gelu = GenFTConfig(generator_share_dim=4, individual_features=2, inner_activation="gelu", outer_activation="gelu")
model[0] = FusedGenLinear.from_linear(model[0], WeGeFTConfig(r=4))
model[2] = FusedGenLinear.from_linear(model[2], gelu)  # full-rank ΔW, generated tile by tile
torch.testing.assert_close(model(x), base)  # ΔW = 0 before training
print({name: tuple(parameter.shape) for name, parameter in model[0].adapter_parameters().items()})

target = torch.randn(8, 16)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(20):
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
assert losses[-1] < losses[0]

with torch.no_grad():
    want = model(x)
    for layer in (model[0], model[2]):
        layer.merge()
    torch.testing.assert_close(model(x), want)
    for layer in (model[0], model[2]):
        layer.unmerge()
assert torch.equal(model[0].base_layer.weight, original)  # restored exactly
ranks = [int(torch.linalg.matrix_rank(layer.get_delta_weight())) for layer in (model[0], model[2])]
print(f"rank of ΔW: {ranks[0]} for WeGeFT with r = 4, {ranks[1]} for GenFT with r = 4 + 2")
assert ranks[0] == 4 < 6 < ranks[1]
