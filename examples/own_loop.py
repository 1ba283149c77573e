"""A custom training loop: pass only the adapter's parameters to the optimizer."""

import torch
from peft import get_peft_model
from tiny import batches, tiny_data, tiny_llama

from genft_modules import GIFTConfig

torch.manual_seed(1)
config = GIFTConfig(r=8, block="mlp", target_modules=["q_proj", "v_proj", "down_proj"])  # ΔW = h(W0 φᵀ) ψᵀ
model = get_peft_model(tiny_llama(), config).train()

trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
assert all("genft_" in name for name in trained)
optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)

losses = []
for _ in range(3):
    for batch in batches(tiny_data()):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(f"{len(losses)} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}")
assert losses[-1] < losses[0]
