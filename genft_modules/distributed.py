"""Adapters in several processes: the same adapter on all of them, saved from shards and loaded into shards.

Spreading the model is torch's, accelerate's and transformers' business: DistributedDataParallel, `fully_shard`,
`parallelize_module` and `tp_plan` take an adapted model as they take any other; docs/distributed.md has the recipes.
Every process has to call the functions here.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from genft_kernels.sharded import is_sharded
from genft_modules.linear import FusedGenLinear

TIMEOUT = 300.0  # seconds that a process waits for the others


def align_adapters(model: nn.Module, *, timeout: float = TIMEOUT) -> None:
    """Makes sure that all processes have the same adapters: the same configurations and shapes, or all of them raise;
    then the values of the first process. To be called on the adapted model before it is spread, or after, where it is
    cut by tensor parallelism.

    Args:
        model: with adapters of genft; wrapped or not.
        timeout: how long to wait for the other processes, in seconds.

    Raises:
        ValueError: on every process, naming what differs where; or shared factors that belong to layers of which only
            some are cut, whose gradients would be wrong.
        RuntimeError: a process did not come within `timeout`; that of process 0 says which.
    """
    _check_sharing(model)
    if not _several():
        return
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    try:
        dist.monitored_barrier(group, datetime.timedelta(seconds=timeout), wait_all_ranks=True)
        mine = _description(model)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest(), group)
        others = [rank for rank, digest in enumerate(every) if digest != every[0]]
        if others:
            raise ValueError(_difference(mine, others, group))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not is_sharded(parameter) and _is_adapter(name):
                value = parameter.detach().cpu().contiguous()
                dist.broadcast(value, src=0, group=group)
                with torch.no_grad():
                    parameter.copy_(value)
    finally:
        dist.destroy_process_group(group)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes the folder that `model.save_pretrained(path)` writes in one process, from whatever the parameters are
    spread over. The first process writes; only tensors of the adapter are gathered.

    Args:
        model: a `PeftModel`; sharded, in DistributedDataParallel, or neither.
        path: the folder.
        adapter_name: which adapter.
    """
    model = unwrapped(model)
    state = model.state_dict()
    whole = {name: _whole(state[name]).cpu() for name in _file_keys(model, adapter_name).values()}
    if rank() == 0:
        model.save_pretrained(str(path), state_dict=whole, selected_adapters=[adapter_name])  # type: ignore[operator]
    if _several():
        dist.barrier()


def restore_adapter(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Fills an adapter, whose parameters may be sharded, from a folder that `save_adapter` or `save_pretrained` wrote.

    Args:
        model: a `PeftModel` with an adapter of the same configuration; sharded, wrapped, or neither.
        path: the folder; every process reads it.
        adapter_name: which adapter.

    Raises:
        ValueError: names or shapes do not fit; nothing was changed.
    """
    model = unwrapped(model)
    saved, state = load_file(os.path.join(path, "adapter_model.safetensors")), model.state_dict()
    ours = {key: state[name] for key, name in _file_keys(model, adapter_name).items()}
    wrong = sorted(saved.keys() ^ ours.keys()) or [
        f"{key} {tuple(saved[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in ours.items()
        if saved[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"path: {wrong[:3]} and {max(len(wrong) - 3, 0)} more do not fit, expected this adapter's own")
    with torch.no_grad():
        for key, tensor in ours.items():
            value = saved[key].to(tensor.device, tensor.dtype)
            if is_sharded(tensor):
                from torch.distributed.tensor import distribute_tensor

                sharded: Any = tensor
                value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
            tensor.copy_(value)


def rank() -> int:
    """The number of this process; 0 where it is the only one."""
    return dist.get_rank() if _several() else 0


def unwrapped(model: Any) -> Any:
    """The model in DistributedDataParallel and torch.compile."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _file_keys(model: Any, adapter_name: str) -> dict[str, str]:
    """Keys of the file → of the model's state dict. peft renames the keys and looks at no value."""
    keys = {key: key for key in model.state_dict()}
    return get_peft_model_state_dict(model, state_dict=keys, adapter_name=adapter_name)  # type: ignore[no-any-return]


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()  # type: ignore[no-any-return]


def _is_adapter(name: str) -> bool:
    return "genft_" in name


def _description(model: nn.Module) -> dict[str, str]:
    """What has to be equal: configurations field by field, and every trainable parameter."""
    found = {}
    for adapter, config in getattr(unwrapped(model), "peft_config", {}).items():
        fields = config.to_dict()
        fields.pop("base_model_name_or_path", None)  # a path may be another on each machine
        for name, value in fields.items():
            text = sorted(value) if isinstance(value, set) else value
            found[f"{adapter}.{name}"] = json.dumps(text, sort_keys=True, default=str)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = f"{tuple(parameter.shape)} {parameter.dtype}"
    return found


def _difference(mine: dict[str, str], others: list[int], group: Any) -> str:
    """What process 0 and the first of those that differ have to say to each other."""
    told: list[Any] = [mine, mine]
    for index, source in enumerate((0, others[0])):
        one = [told[index]]
        dist.broadcast_object_list(one, src=source, group=group)
        told[index] = one[0]
    first, other = told
    names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    names.sort(key=lambda name: _is_adapter(name))  # a setting says more than the shapes that follow from it
    shown = "; ".join(f"{name}: {other.get(name)} there, {first.get(name)} in process 0" for name in names[:3])
    return (
        f"adapters: processes {others} have others than process 0, in {len(names)} entries ({shown}); expected the "
        "same command and configuration everywhere"
    )


def _check_sharing(model: nn.Module) -> None:
    """Cut layers sum the gradients of their factors over the processes; a layer that is whole has all of it already."""
    users: dict[int, set[bool]] = {}
    for name, layer in _layers(model):
        for generator in layer.genft_generators.values():
            for factors in generator.shared:  # type: ignore[union-attr]
                users.setdefault(id(factors), set()).add(is_sharded(layer.base_layer.weight))
                if len(users[id(factors)]) > 1:
                    raise ValueError(
                        f"model: {name} shares factors with layers of which only some are cut by tensor parallelism, "
                        "expected all or none; share by another rule (tied_modules, target_modules), or cut them alike"
                    )


def _layers(model: nn.Module) -> Iterable[tuple[str, FusedGenLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FusedGenLinear))
