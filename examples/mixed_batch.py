"""Mixed batches: a different adapter per sample with peft's `adapter_names`, in one grouped operation per layer."""

import torch
from peft import get_peft_model
from tiny import batches, tiny_data, tiny_llama

from genft_modules import LoRAConfig


def trained_on(step: int) -> None:
    """Train the active adapter to count in steps of `step`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for batch in batches(tiny_data(step=step), size=16):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


model = get_peft_model(tiny_llama(), LoRAConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]), "fives").train()
trained_on(5)
model.add_adapter("sevens", LoRAConfig(r=4, target_modules=["down_proj", "up_proj"]))  # other layers and rank
model.set_adapter("sevens")
trained_on(7)
model.eval()

input_ids = torch.stack([row["input_ids"] for row in tiny_data(rows=3)])
names = ["fives", "__base__", "sevens"]  # "__base__": no adapter
with torch.no_grad():
    mixed = model(input_ids=input_ids, adapter_names=names).logits
    for i, name in enumerate(names):  # the same result as sample by sample
        if name == "__base__":
            with model.disable_adapter():
                alone = model(input_ids=input_ids[i : i + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(input_ids=input_ids[i : i + 1]).logits
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-4)
tokens = model.generate(
    input_ids=input_ids,
    attention_mask=torch.ones_like(input_ids),
    adapter_names=names,
    max_new_tokens=4,
    do_sample=False,
    pad_token_id=0,
)
for name, row in zip(names, tokens, strict=True):
    print(f"{name:>8}: {row[-6:].tolist()}")
