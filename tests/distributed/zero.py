"""Three steps under DeepSpeed's ZeRO-2 or ZeRO-3 against one process. By torchrun: `-m tests.distributed.zero 2`."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import deepspeed
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

from genft_modules import GeneratorConfig
from tests.support.cases import CASES, llama

METHODS = ("wegeft", "genft_gelu", "lora")
IDS = torch.arange(64).reshape(4, 16) * 7 % 61


def adapted(config: GeneratorConfig) -> nn.Module:
    config.target_modules = {"q_proj", "o_proj"}
    torch.manual_seed(1)
    model = get_peft_model(llama(), config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def main(stage: int) -> None:
    deepspeed.init_distributed("gloo")
    share = len(IDS) // dist.get_world_size()
    mine = IDS[dist.get_rank() * share :][:share]
    settings = {
        "train_micro_batch_size_per_gpu": share,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for name in METHODS:
        model = adapted(CASES[name]())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser(model), config=settings)
        for _ in range(3):
            engine.backward(engine(input_ids=mine, labels=mine).loss)
            engine.step()
        alone = adapted(CASES[name]())
        steps = optimiser(alone)
        for _ in range(3):
            alone(input_ids=IDS, labels=IDS).loss.backward()
            steps.step()
            steps.zero_grad()
        trained = {key: p for key, p in engine.module.named_parameters() if p.requires_grad}
        whole = deepspeed.zero.GatheredParameters(list(trained.values())) if stage == 3 else nullcontext()
        with whole:
            for key, want in alone.named_parameters():
                if want.requires_grad:
                    torch.testing.assert_close(trained[key].detach(), want.detach(), rtol=1e-4, atol=1e-5)
        print(f"{name}: {len(trained)} parameters agree", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
