"""Fine-tune an adapter with transformers' Trainer, then save, load and merge it."""

import torch
from peft import get_peft_model
from tiny import tiny_data, tiny_llama
from transformers import Trainer, TrainingArguments

from genft_modules import WeGeFTConfig, load_adapter, save_adapter

config = WeGeFTConfig(r=8, wegeft_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
model = get_peft_model(tiny_llama(), config)
model.print_trainable_parameters()  # one pair (φ, ψ) per module type, shared across layers

data = tiny_data()
arguments = TrainingArguments(
    "trainer-run", max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=10, report_to=[]
)
trainer = Trainer(model, arguments, train_dataset=data)
before = trainer.evaluate(data[:8])["eval_loss"]
trainer.train()
after = trainer.evaluate(data[:8])["eval_loss"]
print(f"loss {before:.3f} → {after:.3f}")
assert after < before

save_adapter(model, "trainer-adapter")  # adapter_config.json and adapter_model.safetensors
loaded = load_adapter(tiny_llama(), "trainer-adapter")
input_ids = data[0]["input_ids"][None].to(model.device)
with torch.no_grad():
    want = model.eval()(input_ids).logits
    torch.testing.assert_close(loaded.to(model.device)(input_ids).logits, want)
    merged = loaded.merge_and_unload()  # a plain transformers model
    torch.testing.assert_close(merged(input_ids).logits, want, rtol=1e-4, atol=1e-4)
print("saved, loaded and merged: the same logits")
