"""`genft merge`, `genft export-lora` and `genft inspect`: what is done with a saved adapter."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from genft_modules.adapters import PREFIX, load_adapter, read_config, some
from genft_modules.console import UserError, bar, one_line, say, table
from genft_modules.export import export_lora
from genft_modules.files import WEIGHTS, check_new, new_directory
from genft_modules.finetune import DTYPES, check_device, load_base, model_config, place
from genft_modules.generators import GeneratorConfig
from genft_modules.linear import FusedGenLinear
from genft_modules.tuner import SHARED, GenFTModel, SharedGenerators

# The class that a task is trained with. An adapter without a task names its class.
_KINDS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# What a model's directory has beside config and weights: tokenizer, processors, chat template.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "*processor_config.json",
)  # fmt: skip


def merge(adapter: str, output: str, *, model: str | None = None, dtype: str = "auto", device: str = "auto") -> str:
    """Writes the base model with W0 + ΔW in the place of W0; says what was done."""
    config = _config(adapter)
    _check_output(output)
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from auto, {', '.join(DTYPES)}")
    base = _base_of(config, adapter, model)
    adapted = _load(adapter, config, base, device, DTYPES.get(dtype, "auto"))
    say("merging")
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{adapter}: cannot be merged: {one_line(error)}") from None
    try:
        with new_directory(_path(output)) as partial:
            merged.save_pretrained(str(partial))
            _copy_companions(base, partial)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or one_line(error)}") from None
    stored = str(next(merged.parameters()).dtype).removeprefix("torch.")
    return f"merged     {_method(config)} into {base}, {stored}\nsaved      {output}"


def export(
    adapter: str,
    output: str,
    *,
    model: str | None = None,
    max_error: float | None = None,
    rank: int | None = None,
    device: str = "auto",
) -> str:
    """Writes a LoRA adapter of stock peft; says what became of each layer."""
    config = _genft_config(adapter, "export-lora")
    _check_output(output)
    base = _base_of(config, adapter, model)
    adapted = _load(adapter, config, base, device)
    try:
        layers = export_lora(adapted, _path(output), max_error=max_error, rank=rank, progressbar=True)
    except (TypeError, ValueError) as error:
        arguments, _, what = one_line(error).partition(":")
        options = arguments.replace("max_error", "--max-error").replace("rank", "--rank")
        raise UserError(f"{options}:{what}") from None
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or one_line(error)}") from None
    rows = [
        (layer.name, str(layer.rank), "exact" if layer.exact else "approximated", f"{layer.error:.1e}")
        for layer in layers
    ]
    exact = sum(layer.exact for layer in layers)
    return "\n".join(
        [
            table(("layer", "rank", "ΔW", "relative error"), rows),
            "",
            f"exported   {_method(config)} as LoRA: {exact} of {len(layers)} layers exactly, largest error "
            f"{max(layer.error for layer in layers):.1e}",
            f"base       {base}, whose weights the exported adapter was made from: it fits no other",
            f"saved      {output}",
        ]
    )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What there is to say of one adapted layer. rank: None for a full one."""

    name: str
    rank: int | None
    own: int
    groups: tuple[str, ...]
    norm: float
    relative: float


def inspect(adapter: str, *, model: str | None = None, plot: str | None = None, device: str = "auto") -> str:
    """A description of an adapter; where its base model is at hand, with every layer's ΔW measured, and drawn."""
    from genft_modules import plotting

    config = _genft_config(adapter, "inspect")
    recorded = config.base_model_name_or_path
    base = model or (recorded if recorded and (_path(recorded) / "config.json").is_file() else None)
    if plot is not None:
        if base is None:
            raise UserError("--plot: ΔW is made from the base model's weights: give --model")
        try:
            plotting.check_format(_path(plot))
        except ValueError as error:
            raise UserError(f"--plot {error}") from None
        if not _path(plot).parent.is_dir():
            raise UserError(f"--plot {plot}: no such directory")
    tensors = load_file(_path(adapter) / WEIGHTS)
    parts = [_summary(adapter, config, recorded, tensors), _groups(tensors)]
    if base is None:
        parts += [_own(tensors), "ranks and norms of ΔW need the base model: give --model"]
    else:
        layers = _measure(_load(adapter, config, base, device))
        parts.append(_layers(layers))
        if plot is not None:
            norms = {layer.name: (layer.norm, layer.relative) for layer in layers}
            plotting.update_norms(norms, _path(plot), f"{_method(config)}, {adapter}")
            parts.append(f"chart      {plot}")
    return "\n\n".join(part for part in parts if part)


# --- what is shown -----------------------------------------------------------------------------------------------


def _summary(adapter: str, config: GeneratorConfig, recorded: str | None, tensors: Mapping[str, Tensor]) -> str:
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    lines = [
        ("adapter", adapter),
        ("method", _method(config)),
        ("settings", ", ".join(f"{name} = {_shown(value)}" for name, value in _settings(config).items()) or "defaults"),
        ("base", recorded or "not recorded"),
        ("parameters", f"{count:,} in {len(tensors)} tensors, {', '.join(dtypes)}, {_size(size)}"),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _settings(config: GeneratorConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, but for those of peft's own housekeeping."""
    fields = {field.name for field in dataclasses.fields(config)}
    peft = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    plain, given = type(config)().to_dict(), config.to_dict()
    return {
        name: given[name] for name in given if name in fields - peft - {"inference_mode"} and given[name] != plain[name]
    }


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value)


def _groups(tensors: Mapping[str, Tensor]) -> str:
    """A table of the tensors that layers share."""
    return _tensors("shared by layers", tensors, f"{SHARED}.{SharedGenerators.adapter_layer_names[0]}.", "")


def _own(tensors: Mapping[str, Tensor]) -> str:
    """A table of the tensors that layers have for themselves, and of those that are no method's."""
    rest = {key: t for key, t in tensors.items() if f".{GenFTModel.prefix}" not in key}
    tables = [
        _tensors("a layer's own", tensors, f".{FusedGenLinear.adapter_layer_names[0]}.", "layer"),
        table(("saved whole", "shape"), [(k.removeprefix(PREFIX), _shape(t)) for k, t in rest.items()]) if rest else "",
    ]
    return "\n\n".join(part for part in tables if part)


def _tensors(title: str, tensors: Mapping[str, Tensor], container: str, owner: str) -> str:
    """The tensors whose keys have the container in them, by layer or by the group that they are shared under."""
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
    shared = getattr(base, SHARED, None)
    groups = {} if shared is None else {id(g): name for name, g in shared.genft_shared["default"].items()}
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, FusedGenLinear)}
    found = []
    with bar(len(layers), "measuring", unit="layer", leave=False) as progress:
        for name, layer in layers.items():
            generator: Any = layer.genft_generators["default"]
            factors = layer.low_rank_factors()
            norm = float(torch.linalg.matrix_norm(layer.get_delta_weight()))
            weight = float(torch.linalg.matrix_norm(layer.frozen_weight().float()))
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


# --- what is read and written ------------------------------------------------------------------------------------


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _config(adapter: str) -> Any:
    try:
        return read_config(_path(adapter))
    except ValueError as error:
        raise UserError(one_line(error)) from None


def _genft_config(adapter: str, command: str) -> GeneratorConfig:
    config = _config(adapter)
    if not isinstance(config, GeneratorConfig):
        raise UserError(f"{adapter}: is of peft's own method {_method(config)}; genft {command} is for those of genft")
    return config


def _method(config: Any) -> str:
    return config.method if isinstance(config, GeneratorConfig) else str(config.peft_type.value)


def _check_output(output: str) -> None:
    try:
        check_new(_path(output))
    except ValueError as error:
        raise UserError(f"--output {one_line(error)}") from None


def _base_of(config: Any, adapter: str, model: str | None) -> str:
    base = model or config.base_model_name_or_path
    if not base:
        raise UserError(f"--model is missing: {adapter} does not say which model it was trained on")
    return str(base)


def _load(adapter: str, config: Any, base: str, device: str, dtype: torch.dtype | str = "auto") -> Any:
    """The base model with the adapter. UserError if the one or the other cannot be read, or they do not fit."""
    where = check_device(device)
    kind = _kind(config, model_config(base))
    say(f"reading {base}")
    loaded = load_base(base, dtype, kind, found_elsewhere=config.modules_to_save or ()).to(where)
    try:
        return load_adapter(loaded, _path(adapter))
    except ValueError as error:
        raise UserError(one_line(error)) from None


def _kind(config: Any, base_config: Any) -> str:
    """The class of the model: the adapter's, its task's, or else the base model's."""
    import transformers

    named = (config.auto_mapping or {}).get("base_model_class")
    for kind in (named, _KINDS.get(config.task_type), *(base_config.architectures or ())):
        if kind and hasattr(transformers, kind):
            return str(kind)
    raise UserError(f"--model: transformers knows no class for it: neither {named} nor {base_config.architectures}")


def _copy_companions(base: str, to: Path) -> None:
    source = Path(place(base))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(base, allow_patterns=list(_COMPANIONS)))
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and not (to / path.name).exists():
                shutil.copyfile(path, to / path.name)
