"""Memory of a step: what is kept for backward, the peak, and what parameters, gradients and optimiser hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that `forward` keeps for its backward, beyond the tensors in `known` (inputs and parameters), each storage
    counted once."""
    seen = {_storage(tensor) for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() and _storage(tensor) not in seen:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # alive until the count is made: a freed storage's address may come back
    total = sum(kept.values())
    del out
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that `step` has allocated at any moment beyond what was allocated before it, its results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def state_bytes(parameters: Sequence[torch.nn.Parameter]) -> dict[str, int]:
    """Bytes of trained parameters, their gradients and AdamW's state for them."""
    size = sum(p.numel() * p.element_size() for p in parameters)
    moments = 0
    if parameters:
        copies = [torch.nn.Parameter(p.detach()[:1].clone()) for p in parameters]
        optimiser = torch.optim.AdamW(copies, lr=0.0)
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        optimiser.step()
        for p, copy in zip(parameters, copies, strict=True):
            per_element = sum(
                value.element_size() for value in optimiser.state[copy].values() if value.shape == copy.shape != ()
            )
            moments += p.numel() * per_element
    return {"parameters": size, "gradients": size, "optimiser": moments}
