"""The methods, one file each, built on the forms of `genft_modules.methods.forms`."""

from genft_modules.methods.base import Generator, GeneratorConfig
from genft_modules.methods.genft import GenFTConfig
from genft_modules.methods.gift import GIFTConfig
from genft_modules.methods.grft import GRFTConfig
from genft_modules.methods.hira import HiRAConfig
from genft_modules.methods.lora import LoRAConfig
from genft_modules.methods.peanut import PeanutConfig
from genft_modules.methods.sas import SaSConfig
from genft_modules.methods.wegeft import WeGeFTConfig

METHODS: dict[str, type[GeneratorConfig]] = {
    config.method: config
    for config in (WeGeFTConfig, GIFTConfig, GenFTConfig, GRFTConfig, SaSConfig, PeanutConfig, HiRAConfig, LoRAConfig)
}

__all__ = [
    "METHODS",
    "GIFTConfig",
    "GRFTConfig",
    "GenFTConfig",
    "Generator",
    "GeneratorConfig",
    "HiRAConfig",
    "LoRAConfig",
    "PeanutConfig",
    "SaSConfig",
    "WeGeFTConfig",
]
