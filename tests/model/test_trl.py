"""TRL's trainers with our configs, and an engine that generates with the adapter of a model in training."""

from __future__ import annotations

import datasets
import pytest
import torch
import trl
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from genft_modules import lora_config, lora_state_dict
from tests.support.cases import CASES, llama, logits, randomize


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = "<>abcdefghijklmnopqrstuvwxyz .,:"
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


class Engine(TrainerCallback):
    """Another process's generator: the base model with stock LoRA, which gets the adapter's tensors at each step."""

    def __init__(self, live: PeftModel, adapter_name: str) -> None:
        self.live, self.name, self.logits = live, adapter_name, []
        self.tensors = lora_state_dict(live, adapter_name)
        self.model = get_peft_model(llama().double(), lora_config(live, adapter_name)).eval()
        self.places = {key: tensor.data_ptr() for key, tensor in self.tensors.items()}

    def receive(self) -> None:
        assert lora_state_dict(self.live, self.name, out=self.tensors) is self.tensors
        assert {key: tensor.data_ptr() for key, tensor in self.tensors.items()} == self.places
        loaded = set_peft_model_state_dict(self.model, self.tensors)
        assert not loaded.unexpected_keys
        self.live.set_adapter(self.name)
        training, _ = self.live.training, self.live.eval()
        torch.testing.assert_close(logits(self.model), logits(self.live), rtol=1e-9, atol=1e-9)
        self.live.train(training).set_adapter("default")
        self.logits.append(logits(self.model))

    def on_step_end(self, *args, **kwargs) -> None:
        self.receive()

    def rollout(self, prompts: list[str], trainer: trl.GRPOTrainer) -> dict[str, list]:
        """TRL's `rollout_func`."""
        self.receive()
        words, found = trainer.processing_class, {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for prompt in prompts:
            ids = torch.tensor([words(prompt)["input_ids"]])
            answer = self.model.generate(input_ids=ids, max_new_tokens=5, do_sample=True, eos_token_id=None)
            with torch.no_grad():
                scores = self.model(input_ids=answer).logits.log_softmax(-1)[0, ids.shape[1] - 1 : -1]
            new = answer[0, ids.shape[1] :]
            found["prompt_ids"].append(ids[0].tolist())
            found["completion_ids"].append(new.tolist())
            found["logprobs"].append(scores.gather(1, new[:, None])[:, 0].tolist())
        return found


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_an_engine_has_the_adapter_of_every_step_and_of_the_reference(method, tmp_path):
    live = get_peft_model(llama().double(), CASES["wegeft"](target_modules=["q_proj", "down_proj"]))
    randomize(live)  # trained before: TRL keeps a copy of it, named "ref"
    start = logits(live)
    common = {"max_steps": 2, "learning_rate": 0.01, "beta": 0.1, "report_to": [], "use_cpu": True, "bf16": False}
    common |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "gradient_checkpointing": False}
    engine = Engine(live, "default")
    if method == "dpo":
        data = {"prompt": ["a line: "] * 4, "chosen": ["yes."] * 4, "rejected": ["no."] * 4}
        trainer = trl.DPOTrainer(
            live,
            args=trl.DPOConfig(str(tmp_path), **common),
            train_dataset=datasets.Dataset.from_dict(data),
            processing_class=tokenizer(),
            callbacks=[engine],
        )
    else:
        arguments = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=5, **common)
        with pytest.warns(UserWarning, match="rollout_func"):
            trainer = trl.GRPOTrainer(
                live,
                reward_funcs=lambda completions, **kwargs: [
                    float(text.count("a")) + len(set(text)) for text in completions
                ],
                args=arguments,
                train_dataset=datasets.Dataset.from_dict({"prompt": ["a line: "] * 4}),
                processing_class=tokenizer(),
                rollout_func=engine.rollout,
                callbacks=[engine],
            )
    trainer.train()
    assert not torch.allclose(engine.logits[-1], engine.logits[0])
    assert not torch.allclose(engine.logits[-1], start)
    reference = Engine(live, "ref")
    reference.receive()
    torch.testing.assert_close(reference.logits[0], start, rtol=1e-9, atol=1e-9)
