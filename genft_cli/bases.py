"""Loading for the commands: the base model, a saved adapter, the device."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from genft_cli.console import UserError, check_writable, one_line, say
from genft_modules.card import TASKS
from genft_modules.disk.adapters import load_adapter, read_config
from genft_modules.files import check_new, local_name
from genft_modules.methods import GeneratorConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def launched() -> int:
    """The number of processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Initialise the process group of torchrun, before transformers does.

    After a restart, torchrun's store may still contain addresses of the previous attempt; each gets its own prefix.
    """
    if launched() == 1 or torch.distributed.is_initialized():
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store = torch.distributed.PrefixStore(  # type: ignore[attr-defined] # torch's own list of exports lacks it
        f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
    )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def check_device(name: str) -> torch.device:
    """The device of this process; under torchrun, the GPU of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    if name not in {"cuda", "cpu"}:
        raise UserError(f"--device {name}: choose from auto, cuda, cpu")
    if name == "cuda" and launched() > 1:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node: local rank {local} needs a GPU of its own, but torch finds only "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local)
        return torch.device(name, local)
    return torch.device(name)


def model_config(model: str, **details: Any) -> Any:
    """The configuration of a model; `details` go to transformers. Raises UserError if it cannot be read."""
    from transformers import AutoConfig

    check_there(model)
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model {model}: no config.json in this directory")
    try:
        return AutoConfig.from_pretrained(place(model), **details)
    except Exception as error:  # the Hub's client raises many types for a missing model
        what = "cannot be read" if path.is_dir() else "no such directory, and cannot be read from the Hub"
        raise UserError(f"--model {model}: {what} ({one_line(error)[:200]})") from None


def check_there(model: str) -> None:
    """Raises UserError if a model is no directory, not in the cache, and the Hub does not answer, where transformers
    goes on asking for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return
    if os.path.exists(path) or not _on_the_hub(model):
        raise UserError(f"--model {model}: no such directory")
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
        HfApi().model_info(model, timeout=5)
    except HfHubHTTPError:
        return  # it answers; what is wrong, transformers says
    except Exception as error:  # of the connection, of the name
        what = one_line(error)[:200]
        raise UserError(f"--model {model}: no such directory, and cannot be read from the Hub ({what})") from None


def _on_the_hub(name: str) -> bool:
    """Whether a model on the Hub may be called so."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.startswith(".")


def place(model: str) -> str:
    path = Path(model).expanduser()
    return local_name(str(path)) if path.is_dir() else model


def load_base(
    model: str, dtype: torch.dtype | str, kind: Any = None, found_elsewhere: Collection[str] = (), **details: Any
) -> Any:
    """Load the model with the transformers class `kind`, by default AutoModelForCausalLM; `details` go to transformers.
    Raises UserError if weights are missing, except those of the modules named in `found_elsewhere`."""
    import transformers
    from safetensors import SafetensorError

    kind = kind or transformers.AutoModelForCausalLM
    try:
        loaded, info = kind.from_pretrained(place(model), dtype=dtype, output_loading_info=True, **details)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {model}: its weights cannot be read ({one_line(error)[:200]})") from None
    parts = [f".{name}." for name in found_elsewhere]
    if missing := sorted(key for key in info["missing_keys"] if not any(part in f".{key}" for part in parts)):
        raise UserError(f"--model {model}: {len(missing)} weights are missing, the first is {missing[0]}")
    return loaded


def path_of(name: str) -> Path:
    return Path(name).expanduser()


def config_of(adapter: str) -> Any:
    try:
        return read_config(path_of(adapter))
    except ValueError as error:
        raise UserError(one_line(error)) from None


def genft_config(adapter: str, command: str) -> GeneratorConfig:
    config = config_of(adapter)
    if not isinstance(config, GeneratorConfig):
        method = method_of(config)
        raise UserError(f"{adapter}: got an adapter of peft's own method {method}; genft {command} takes only genft's")
    return config


def method_of(config: Any) -> str:
    return config.method if isinstance(config, GeneratorConfig) else str(config.peft_type.value)


def check_output(output: str) -> None:
    """Raises UserError unless `output` can become a new directory."""
    try:
        check_new(path_of(output))
    except ValueError as error:
        raise UserError(f"--output {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    check_writable("--output", output)


def base_of(config: Any, adapter: str, model: str | None) -> str:
    """The base model: `model`, else the one that the adapter was trained on. Raises UserError if there is none."""
    base = model or config.base_model_name_or_path
    if not base:
        raise UserError(f"--model is missing: {adapter} does not say which model it was trained on")
    if model is None and (found := recorded_base(base, adapter)):
        return found
    if model is None and not _on_the_hub(base):
        raise UserError(
            f"--model is missing: {adapter} was trained on {base}, which is no directory with a model, neither from "
            "here nor from the adapter's directory or one above it"
        )
    check_there(base)
    return str(base)


def recorded_base(recorded: str | None, adapter: str) -> str | None:
    """The directory of the model that an adapter was trained on: the recorded path as given, else relative to the
    adapter's directory or one above it, in which it may have been trained. None if there is none."""
    if not recorded:
        return None
    path, start = path_of(recorded), path_of(adapter).resolve()
    places = [path] if path.is_absolute() else [path, *(above / path for above in (start, *start.parents))]
    return next(
        (local_name(os.path.normpath(found)) for found in places if os.path.isfile(found / "config.json")), None
    )


def load(adapter: str, config: Any, base: str, device: str, dtype: torch.dtype | str = "auto") -> Any:
    """Load the base model with the adapter. Raises UserError if either cannot be read or they do not match."""
    import transformers

    where = check_device(device)
    kind = _kind(config, model_config(base))
    say(f"loading {base}")
    saved = config.modules_to_save or ()
    details = _details(path_of(adapter))
    loaded = load_base(base, dtype, getattr(transformers, kind), found_elsewhere=saved, **details).to(where)
    try:
        return load_adapter(loaded, path_of(adapter))
    except ValueError as error:
        raise UserError(one_line(error)) from None


def _details(adapter: Path) -> dict[str, Any]:
    """What the base model was loaded with, such as the number of classes, if a run left its record here."""
    try:
        found = json.loads((adapter / "run.json").read_text(encoding="utf-8")).get("load")
    except (OSError, ValueError, AttributeError):
        return {}
    known = ("num_labels", "problem_type", "ignore_mismatched_sizes", "pad_token_id")
    return {name: found[name] for name in known if name in found} if isinstance(found, dict) else {}


def _kind(config: Any, base_config: Any) -> str:
    """The model class: from the adapter, its task type, or the base model's configuration."""
    import transformers

    named = (config.auto_mapping or {}).get("base_model_class")
    for kind in (named, TASKS.get(config.task_type), *(base_config.architectures or ())):
        if kind and hasattr(transformers, kind):
            return str(kind)
    raise UserError(
        f"--model: transformers has no class for this model: neither {named} nor {base_config.architectures}"
    )
