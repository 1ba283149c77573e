"""TRL's SFTTrainer with our configs."""

from __future__ import annotations

import datasets
import pytest
import torch
import trl
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.cases import CASES, llama, logits


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = "<>abcdefghijklmnopqrstuvwxyz .,"
    core = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=">", pad_token="<", unk_token="<")


@pytest.mark.parametrize("case", ["wegeft", "gift_mlp", "genft_gelu", "grft"])  # one per form
def test_sft(case, tmp_path):
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        max_length=12,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_steps=3,
    )
    data = datasets.Dataset.from_dict(
        {"text": ["a small model.", "learns a line.", "and another, too.", "that is all."]}
    )
    model = llama()
    start = logits(model)
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=CASES[case](target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("genft_" in name for name in trained)
    trainer.train()
    found = logits(trainer.model.eval())
    assert not torch.allclose(found, start)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3")
    torch.testing.assert_close(logits(loaded), found)
    with trainer.model.disable_adapter():
        torch.testing.assert_close(logits(trainer.model), start)
