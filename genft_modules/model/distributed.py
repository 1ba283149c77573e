"""Adapters in distributed training: identical adapters on all ranks, and gathering of sharded adapters.

Parallelism itself comes from torch, accelerate and transformers: DistributedDataParallel, `fully_shard`,
`parallelize_module` and `tp_plan` work with adapted models as with any other; see docs/distributed.md. All functions
here are collective: every rank must call them.
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
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from genft_kernels.sharded import is_sharded
from genft_modules.files import PREFIX
from genft_modules.layer.adapted import AdaptedLayer
from genft_modules.methods.weights import stored

T = TypeVar("T")
TIMEOUT = 300.0  # seconds to wait for the other ranks


def align_adapters(model: nn.Module, *, timeout: float = TIMEOUT) -> None:
    """Check that all ranks have adapters with the same configurations and shapes, then broadcast the values of rank 0.
    Call it on the adapted model before wrapping or sharding it; with tensor parallelism, afterwards.

    Args:
        model: a model with genft adapters, wrapped or not.
        timeout: how long to wait for the other ranks, in seconds.

    Raises:
        ValueError: on every rank, with the differences; or factors are shared between sharded and unsharded layers,
            which would give wrong gradients.
        RuntimeError: a rank did not join within `timeout`; the error on rank 0 says which.
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
    """Raises ValueError on every rank, with the differences, unless `entries` are the same on all ranks; RuntimeError
    if a rank did not join within `timeout` seconds."""
    if several():
        with _meeting(timeout) as group:
            _refuse_differences(what, entries, group)


def from_first(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only and return its result, or raise its exception, on all ranks."""
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
    """The full tensors of an adapter on the CPU, by their keys in the model's state dict. The base model is not
    gathered."""
    state = model.state_dict()
    whole = {}
    for name in adapter_keys(model, adapter_name).values():
        tensor = state[name]
        whole[name] = (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().cpu()
    return whole


def adapter_keys(model: Any, adapter_name: str = "default") -> dict[str, str]:
    """Keys in the adapter's file → keys in the model's state dict."""
    keys = {key: key for key in model.state_dict()}
    found = get_peft_model_state_dict(model, state_dict=keys, adapter_name=adapter_name, save_embedding_layers=False)
    prefix = "" if isinstance(model, PeftModel) else PREFIX  # in a file always
    return {prefix + key: name for key, name in found.items()}


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if several():
        dist.barrier()


def rank() -> int:
    """The rank of this process; 0 if it is the only one."""
    return dist.get_rank() if several() else 0


def unwrapped(model: Any) -> Any:
    """The model without the wrappers of DistributedDataParallel and torch.compile."""
    while hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_adapter(name: str) -> bool:
    return "genft_" in name


def _description(model: nn.Module) -> dict[str, str]:
    """What must be equal on all ranks: the fields of all configs, shapes and dtypes of the trainable parameters."""
    found = {}
    for adapter, config in getattr(unwrapped(model), "peft_config", {}).items():
        fields = config.to_dict()
        fields.pop("base_model_name_or_path", None)  # paths may differ between machines
        for name, value in fields.items():
            text = sorted(value) if isinstance(value, set) else value
            found[f"{adapter}.{name}"] = json.dumps(text, sort_keys=True, default=str)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = f"{tuple(parameter.shape)} {parameter.dtype}"
    return found


@contextmanager
def _meeting(timeout: float) -> Iterator[Any]:
    """A temporary gloo process group, after a barrier."""
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
    told = []  # the entries of rank 0 and of the first rank that differs
    for source in (0, others[0]):
        one: list[Any] = [mine]
        dist.broadcast_object_list(one, src=source, group=group)
        told.append(one[0])
    first, other = told
    names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    names.sort(key=_is_adapter)  # settings first: shapes follow from them
    shown = "; ".join(f"{name}: got {other.get(name)}, rank 0 has {first.get(name)}" for name in names[:3])
    raise ValueError(
        f"{what}: ranks {others} differ from rank 0 in {len(names)} entries ({shown}); expected the same command and "
        "configuration on all ranks"
    )


def _check_sharing(model: nn.Module) -> None:
    """Raise ValueError if factors are shared between sharded and unsharded layers: the former sum gradients over ranks,
    the latter already have full gradients."""
    users: dict[int, set[bool]] = {}
    for name, layer in _layers(model):
        for generator in layer.genft_generators.values():
            for factors in generator.shared:  # type: ignore[union-attr]
                users.setdefault(id(factors), set()).add(is_sharded(stored(layer.base_layer)))
                if len(users[id(factors)]) > 1:
                    raise ValueError(
                        f"model: {name} shares factors with layers of which only some are sharded, expected all or "
                        "none; change the sharing (tied_modules, target_modules) or the parallelism plan"
                    )


def _layers(model: nn.Module) -> Iterable[tuple[str, AdaptedLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer))
