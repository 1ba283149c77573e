"""The methods: one file each, all on the forms of `genft_modules.forms`."""

from genft_modules.generators.base import Generator, GeneratorConfig
from genft_modules.generators.genft import GenFTConfig
from genft_modules.generators.gift import GIFTConfig
from genft_modules.generators.grft import GRFTConfig
from genft_modules.generators.lora import LoRAConfig
from genft_modules.generators.peanut import PeanutConfig
from genft_modules.generators.sas import SaSConfig
from genft_modules.generators.wegeft import WeGeFTConfig

METHODS: dict[str, type[GeneratorConfig]] = {
    config.method: config
    for config in (WeGeFTConfig, GIFTConfig, GenFTConfig, GRFTConfig, SaSConfig, PeanutConfig, LoRAConfig)
}

__all__ = [
    "METHODS",
    "GIFTConfig",
    "GRFTConfig",
    "GenFTConfig",
    "Generator",
    "GeneratorConfig",
    "LoRAConfig",
    "PeanutConfig",
    "SaSConfig",
    "WeGeFTConfig",
]
