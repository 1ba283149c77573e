"""Export of adapters to LoRA: exact if ΔW has low rank, else by truncated SVD with a measured error."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from genft_modules.card import note_of_export, write_card
from genft_modules.files import PREFIX, WEIGHTS, new_directory, some
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.methods.checks import check_number, check_rank, is_finite
from genft_modules.methods.weights import stored
from genft_modules.model.targets import layer_names, targets_of
from genft_modules.model.tuner import GenFTModel
from genft_modules.progress import bar


@dataclass(frozen=True)
class ExportedLayer:
    """Result for one layer: the LoRA rank; whether A and B are exact factors of ΔW or from a truncated SVD; and the
    error ‖B A − ΔW‖ / ‖ΔW‖ in the Frobenius norm, measured on the saved tensors."""

    name: str
    rank: int
    exact: bool
    error: float


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    max_error: float | None = None,
    rank: int | None = None,
    progressbar: bool = False,
) -> list[ExportedLayer]:
    """Save an adapter as a peft LoRA adapter, which `PeftModel.from_pretrained` loads without genft.

    If ΔW has low rank (WeGeFT, GIFT, LoRA, GenFT with a linear outer activation), A and B are its exact factors, with
    the adapter's rank. A generated ΔW (GenFT with a nonlinear outer activation) has full rank: it is truncated per
    layer to `rank` singular values, or to as many as `max_error` requires. Scales are folded into B, with lora_alpha =
    rank. modules_to_save and trained biases are included.

    A and B are computed from the weights of `model`: the exported adapter is only valid for this base model.

    Args:
        model: a model with the adapter: a `PeftModel`, a transformers model with adapters, or any model with
            `FusedGenLinear` layers. It is not changed; the adapter may be merged.
        directory: a new directory for adapter_config.json, adapter_model.safetensors and a README.md that names the
            base model and the errors, created atomically.
        adapter_name: name of the adapter.
        max_error: for layers with full-rank ΔW: the allowed relative error of ΔW in the Frobenius norm.
        rank: for layers with full-rank ΔW: the LoRA rank. Mutually exclusive with `max_error`.
        progressbar: show a progress bar on stderr.

    Returns:
        The results of the layers, in the model's order.

    Raises:
        ValueError, TypeError: invalid arguments or model, or the adapter or its ΔW has elements that are not finite, of
            which the message names the first; nothing is written.
        OSError: something cannot be written; names the directory and the reason. Nothing is left behind.
    """
    directory = Path(directory)
    if max_error is not None and rank is not None:
        raise ValueError(f"max_error, rank: got {max_error} and {rank}, expected one of them")
    if rank is not None:
        check_rank("rank", rank)
    if max_error is not None:
        check_number("max_error", max_error)
        if not 0 < max_error < 1:
            raise ValueError(f"max_error: got {max_error}, expected 0 < max_error < 1")
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, FusedGenLinear) and adapter_name in layer.genft_generators
    }
    if not layers:
        raise ValueError(f"adapter_name: got {adapter_name!r}, but no layer has a genft adapter of that name")
    if "" in layers:
        raise ValueError("model: got a single layer, expected a model, because LoRA identifies layers by name")
    if meta := [name for name, layer in layers.items() if stored(layer.base_layer).is_meta]:
        raise ValueError(f"model: the weight of {meta[0]} is on the meta device, expected a loaded weight")
    with new_directory(directory) as partial:
        exported, tensors = [], {}
        with bar(len(layers), "exporting", unit="layer", leave=False, show=progressbar) as progress:
            for name, layer in layers.items():
                a, b, exact, error = _factors(layer, adapter_name, name, max_error, rank)
                exported.append(ExportedLayer(name, a.shape[0], exact, error))
                tensors[f"{PREFIX}{name}.lora_A.weight"] = _copy(a)
                tensors[f"{PREFIX}{name}.lora_B.weight"] = _copy(b)
                progress.update()
        tensors |= _other_tensors(model, adapter_name)
        if broken := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
            raise ValueError(f"adapter_name: {adapter_name!r} has non-finite elements in {some(broken)}")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        _config(model, adapter_name, layers, exported).save_pretrained(str(partial))
        method = getattr(getattr(model, "peft_config", {}).get(adapter_name), "method", None)
        write_card(partial, note=note_of_export(method, [layer.error for layer in exported if not layer.exact]))
    return exported


@torch.no_grad()
def _factors(
    layer: FusedGenLinear, adapter_name: str, name: str, max_error: float | None, rank: int | None
) -> tuple[Tensor, Tensor, bool, float]:
    """(A [r, K], B [N, r], whether they are exact, relative error)."""
    delta = layer.get_delta_weight(adapter_name)
    if not is_finite(delta):
        raise ValueError(f"adapter_name: ΔW of {adapter_name!r} has non-finite elements in {name}")
    size = float(torch.linalg.matrix_norm(delta))

    def error(a: Tensor, b: Tensor) -> float:
        return float(torch.linalg.matrix_norm(torch.addmm(delta, b, a, beta=-1))) / size if size else 0.0

    if exact := layer.low_rank_factors(adapter_name):
        return *exact, True, error(*exact)
    if rank is None and max_error is None:
        raise ValueError(
            f"max_error, rank: got neither, expected one of them because ΔW of {name} has full rank and must be "
            "approximated"
        )
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    # Rounding may push the error above max_error at the smallest sufficient rank; then try the next one.
    ranks = [rank] if rank is not None else [_rank_for(s, max_error) + more for more in (0, 1)]
    for kept in ranks:
        a, b = vh[:kept], u[:, :kept] * s[:kept]
        if max_error is None or error(a, b) <= max_error:
            return a, b, False, error(a, b)
    raise ValueError(
        f"max_error: got {max_error:g}, which {delta.dtype} cannot reach in {name}, expected at least {error(a, b):.1e}"
    )


def _rank_for(s: Tensor, max_error: float | None) -> int:
    """The smallest number of singular values `s` to keep for a relative error of at most `max_error`; at least 1."""
    rest = s.double().square().flip(0).cumsum(0).sqrt().flip(0)  # ‖s[i:]‖
    return max(1, int((rest > (max_error or 0.0) * rest[0]).sum()))


def _other_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The other tensors of the adapter's checkpoint: modules_to_save, trained biases, resized embeddings. Their keys
    are the same in LoRA."""
    if adapter_name not in getattr(model, "peft_config", {}):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {
        PREFIX + key.removeprefix(PREFIX): _copy(tensor)
        for key, tensor in state.items()
        if f".{GenFTModel.prefix}" not in key
    }


def _copy(tensor: Tensor) -> Tensor:
    """A copy, because safetensors does not allow tensors that share memory, such as the A of layers with a shared
    factor."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _config(
    model: nn.Module, adapter_name: str, layers: dict[str, FusedGenLinear], exported: list[ExportedLayer]
) -> LoraConfig:
    """A config that targets exactly the adapted layers. r is the most frequent rank; others are in the patterns."""
    ours: Any = getattr(model, "peft_config", {}).get(adapter_name)
    bias = getattr(ours, "bias", "none")
    common = Counter(layer.rank for layer in exported).most_common(1)[0][0]
    # peft matches the end of names; ^ prevents a match with a longer name
    pattern = {f"^{re.escape(layer.name)}": layer.rank for layer in exported if layer.rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets_of(layers, layer_names(model)),
        fan_in_fan_out=all(layer.transposed for layer in layers.values()),
        bias=bias if bias in ("none", "all") else "lora_only",
        modules_to_save=getattr(ours, "modules_to_save", None),
        task_type=getattr(ours, "task_type", None),
        auto_mapping=getattr(ours, "auto_mapping", None),
        base_model_name_or_path=getattr(ours, "base_model_name_or_path", None) or getattr(model, "name_or_path", None),
        revision=getattr(ours, "revision", None),
        inference_mode=True,
    )
