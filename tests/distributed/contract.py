"""What every method promises when a model is spread over processes: the training of one process, and no more
communication than the adapter needs.

`GENFT_CHECKPOINTS=FOLDER torchrun --nproc-per-node 2 -m tests.distributed.contract REPORT.json [CHECK ...]` runs on any
device: NCCL where there are GPUs, else gloo. Without torchrun it forks two processes of its own, then four, and writes
REPORT.2.json and REPORT.4.json; so does `test_contract.py`.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from genft_modules import METHODS, FusedGenLinear, WeGeFTConfig, fuse_lora, grft_penalty, unfuse_lora
from genft_modules.disk.adapters import restore_adapter, save_adapter
from genft_modules.model.distributed import align_adapters, unwrapped
from genft_modules.model.fused import FusedForward
from tests.support.cases import CASES, randomize
from tests.support.experts import TARGETS as EXPERTS
from tests.support.experts import adapted, moe

ROOT = Path(__file__).parents[2]
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")  # how they are cut
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
STEPS = 2
BATCH = torch.arange(36).reshape(4, 9) * 7 % 61

Run = tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]  # the gradients of each step, the parameters


def device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def mesh(*sizes: int, names: tuple[str, ...] = ("one",)) -> DeviceMesh:
    return init_device_mesh(device().type, sizes or (dist.get_world_size(),), mesh_dim_names=names)


def base(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device(), dtype)


STOCK: dict[str, dict[str, Any]] = {"stock_lora": {}, "stock_dora": {"use_dora": True}}  # peft's own, fused


def adapt(model: nn.Module, case: str) -> PeftModel:
    """The model with an adapter whose ΔW is not zero, the same on every process."""
    torch.manual_seed(3)
    if case not in STOCK:
        return randomize(get_peft_model(model, CASES[case](target_modules=TARGETS)))
    found = randomize(get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **STOCK[case])))
    fuse_lora(found)
    return found


def layers(model: nn.Module) -> dict[str, FusedGenLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedGenLinear)}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # a large ε: where a gradient is nothing but rounding, Adam would make a whole step of it
    return torch.optim.AdamW(trained(model).values(), lr=0.01, eps=1e-3)


def train(model: nn.Module, rows: torch.Tensor, steps: int = STEPS) -> Run:
    rows, optimizer, gradients = rows.to(device()), optimizer_of(model), []
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        gradients.append({name: full(p.grad) for name, p in trained(model).items()})
        optimizer.step()
    return gradients, {name: full(p) for name, p in trained(model).items()}


def assert_same(found: Run, wanted: Run) -> None:
    """Everything, to within rounding: relative to the largest element of each tensor."""
    for step, (ours, theirs) in enumerate(zip([*found[0], found[1]], [*wanted[0], wanted[1]], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, want in theirs.items():
            room = (1e-9 if want.dtype == torch.float64 else 2e-5) * max(float(want.abs().max()), 1e-3)
            error = float((ours[name] - want).abs().max())
            assert error <= room, f"{name}, {'parameter' if step == STEPS else f'gradient of step {step}'}: {error}"


def share_of_batch(size: int | None = None, rank: int | None = None) -> torch.Tensor:
    """The rows of this process. All have equally many, so that the mean of the means is the mean."""
    return BATCH[dist.get_rank() if rank is None else rank :: size or dist.get_world_size()]


# ---- the ways to spread a model over processes: each returns the model and the rows that this process trains on


def ddp(case: str) -> tuple[nn.Module, torch.Tensor]:
    return DistributedDataParallel(adapt(base(), case)), share_of_batch()


def fsdp_blocks(case: str) -> tuple[nn.Module, torch.Tensor]:
    model = adapt(base(), case)
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh()), share_of_batch()


def fsdp_leaves(case: str) -> tuple[nn.Module, torch.Tensor]:
    """Each frozen weight is a group of its own: it is whole only inside the call of its own layer."""
    model = adapt(base(), case)
    for layer in layers(model).values():
        fully_shard(layer.base_layer, mesh=mesh())
    return fully_shard(model, mesh=mesh()), share_of_batch()


def cut(model: nn.Module, over: DeviceMesh, suffix: str = "") -> None:
    """torch's own tensor parallelism; k_proj and gate_proj have no adapter."""
    plan = {}
    for name, _ in model.named_modules():
        last = name.rpartition(".")[2]
        if last in COLUMNS or last in ROWS:
            adapted = suffix if last in TARGETS else ""
            plan[name + adapted] = ColwiseParallel() if last in COLUMNS else RowwiseParallel()
    parallelize_module(model, over, plan)


def tensor_parallel(case: str) -> tuple[nn.Module, torch.Tensor]:
    model = adapt(base(), case)
    cut(model, mesh(), ".base_layer")
    return model, BATCH


def tensor_parallel_before(case: str) -> tuple[nn.Module, torch.Tensor]:
    """A model that is cut already gets an adapter."""
    model = base()
    cut(model, mesh())
    return adapt(model, case), BATCH


def tp_plan(case: str) -> tuple[nn.Module, torch.Tensor]:
    """transformers loads the model in pieces."""
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(saved_base(), distributed_config=config, dtype=torch.float64)
    return adapt(model, case), BATCH


def fsdp_and_tensor_parallel(case: str) -> tuple[nn.Module, torch.Tensor]:
    model, both = adapt(base(), case), mesh(2, dist.get_world_size() // 2, names=("data", "tensor"))
    cut(model, both["tensor"], ".base_layer")
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=both["data"])
    return fully_shard(model, mesh=both["data"]), share_of_batch(2, both["data"].get_local_rank())


WAYS: dict[str, Callable[[str], tuple[nn.Module, torch.Tensor]]] = {
    "ddp": ddp,
    "fsdp_blocks": fsdp_blocks,
    "fsdp_leaves": fsdp_leaves,
    "tensor_parallel": tensor_parallel,
    "tensor_parallel_before": tensor_parallel_before,
    "tp_plan": tp_plan,
    "fsdp_and_tensor_parallel": fsdp_and_tensor_parallel,
}


def shared_folder() -> Path:
    """A new folder, seen by all processes."""
    where = [tempfile.mkdtemp(dir=os.environ["GENFT_CHECKPOINTS"]) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(where)
    return Path(where[0])


def saved_base() -> Path:
    """A folder with the base model."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        base().save_pretrained(folder)
    dist.barrier()
    return folder


_alone: dict[str, Run] = {}


def alone(case: str) -> Run:
    """The training of one process on all rows."""
    if case not in _alone:
        model = adapt(base(), case)
        unfuse_lora(model)  # stock LoRA is peft's
        _alone[case] = train(model, BATCH)
    return _alone[case]


def training_is_that_of_one_process(way: str, case: str) -> None:
    model, rows = WAYS[way](case)
    assert_same(train(model, rows), alone(case))


def fsdp1_training_is_that_of_one_process(case: str) -> None:
    """FSDP1, whose flat parameters cut across tensors: plain descent moves a parameter by its gradient, so what it
    holds in the end is compared."""
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    results = []
    for sharded in (False, True):
        model, rows = adapt(base(), case), share_of_batch() if sharded else BATCH
        if sharded:
            options = {"auto_wrap_policy": policy, "use_orig_params": True, "device_id": device()}
            model = FullyShardedDataParallel(model, **options)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(input_ids=rows.to(device()), labels=rows.to(device())).loss.backward()
            optimizer.step()
        with FullyShardedDataParallel.summon_full_params(model) if sharded else nullcontext():
            parameters = {name.replace("_fsdp_wrapped_module.", ""): full(p) for name, p in trained(model).items()}
        results.append(([], parameters))
    assert_same(results[1], results[0])


def fsdp1_refuses() -> None:
    """W0 that was left to train, parts of one flat parameter that are not frozen alike, and W0 in a unit of its own."""

    def layer() -> FusedGenLinear:
        return FusedGenLinear.from_linear(nn.Linear(K, N, device=device()), CASES["genft"]())

    x = torch.randn(3, K, device=device())
    for trains, original, message in (
        (True, True, "weight: requires grad, expected a frozen weight"),
        (True, False, "use_orig_params: got False, expected True"),
        (False, False, "uniform `requires_grad`.* `use_orig_params=False`"),  # of torch
    ):
        one = layer()
        one.base_layer.requires_grad_(trains)
        with pytest.raises(ValueError, match=message):
            FullyShardedDataParallel(one, use_orig_params=original, device_id=device())(x)
    one = layer()
    one.base_layer = FullyShardedDataParallel(one.base_layer, use_orig_params=True, device_id=device())
    with pytest.raises(ValueError, match="expected FSDP of whole blocks"):
        one(x)


def stock_lora_is_computed_by_us(way: str, case: str) -> None:
    served = []
    compute = FusedForward._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedForward, "_active", lambda *a: served.append(y := compute(*a)) or y)
        training_is_that_of_one_process(way, case)
    assert served
    assert not any(y is None for y in served)


# ---- one layer, with sizes that the processes do not divide


K, N = 10, 7
STYLES = {
    "colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}


def one_layer(style: str, case: str, *more: str) -> None:
    """Output and every gradient of a cut layer with a bias and one or several adapters, in training and inference."""

    def make() -> FusedGenLinear:
        torch.manual_seed(0)
        linear = nn.Linear(K, 8 if case.endswith("_halves") else N, dtype=torch.float64, device=device())
        layer = FusedGenLinear.from_linear(linear, CASES[case]())
        for other in more:
            layer.add_adapter(other, CASES[other]())
        layer.set_adapter(["default", *more])
        return randomize(layer)

    def run(layer: FusedGenLinear) -> list[torch.Tensor]:
        torch.manual_seed(5)
        x = torch.randn(3, K, dtype=torch.float64).to(device()).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)
        return [y, x.grad, *(parameter.grad for parameter in trained(layer).values()), layer.get_delta_weight()]

    layer = make()
    want = run(layer)
    layer = make()
    parallelize_module(layer, mesh(), {"base_layer": STYLES[style]()})
    torch.testing.assert_close(run(layer), want, rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match="DTensor"):
        layer.merge()


def a_conv1d_of_its_own_group(case: str) -> None:
    """fully_shard of a base layer that keeps W0ᵀ. All processes have the same x, so the mean gradient is each one's."""
    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        layer = randomize(FusedGenLinear.from_linear(Conv1D(6, K).to(device(), torch.float64), CASES[case]()))
        if sharded:
            fully_shard(layer.base_layer, mesh=mesh())
            fully_shard(layer, mesh=mesh())
        x = torch.linspace(-1, 1, 3 * K, dtype=torch.float64, device=device()).view(3, K).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(full(parameter.grad) for parameter in trained(layer).values())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def experts_in_sharded_blocks(tied: bool) -> None:
    """fully_shard of the model and of its blocks, with one pair for all experts; or of its experts, with one each."""

    def model() -> PeftModel:
        config = WeGeFTConfig(r=3, tied_experts=tied, target_modules=["q_proj", *EXPERTS])
        return adapted(moe("mixtral", "batched_mm", torch.float64), config, std=0.1).to(device())

    sharded = model()
    for block in sharded.get_base_model().model.layers:
        fully_shard(block if tied else block.mlp.experts.base_layer, mesh=mesh())
    assert_same(train(fully_shard(sharded, mesh=mesh()), share_of_batch()), train(model(), BATCH))


def experts_spread_over_processes() -> None:
    """transformers' expert parallelism: the pair of gate_up_proj trains as in one process; down_proj only infers."""
    name = "model.layers.0.mlp.experts"
    plan = {**{f"{name}.{one}_proj": "grouped_gemm" for one in ("gate_up", "down")}, name: "ep_dispatch_experts"}

    def model(targets: list[str], *, spread: bool) -> PeftModel:
        plain = moe("mixtral").to(device())
        if spread:
            apply_expert_parallelism(plain, mesh(), mesh(), plan, "all_reduce")
        return adapted(plain, WeGeFTConfig(r=3, target_modules=targets), std=0.1)

    assert_same(train(model(EXPERTS[:1], spread=True), BATCH), train(model(EXPERTS[:1], spread=False), BATCH))
    both, rows = model(EXPERTS, spread=True), BATCH.to(device())
    with torch.no_grad():
        want = model(EXPERTS, spread=False)(input_ids=rows).logits
        torch.testing.assert_close(both(input_ids=rows).logits, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="got down_proj of experts that are spread over processes"):
        both(input_ids=rows)


def a_penalty_is_refused() -> None:
    model = adapt(base(), "grft")
    model.get_base_model().model.layers[0].self_attn.q_proj.genft_generators["default"].penalty = 1.0
    assert grft_penalty(model) > 0
    cut(model, mesh(), ".base_layer")
    with pytest.raises(ValueError, match=r"penalty: the weight of .*q_proj is sharded"):
        grft_penalty(model)


def fused_rows_are_refused() -> None:
    config = CASES["gift_gelu"](enable_gift={"qkv": [True, False, True]})
    layer = FusedGenLinear.from_linear(nn.Linear(K, 12, device=device()), config, name="qkv")
    parallelize_module(layer, mesh(), {"base_layer": ColwiseParallel()})
    with pytest.raises(ValueError, match="placements"):
        layer(torch.randn(3, K, device=device()))


# ---- the same adapter everywhere


def another_configuration_is_refused() -> None:
    """By every process, with a message."""
    config = CASES["wegeft"](target_modules=TARGETS, rank_pattern={"o_proj": 4 + (dist.get_rank() == 1)})
    with pytest.raises(ValueError, match=r'\[1\] differ.*rank_pattern: got {"o_proj": 5}, rank 0 has {"o_proj": 4}'):
        align_adapters(get_peft_model(base(), config), timeout=20)
    config = CASES["wegeft"](target_modules=TARGETS[: 2 + (dist.get_rank() == 1)])
    with pytest.raises(ValueError, match="target_modules"):
        align_adapters(get_peft_model(base(), config), timeout=20)


def other_values_become_those_of_the_first() -> None:
    model = adapt(base(), "lora")
    want = {name: full(parameter) for name, parameter in trained(model).items()}
    randomize(model, seed=100 + dist.get_rank())
    if dist.get_rank() == 0:
        for name, parameter in trained(model).items():
            parameter.data.copy_(want[name])
    align_adapters(model, timeout=20)
    assert all(torch.equal(parameter, want[name]) for name, parameter in trained(model).items())


def a_missing_process_is_named() -> None:
    if dist.get_rank() == 1:
        dist.new_group(backend="gloo")  # the others make theirs
        return
    with pytest.raises(RuntimeError, match="1"):
        align_adapters(adapt(base(), "lora"), timeout=1.5)


def factors_of_cut_and_whole_layers_are_refused() -> None:
    model = adapt(base(), "wegeft")
    first = model.get_base_model().model.layers[0].self_attn.q_proj
    parallelize_module(first, mesh(), {"base_layer": ColwiseParallel()})
    with pytest.raises(ValueError, match="only some are sharded"):
        align_adapters(model)


# ---- files


def tensors_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The tensors of an adapter's file, byte for byte; in its metadata ours has the configuration, too."""
    raw = (folder / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__")
    return header, raw[start:]


def files_are_those_of_one_process(way: str, case: str) -> None:
    """What a sharded model saves, byte for byte; and a sharded model filled from it."""
    folder = shared_folder()
    model = unwrapped(WAYS[way](case)[0])
    save_adapter(model, folder / "sharded")
    if dist.get_rank() == 0:
        adapt(base(), case).save_pretrained(folder / "alone")
    dist.barrier()
    assert tensors_of(folder / "sharded") == tensors_of(folder / "alone")
    if way != "tp_plan":  # where it names the folder that the base was loaded from
        name = "adapter_config.json"
        assert (folder / "sharded" / name).read_bytes() == (folder / "alone" / name).read_bytes()
    want = {name: full(parameter) for name, parameter in trained(model).items()}
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.zero_()
    restore_adapter(model, folder / "sharded")
    for name, parameter in trained(model).items():
        assert torch.equal(full(parameter), want[name]), name
    dist.barrier()
    if dist.get_rank() == 0:
        file = folder / "sharded" / "adapter_model.safetensors"
        save_file({key + "x": tensor for key, tensor in load_file(file).items()}, file)
    dist.barrier()
    with pytest.raises(ValueError, match="does not match"):
        restore_adapter(model, folder / "sharded")


def checkpoint_is_for_any_number_of_processes(case: str) -> None:
    """torch.distributed.checkpoint: a step here, the second wherever the folder is read next."""
    folder = Path(os.environ["GENFT_CHECKPOINTS"]) / case
    options = StateDictOptions(ignore_frozen_params=True)
    model, rows = fsdp_blocks(case)
    optimizer = optimizer_of(model)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=rows.to(device()), labels=rows.to(device())).loss.backward()
        optimizer.step()

    if folder.exists():
        for parameter in trained(model).values():
            parameter.data.zero_()
        weights, moments = get_state_dict(model, optimizer, options=options)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
    else:
        step()
        weights, moments = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    step()
    assert_same(([], {name: full(p) for name, p in trained(model).items()}), ([], alone(case)[1]))


def trainer_resumes_from_its_checkpoint(case: str) -> None:
    """transformers' Trainer with FSDP2 as `examples/accelerate/fsdp2.yaml` sets it up: the second half of a training
    again, from the checkpoint in the middle."""
    folder = shared_folder()
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}  # as `accelerate launch` passes them
    settings = yaml.safe_load((ROOT / "examples" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    data = [{"input_ids": row, "labels": row} for row in BATCH.repeat(2, 1)]
    backend = PartialState._prepare_backend
    ends = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        for name, value in settings.items():
            patch.setenv(names.get(name, name.upper()), str(value))
        if not torch.cuda.is_available():  # accelerate has FSDP for accelerators only
            patch.setattr(
                PartialState, "_prepare_backend", lambda *args: (backend(*args)[0], DistributedType.MULTI_GPU)
            )
            patch.setattr(PartialState, "set_device", lambda state: setattr(state, "device", device()))
        for checkpoint in (None, folder / "checkpoint-2"):
            arguments = TrainingArguments(
                folder,
                max_steps=4,
                save_steps=2,
                per_device_train_batch_size=1,
                learning_rate=0.05,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=not torch.cuda.is_available(),
            )
            trainer = Trainer(adapt(base(torch.float32), case), arguments, train_dataset=data)
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            assert trainer.accelerator.distributed_type == DistributedType.FSDP
            assert any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
            ends.append({name: full(p) for name, p in trained(trainer.model).items()})
            dist.barrier()
        AcceleratorState._reset_state(reset_partial_state=True)
    start = {name: full(p) for name, p in trained(adapt(base(torch.float32), case)).items()}
    assert_same(([], ends[1]), ([], ends[0]))
    assert not any(torch.equal(value, start[name]) for name, value in ends[1].items())


# ---- communication


class Counted(TorchDispatchMode):
    """The collectives within it: name → [how many, bytes that each process hands in]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0].replace("_", "")
            kinds = ("all_reduce", "reduce_scatter", "all_gather")
            kind = next((kind for kind in kinds if name.startswith(kind.replace("_", ""))), None)
            if kind is not None:
                # an all-gather's first argument in c10d is what it fills
                given = args[1] if function.namespace == "c10d" and kind != "all_reduce" else args[0]
                tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
                entry = self.found.setdefault(kind, [0, 0])
                entry[0] += 1
                entry[1] += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return function(*args, **(kwargs or {}))


def counted(model: nn.Module, rows: torch.Tensor) -> dict[str, list[int]]:
    """Of the second step: what is done once at the start is no matter."""
    unwrapped(model).get_input_embeddings().register_forward_hook(lambda m, args, y: y.requires_grad_())
    mode = Counted()
    if isinstance(model, DistributedDataParallel):

        def hook(_, bucket):  # DistributedDataParallel reads the annotations, and takes none that is a string
            future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        model.register_comm_hook(None, hook)
    train(model, rows, steps=1)
    rows = rows.to(device())
    with mode:
        model(input_ids=rows, labels=rows).loss.backward()
    return mode.found


def bare(way: str) -> tuple[nn.Module, torch.Tensor]:
    """The model without an adapter, spread in the same way."""
    model = base().requires_grad_(False)
    if way == "tensor_parallel":
        cut(model, mesh())
        return model, BATCH
    for block in model.model.layers:
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh()), share_of_batch()


def more_than_bare(way: str, case: str) -> dict[str, list[int]]:
    """The communication of one step that the adapter adds."""
    model, rows = WAYS[way](case)
    found = counted(model, rows)
    if way != "ddp":
        plain, rows = bare(way)
        plain.get_input_embeddings().register_forward_hook(lambda m, args, y: y.requires_grad_())
        mode, rows = Counted(), rows.to(device())
        with mode:
            plain(input_ids=rows, labels=rows).loss.backward()
        found = {
            kind: [a - b for a, b in zip(entry, mode.found.get(kind, [0, 0]), strict=True)]
            for kind, entry in found.items()
        }
    return {kind: entry for kind, entry in found.items() if any(entry)}


# Layers for which a step needs something of all of W0, [N, r] or [K, r]: forward once, backward once. An edit of x does
# not where the rows of W0 are cut.
READS_W0 = {"lora": (), "hira": (), "sas": (), "grft": (), "wegeft": ROWS, "gift": ROWS}


def communication_is_what_the_adapter_needs(way: str, case: str) -> None:
    found = more_than_bare(way, case)
    COMMUNICATION.setdefault(way, {})[case] = found
    model, world = adapt(base(), case), dist.get_world_size()
    size = {name: p.numel() * p.itemsize for name, p in trained(model).items()}
    if way == "ddp":  # every gradient once
        assert found == {"all_reduce": [1, sum(size.values())]}, found
    elif way == "fsdp_blocks":
        # Every parameter, in equal parts, once in the group of the model, which stays whole until the backward pass,
        # or twice in that of its block. Gradients once. They travel with what is gathered anyway.
        part = {name: -(-p.shape[0] // world) * size[name] // p.shape[0] for name, p in trained(model).items()}
        gathered = sum(bytes_ * (1 if "shared_generators" in name else 2) for name, bytes_ in part.items())
        groups = {name.partition(".layers.")[2][:1] for name in size}
        assert found["all_gather"] == [0, gathered], (found, gathered)
        assert found["reduce_scatter"] == [len(groups), sum(part.values()) * world], (found, part)
        assert len(found) == 2
    else:  # every gradient once, and what is made from W0
        reading = [name for name in layers(model) if name.rpartition(".")[2] in READS_W0.get(case, TARGETS)]
        count, bytes_ = (sum(entry[i] for entry in found.values()) for i in (0, 1))
        assert count == len(size) + 2 * len(reading), found
        assert bytes_ <= sum(size.values()) + 2 * len(reading) * 48 * 5 * 8, found  # max(N, K)·r doubles


COMMUNICATION: dict[str, dict[str, dict[str, list[int]]]] = {}


# ---- the run


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """By name. Every method goes through every kind of engine; what differs by the way alone, and two kinds of engine
    at once, with one of each form."""
    several = dist.get_world_size() > 2
    every = ("fsdp_and_tensor_parallel",) if several else ("ddp", "fsdp_leaves", "tensor_parallel")
    some = ("tensor_parallel", "fsdp_blocks") if several else ("fsdp_blocks", "tensor_parallel_before", "tp_plan")
    forms = ("wegeft", "lora", "genft_gelu", "grft", "hira")
    pairs = [(way, case) for way in every for case in (forms if several else (*METHODS, "genft_gelu"))]
    for way, case in pairs + [(way, case) for way in some for case in ("wegeft", "genft_gelu")]:
        yield f"{way}-{case}", partial(training_is_that_of_one_process, way, case)
    if not several:
        for case in (*forms, *STOCK):
            yield f"fsdp1-{case}", partial(fsdp1_training_is_that_of_one_process, case)
        for case in STOCK:
            for way in ("ddp", "fsdp_blocks"):
                yield f"{way}-{case}", partial(stock_lora_is_computed_by_us, way, case)
    yield "checkpoint", partial(checkpoint_is_for_any_number_of_processes, "genft")
    if several:
        return
    for style in STYLES:
        for case in CASES:
            if style == "rowwise" or not case.endswith("_halves"):  # rows of one weight that is cut: refused, see below
                yield f"one_layer-{style}-{case}", partial(one_layer, style, case)
        yield f"one_layer-{style}-several", partial(one_layer, style, "wegeft", "genft_gelu", "lora")
    for case in ("wegeft", "genft_gelu"):
        yield f"conv1d-{case}", partial(a_conv1d_of_its_own_group, case)
    for tied in (True, False):
        yield f"experts-{'tied' if tied else 'each'}", partial(experts_in_sharded_blocks, tied)
    yield "experts-spread", experts_spread_over_processes
    yield "fused_rows", fused_rows_are_refused
    yield "fsdp1_refuses", fsdp1_refuses
    yield "penalty", a_penalty_is_refused
    for way in ("ddp", "fsdp_blocks", "tp_plan"):
        for case in ("wegeft", "lora", "genft"):
            yield f"files-{way}-{case}", partial(files_are_those_of_one_process, way, case)
    for way in ("ddp", "fsdp_blocks", "tensor_parallel"):
        for case in (*METHODS, "genft_gelu") if way != "ddp" else ("wegeft", "lora"):
            yield f"communication-{way}-{case}", partial(communication_is_what_the_adapter_needs, way, case)
    for case in ("wegeft", "genft"):
        yield f"trainer-{case}", partial(trainer_resumes_from_its_checkpoint, case)
    yield "cut_and_whole", factors_of_cut_and_whole_layers_are_refused
    yield "other_values", other_values_become_those_of_the_first
    yield "another_configuration", another_configuration_is_refused
    yield "missing_process", a_missing_process_is_named  # last: the processes are apart afterwards


def run(report: Path, only: list[str]) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # A check that fails on one process leaves the others waiting for it: not for long.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(minutes=4))
    found: dict[str, str] = {}
    for name, check in checks():
        if only and not any(part in name for part in only):
            continue
        try:
            check()
            error = ""
        except Exception:
            error = traceback.format_exc()
        errors: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        found[name] = next(filter(None, errors), "")
        if dist.get_rank() == 0:
            report.write_text(json.dumps({"checks": found, "communication": COMMUNICATION}))
    dist.destroy_process_group()


def fork(processes: int, work: Callable[[], object]) -> list[int]:
    """Runs `work` in forks of this process, which has imported everything and computed nothing; how they ended."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            values = (rank, rank, processes, processes, "localhost", port)
            os.environ.update(zip(names, map(str, values), strict=True))
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    return [os.waitpid(child, 0)[1] for child in children]


def main(report: Path, only: list[str]) -> None:
    if "RANK" in os.environ:
        run(report, only)
        return
    for processes in (2, 4):  # the four go on from a checkpoint of the two
        ends = fork(processes, partial(run, report.with_suffix(f".{processes}.json"), only))
        if any(ends):
            sys.exit(f"{processes} processes ended with {ends}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
