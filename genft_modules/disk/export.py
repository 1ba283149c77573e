"""Export of adapters to LoRA: exact if ΔW has low rank, else by truncated SVD with a measured error."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from genft_modules.card import note_of_export, write_card
from genft_modules.files import PREFIX, WEIGHTS, new_directory, some
from genft_modules.layer.adapted import AdaptedLayer
from genft_modules.layer.experts import FusedGenExperts
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

    Stacked experts are saved for peft's `target_parameters`, with factors for each expert; with one pair for all
    experts of a layer, A is the same for all of them.

    If ΔW has low rank (WeGeFT, GIFT, LoRA, GenFT with a linear outer activation), A and B are its exact factors, with
    the adapter's rank. A generated ΔW (GenFT with a nonlinear outer activation) has full rank: it is truncated per
    layer to `rank` singular values, or to as many as `max_error` requires. Scales are folded into B, with lora_alpha =
    rank. modules_to_save and trained biases are included.

    A and B are computed from the weights of `model`: the exported adapter is only valid for this base model.

    Args:
        model: a model with the adapter: a `PeftModel`, a transformers model with adapters, or any model with
            `FusedGenLinear` or `FusedGenExperts` layers. It is not changed; the adapter may be merged.
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
    updates = _updates(model, adapter_name)
    with new_directory(directory) as partial:
        exported, tensors = [], {}
        with bar(len(updates), "exporting", unit="layer", leave=False, show=progressbar) as progress:
            for update in updates:
                a, b, exact, error = update.factors(max_error, rank)
                exported.append(ExportedLayer(update.name, update.rank_of(a), exact, error))
                tensors[f"{update.key}.lora_A.weight"] = _copy(a)
                tensors[f"{update.key}.lora_B.weight"] = _copy(b)
                progress.update()
        tensors |= {key: _copy(tensor) for key, tensor in _other_tensors(model, adapter_name).items()}
        if broken := [key for key, tensor in tensors.items() if not is_finite(tensor)]:
            raise ValueError(f"adapter_name: {adapter_name!r} has non-finite elements in {some(broken)}")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        ranks = {layer.name: layer.rank for layer in exported}
        _config(model, adapter_name, updates, ranks, inference_mode=True).save_pretrained(str(partial))
        method = getattr(getattr(model, "peft_config", {}).get(adapter_name), "method", None)
        write_card(partial, note=note_of_export(method, [layer.error for layer in exported if not layer.exact]))
    return exported


@torch.no_grad()
def lora_state_dict(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    out: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """An adapter as the state dict of a peft LoRA adapter, in memory: what `export_lora` would save.

    For an engine that generates while the model trains: give it `lora_config(model)` and these tensors once, and after
    each step the same tensors, refilled by `lora_state_dict(model, out=tensors)`.

    Args:
        model: as in `export_lora`; it is not changed.
        adapter_name: name of an adapter whose ΔW has low rank in every layer.
        out: the result of an earlier call. Its tensors are overwritten and returned, wherever they are.
        dtype: of the new tensors; None for that of the factors, float32 or wider. Not together with `out`.

    Returns:
        `base_model.model.<layer>.lora_A.weight` [r, K] and `.lora_B.weight` [N, r] on each layer's device, stacked for
        experts, and the trained biases and full modules, in peft's layout. No tensor shares memory with the model.

    Raises:
        ValueError: invalid arguments or model, or ΔW has full rank in a layer.
    """
    if out is not None and dtype is not None:
        raise ValueError(f"dtype: got {dtype}, expected None because out has dtypes of its own")
    updates, others = _updates(model, adapter_name), _other_tensors(model, adapter_name)
    keys = [*others, *(f"{update.key}.lora_{side}.weight" for update in updates for side in "AB")]
    if out is not None and (not isinstance(out, dict) or out.keys() != set(keys)):
        raise ValueError(f"out: got {type(out).__name__} with other keys, expected the result of an earlier call")
    tensors: dict[str, Tensor] = {} if out is None else out

    def put(key: str, tensor: Tensor) -> None:
        if out is None:
            tensors[key] = tensor.detach().to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        elif out[key].shape != tensor.shape:
            raise ValueError(f"out: {key} has shape {tuple(out[key].shape)}, expected {tuple(tensor.shape)}")
        else:
            out[key].copy_(tensor)

    for update in updates:
        for side, factor in zip("AB", update.exact_factors(), strict=True):
            put(f"{update.key}.lora_{side}.weight", factor)
    for key, tensor in others.items():
        put(key, tensor)
    return tensors


def lora_config(model: nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The `peft.LoraConfig` of `lora_state_dict`: it targets exactly the adapted layers, with their ranks, and its
    scale is 1 everywhere. Arguments and errors as there."""
    updates = _updates(model, adapter_name)
    with torch.no_grad():
        ranks = {update.name: update.rank_of(update.exact_factors()[0]) for update in updates}
    return _config(model, adapter_name, updates, ranks, inference_mode=False)


@dataclass(frozen=True)
class _Update:
    """What one LoRA layer of peft stands for. key: of its tensors; name: of the layer in the base model."""

    key: str
    name: str
    layer: FusedGenLinear
    adapter_name: str

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        factors = self.layer.low_rank_factors(self.adapter_name)
        if factors is None:
            raise ValueError(
                f"adapter_name: ΔW of {self.adapter_name!r} has full rank in {self.name}, expected a low-rank method; "
                "export_lora approximates it"
            )
        return factors

    def factors(self, max_error: float | None, rank: int | None) -> tuple[Tensor, Tensor, bool, float]:
        """(A [r, K], B [N, r], whether they are exact, relative error)."""
        return _factors(self.layer, self.adapter_name, self.name, max_error, rank)

    def rank_of(self, a: Tensor) -> int:
        return a.shape[0]


@dataclass(frozen=True)
class _StackedUpdate:
    """The same for a projection of stacked experts, A [experts · r, K] and B [N, r · experts] in the order of peft's
    LoRA for `target_parameters`. name: of the parameter."""

    key: str
    name: str
    layer: FusedGenExperts
    adapter_name: str
    projection: str

    def exact_factors(self) -> tuple[Tensor, Tensor]:
        # peft takes a parameter without `is_transposed` for W_e, also where it is W_eᵀ.
        swapped = self.layer.transposed != bool(getattr(self.layer.base_layer, "is_transposed", False))
        each = (self._of(expert) for expert in range(self.layer.experts))
        factors = [(b.t(), a.t()) if swapped else (a, b) for a, b in each]
        return torch.cat([a for a, _ in factors]), torch.stack([b for _, b in factors], dim=-1).flatten(1)

    @torch.no_grad()
    def factors(self, max_error: float | None, rank: int | None) -> tuple[Tensor, Tensor, bool, float]:
        error = size = 0.0
        for expert in range(self.layer.experts):
            delta = self.layer.get_delta_weight(self.adapter_name, self.projection, expert)
            if not is_finite(delta):
                raise ValueError(f"adapter_name: ΔW of {self.adapter_name!r} has non-finite elements in {self.name}")
            a, b = self._of(expert)
            error += float(torch.addmm(delta, b, a, beta=-1).square().sum())
            size += float(delta.square().sum())
        return *self.exact_factors(), True, (error / size) ** 0.5 if size else 0.0

    def rank_of(self, a: Tensor) -> int:
        return a.shape[0] // self.layer.experts

    def _of(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.layer.low_rank_factors(self.adapter_name, self.projection, expert)


def _updates(model: nn.Module, adapter_name: str) -> list[_Update | _StackedUpdate]:
    """All updates of the adapter. Raises ValueError if they cannot be exported."""
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.genft_generators
    }
    if not layers:
        raise ValueError(f"adapter_name: got {adapter_name!r}, but no layer has a genft adapter of that name")
    if "" in layers:
        raise ValueError("model: got a single layer, expected a model, because LoRA identifies layers by name")
    if meta := [name for name, layer in layers.items() if stored(layer.base_layer).is_meta]:
        raise ValueError(f"model: the weight of {meta[0]} is on the meta device, expected a loaded weight")
    found: list[_Update | _StackedUpdate] = []
    for name, layer in layers.items():
        if isinstance(layer, FusedGenLinear):
            found.append(_Update(PREFIX + name, name, layer, adapter_name))
        elif isinstance(layer, FusedGenExperts):
            adapted = [one for one in layer.projections if one in layer.adapted(adapter_name)]
            for at, one in enumerate(adapted):
                # peft wraps the module once for each parameter, the first one innermost.
                key = f"{PREFIX}{name}" + ".base_layer" * (len(adapted) - 1 - at)
                found.append(_StackedUpdate(key, f"{name}.{one}", layer, adapter_name, one))
    return found


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
        PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state.items() if f".{GenFTModel.prefix}" not in key
    }


def _copy(tensor: Tensor) -> Tensor:
    """A copy, because safetensors does not allow tensors that share memory, such as the A of layers with a shared
    factor."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _config(
    model: nn.Module,
    adapter_name: str,
    updates: Sequence[_Update | _StackedUpdate],
    ranks: dict[str, int],
    inference_mode: bool,
) -> LoraConfig:
    """A config that targets exactly the adapted layers. r is the most frequent rank; others are in the patterns."""
    ours: Any = getattr(model, "peft_config", {}).get(adapter_name)
    bias = getattr(ours, "bias", "none")
    linear = {update.name: update.layer for update in updates if isinstance(update, _Update)}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # peft matches the end of names; ^ prevents a match with a longer name
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=targets_of(linear, layer_names(model)) if linear else [],
        target_parameters=[update.name for update in updates if update.name not in linear] or None,
        fan_in_fan_out=bool(linear) and all(layer.transposed for layer in linear.values()),
        bias=bias if bias in ("none", "all") else "lora_only",
        modules_to_save=getattr(ours, "modules_to_save", None),
        task_type=getattr(ours, "task_type", None),
        auto_mapping=getattr(ours, "auto_mapping", None),
        base_model_name_or_path=getattr(ours, "base_model_name_or_path", None) or getattr(model, "name_or_path", None),
        revision=getattr(ours, "revision", None),
        inference_mode=inference_mode,
    )
