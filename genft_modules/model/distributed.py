"""Adapters in several processes: the same adapter on all of them, and whole from its shards.

Spreading the model is torch's, accelerate's and transformers' business: DistributedDataParallel, `fully_shard`,
`parallelize_module` and `tp_plan` take an adapted model as they take any other; docs/distributed.md has the recipes.
Every process has to call the functions here.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from genft_kernels.sharded import is_sharded
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.weights import stored

T = TypeVar("T")
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
    if not several():
        return
    with _meeting(timeout) as group:
        _refuse_differences("adapters", _description(model), group)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if _is_adapter(name) and not is_sharded(tensor):
                value = tensor.detach().cpu().contiguous()
                dist.broadcast(value, src=0, group=group)
                with torch.no_grad():
                    tensor.copy_(value)


def agree(what: str, entries: dict[str, str], *, timeout: float = TIMEOUT) -> None:
    """Raises ValueError on every process unless `entries` are the same on all of them, naming what differs where; and
    RuntimeError where a process did not come within `timeout` seconds."""
    if several():
        with _meeting(timeout) as group:
            _refuse_differences(what, entries, group)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns, or raises, on the first process; it is called there alone."""
    if not several():
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return cast(T, box[0])


def gathered_adapter(model: Any, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter by their keys in the model's state dict, whole and on the CPU, from whatever they are
    spread over. Nothing of the base model is gathered."""
    state = model.state_dict()
    whole = {}
    for name in adapter_keys(model, adapter_name).values():
        tensor = state[name]
        whole[name] = (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().cpu()
    return whole


def adapter_keys(model: Any, adapter_name: str = "default") -> dict[str, str]:
    """Keys of an adapter's file → of the model's state dict. peft renames the keys and looks at no value."""
    keys = {key: key for key in model.state_dict()}
    return get_peft_model_state_dict(  # type: ignore[no-any-return]
        model, state_dict=keys, adapter_name=adapter_name, save_embedding_layers=False
    )


def barrier() -> None:
    """Waits for the other processes, where there are any."""
    if several():
        dist.barrier()


def rank() -> int:
    """The number of this process; 0 where it is the only one."""
    return dist.get_rank() if several() else 0


def unwrapped(model: Any) -> Any:
    """The model in DistributedDataParallel and torch.compile."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


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


@contextmanager
def _meeting(timeout: float) -> Iterator[Any]:
    """A process group on the CPU for small talk, once everybody is there."""
    wait = datetime.timedelta(seconds=timeout)
    group = dist.new_group(backend="gloo", timeout=wait)
    try:
        dist.monitored_barrier(group, wait, wait_all_ranks=True)
        yield group
    finally:
        dist.destroy_process_group(group)


def _refuse_differences(what: str, mine: dict[str, str], group: Any) -> None:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest(), group)
    others = [rank for rank, digest in enumerate(every) if digest != every[0]]
    if not others:
        return
    told = []  # what process 0 and the first that differs have to say
    for source in (0, others[0]):
        one: list[Any] = [mine]
        dist.broadcast_object_list(one, src=source, group=group)
        told.append(one[0])
    first, other = told
    names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    names.sort(key=_is_adapter)  # a setting says more than the shapes that follow from it
    shown = "; ".join(f"{name}: {other.get(name)} there, {first.get(name)} in process 0" for name in names[:3])
    raise ValueError(
        f"{what}: processes {others} have others than process 0, in {len(names)} entries ({shown}); expected the same "
        "command and configuration everywhere"
    )


def _check_sharing(model: nn.Module) -> None:
    """Cut layers sum the gradients of their factors over the processes; a layer that is whole has all of it already."""
    users: dict[int, set[bool]] = {}
    for name, layer in _layers(model):
        for generator in layer.genft_generators.values():
            for factors in generator.shared:  # type: ignore[union-attr]
                users.setdefault(id(factors), set()).add(is_sharded(stored(layer.base_layer)))
                if len(users[id(factors)]) > 1:
                    raise ValueError(
                        f"model: {name} shares factors with layers of which only some are cut by tensor parallelism, "
                        "expected all or none; share by another rule (tied_modules, target_modules), or cut them alike"
                    )


def _layers(model: nn.Module) -> Iterable[tuple[str, FusedGenLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FusedGenLinear))
