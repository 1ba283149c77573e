"""`genft inspect`: show an adapter's contents and the size of each layer's ΔW."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from genft_cli.bases import genft_config, load, method_of, path_of, recorded_base
from genft_cli.console import UserError, check_writable, table
from genft_modules.files import PREFIX, WEIGHTS, some
from genft_modules.layer.adapted import AdaptedLayer
from genft_modules.layer.experts import FusedGenExperts
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.layer.shared import SHARED
from genft_modules.methods import Generator, GeneratorConfig
from genft_modules.model.tuner import GenFTModel
from genft_modules.progress import bar


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Measurements of one adapted layer. rank: None for full rank."""

    name: str
    rank: int | None
    own: int
    groups: tuple[str, ...]
    norm: float
    relative: float


def inspect(adapter: str, *, model: str | None = None, plot: str | None = None, device: str = "auto") -> str:
    """Describe an adapter; if its base model is available locally, also measure and plot each layer's ΔW."""
    from genft_cli import plotting

    config = genft_config(adapter, "inspect")
    recorded = config.base_model_name_or_path
    base = model or recorded_base(recorded, adapter)
    if plot is not None:
        if base is None:
            raise UserError("--plot: needs the base model to compute ΔW; use --model")
        try:
            plotting.check_format(path_of(plot))
        except ValueError as error:
            raise UserError(f"--plot {error}") from None
        if not path_of(plot).parent.is_dir():
            raise UserError(f"--plot {plot}: no such directory")
        check_writable("--plot", str(path_of(plot).parent))
    tensors = load_file(path_of(adapter) / WEIGHTS)
    parts = [_summary(adapter, config, recorded, tensors), _groups(tensors)]
    if base is None:
        parts += [_own(tensors), "ranks and norms of ΔW need the base model: use --model"]
    else:
        layers = _measure(load(adapter, config, base, device))
        parts.append(_layers(layers))
        if plot is not None:
            norms = {layer.name: (layer.norm, layer.relative) for layer in layers}
            plotting.update_norms(norms, path_of(plot), f"{method_of(config)}, {adapter}")
            parts.append(f"chart      {plot}")
    return "\n\n".join(part for part in parts if part)


# --- what is shown -----------------------------------------------------------------------------------------------


def _summary(adapter: str, config: GeneratorConfig, recorded: str | None, tensors: Mapping[str, Tensor]) -> str:
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    lines = [
        ("adapter", adapter),
        ("method", method_of(config)),
        ("settings", ", ".join(f"{name} = {_shown(value)}" for name, value in _settings(config).items()) or "defaults"),
        ("base", recorded or "not recorded"),
        ("parameters", f"{count:,} in {len(tensors)} tensors, {', '.join(dtypes)}, {_size(size)}"),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _settings(config: GeneratorConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, without peft's metadata."""
    fields = {field.name for field in dataclasses.fields(config)}
    peft = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    plain, given = type(config)().to_dict(), config.to_dict()
    return {
        name: given[name] for name in given if name in fields - peft - {"inference_mode"} and given[name] != plain[name]
    }


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value)


def _groups(tensors: Mapping[str, Tensor]) -> str:
    """A table of the tensors shared by layers."""
    return _tensors("shared by layers", tensors, f"{SHARED}.genft_shared.", "")


def _own(tensors: Mapping[str, Tensor]) -> str:
    """A table of the layers' own tensors, and one of the fully trained modules (`modules_to_save`)."""
    rest = {key: t for key, t in tensors.items() if f".{GenFTModel.prefix}" not in key}
    tables = [
        _tensors("a layer's own", tensors, f".{FusedGenLinear.adapter_layer_names[0]}.", "layer"),
        table(("saved in full", "shape"), [(k.removeprefix(PREFIX), _shape(t)) for k, t in rest.items()])
        if rest
        else "",
    ]
    return "\n\n".join(part for part in tables if part)


def _tensors(title: str, tensors: Mapping[str, Tensor], container: str, owner: str) -> str:
    """The tensors whose keys contain `container`, grouped by layer or by shared group."""
    found: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for key, tensor in tensors.items():
        before, inside, after = key.removeprefix(PREFIX).partition(container)
        if not inside:
            continue
        group, _, name = (before, "", after) if owner else after.partition(".")
        found.setdefault(group, []).append(f"{name} {_shape(tensor)}")
        counts[group] = counts.get(group, 0) + tensor.numel()
    rows = [(group, some(names, 4), f"{counts[group]:,}") for group, names in found.items()]
    return table((title, "tensors", "parameters"), rows) if rows else ""


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "1"


@torch.no_grad()
def _measure(model: Any) -> list[_Layer]:
    base = model.get_base_model()
    shared = getattr(model.base_model, SHARED, None)
    groups = {} if shared is None else {id(g): name for name, g in shared.genft_shared["default"].items()}
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, AdaptedLayer)}
    found = []
    with bar(len(layers), "measuring", unit="layer", leave=False) as progress:
        for layer_name, layer in layers.items():
            for name, generator, factors, matrices in _adapted(layer_name, layer):
                squares = [(delta.square().sum(), weight.float().square().sum()) for delta, weight in matrices]
                norm, weight = (math.sqrt(sum(map(float, each))) for each in zip(*squares, strict=True))
                found.append(
                    _Layer(
                        name,
                        None if factors is None else factors[0].shape[0],
                        sum(parameter.numel() for parameter in generator.parameters()),
                        tuple(groups[id(factor)] for factor in generator.shared),
                        norm,
                        norm / weight if weight else 0.0,
                    )
                )
            progress.update()
    return found


def _adapted(name: str, layer: AdaptedLayer) -> Iterator[tuple[str, Generator, Any, Iterable[tuple[Tensor, Tensor]]]]:
    """Each matrix or stack of matrices of a layer: its name, generator, factors (of one expert), and ΔW and W0 of
    each."""
    generator: Any = layer.genft_generators["default"]
    if isinstance(layer, FusedGenExperts):
        for projection, part in generator.parts().items():
            key = ("default", projection)
            each = ((layer.get_delta_weight(*key, e), layer.frozen_weight(projection, e)) for e in range(layer.experts))
            yield f"{name}.{projection}", part, layer.low_rank_factors(*key, 0), each
    elif isinstance(layer, FusedGenLinear):
        yield name, generator, layer.low_rank_factors(), [(layer.get_delta_weight(), layer.frozen_weight())]


def _layers(layers: Sequence[_Layer]) -> str:
    rows = [
        (
            layer.name,
            "full" if layer.rank is None else str(layer.rank),
            f"{layer.own:,}",
            ", ".join(layer.groups) or "—",
            f"{layer.norm:.3g}",
            f"{layer.relative:.2%}",
        )
        for layer in layers
    ]
    return table(("layer", "rank of ΔW", "own parameters", "shares", "‖ΔW‖", "‖ΔW‖ / ‖W0‖"), rows)
