"""Drop-in modules and peft methods on top of genft_kernels.

Importing this package registers its methods with peft: `get_peft_model`, `PeftModel.from_pretrained` and transformers'
`add_adapter` and `load_adapter` then accept their configs and checkpoints.

Invalid arguments and fields raise ValueError or TypeError before any work is done; the message names the argument, the
value it got and what it expects.
"""

from typing import TYPE_CHECKING, Any

from genft_modules.disk.adapters import check_adapter, load_adapter, restore_adapter, save_adapter
from genft_modules.disk.export import ExportedLayer, export_lora, lora_config, lora_state_dict
from genft_modules.disk.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from genft_modules.disk.released import load_peft_hira, load_peft_peanut, load_released, load_released_genft
from genft_modules.layer.experts import FusedGenExperts
from genft_modules.layer.linear import FusedGenLinear
from genft_modules.layer.shared import SharedGenerators
from genft_modules.methods import (
    METHODS,
    GeneratorConfig,
    GenFTConfig,
    GIFTConfig,
    GRFTConfig,
    HiRAConfig,
    LoRAConfig,
    PeanutConfig,
    SaSConfig,
    WeGeFTConfig,
)
from genft_modules.methods.forms import Generated, InputEdit, LowRank, Slices
from genft_modules.model.adapt import adapt
from genft_modules.model.distributed import align_adapters
from genft_modules.model.fused import FusedLayer, fuse_lora, unfuse_lora
from genft_modules.model.slices import PenaltyMixin, grft_penalty, needs_slices, select_slices
from genft_modules.model.tuner import GenFTModel

if TYPE_CHECKING:
    from genft_modules.training.group import AdapterGroupTrainer
    from genft_modules.training.runs import AdapterRun

__all__ = [
    "METHODS",
    "AdapterGroupTrainer",
    "AdapterRun",
    "ExportedLayer",
    "FusedGenExperts",
    "FusedGenLinear",
    "FusedLayer",
    "GIFTConfig",
    "GRFTConfig",
    "GenFTConfig",
    "GenFTModel",
    "Generated",
    "GeneratorConfig",
    "HiRAConfig",
    "InputEdit",
    "LoRAConfig",
    "LowRank",
    "PeanutConfig",
    "PenaltyMixin",
    "SaSConfig",
    "SharedGenerators",
    "Slices",
    "WeGeFTConfig",
    "adapt",
    "align_adapters",
    "check_adapter",
    "export_lora",
    "fuse_lora",
    "grft_penalty",
    "hotswap_adapter",
    "load_adapter",
    "load_peft_hira",
    "load_peft_peanut",
    "load_released",
    "load_released_genft",
    "lora_config",
    "lora_state_dict",
    "needs_slices",
    "prepare_model_for_compiled_hotswap",
    "restore_adapter",
    "save_adapter",
    "select_slices",
    "unfuse_lora",
]


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is used: transformers' Trainer takes seconds to import."""
    if name == "AdapterRun":
        from genft_modules.training.runs import AdapterRun

        return AdapterRun
    if name == "AdapterGroupTrainer":
        from genft_modules.training.group import AdapterGroupTrainer

        return AdapterGroupTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
