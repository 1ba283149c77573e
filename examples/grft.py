"""GRFT: train a few rows of each weight, selected by their gradients, with a penalty on their change."""

import torch
from peft import get_peft_model
from tiny import batches, tiny_data, tiny_llama
from transformers import Trainer, TrainingArguments

from genft_modules import (
    GRFTConfig,
    PenaltyMixin,
    grft_penalty,
    load_adapter,
    needs_slices,
    save_adapter,
    select_slices,
)


class PenalisedTrainer(PenaltyMixin, Trainer):
    """Adds λ·‖ΔW‖² to the loss."""


config = GRFTConfig(k=8, target_modules=["q_proj", "v_proj", "down_proj"], penalty=1e-2, penalty_modules=["down_proj"])
model = get_peft_model(tiny_llama(), config)
assert needs_slices(model)  # the adapter can be neither applied nor saved yet

data = tiny_data()
chosen = select_slices(model, batches(data)[:4], progressbar=False)  # by the gradients of the base model
for name, rows in chosen.items():
    print(f"{name}: rows {rows.tolist()}")

arguments = TrainingArguments(
    "grft-run", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=10, report_to=[]
)
PenalisedTrainer(model, arguments, train_dataset=data).train()
print(f"penalty after training: {grft_penalty(model).item():.4f}")

save_adapter(model, "grft-adapter")  # V and the indices
loaded = load_adapter(tiny_llama(), "grft-adapter").to(model.device)
input_ids = data[0]["input_ids"][None].to(model.device)
with torch.no_grad():
    torch.testing.assert_close(loaded(input_ids).logits, model.eval()(input_ids).logits)
layer = loaded.get_submodule(f"base_model.model.{name}")
changed = layer.get_delta_weight().abs().sum(1).nonzero().flatten()
assert changed.tolist() == rows.tolist()
print("saved and loaded: the same logits; ΔW is zero except for the selected rows")
