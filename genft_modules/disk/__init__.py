"""Adapters on disk: saved, loaded, exported as LoRA, converted from the methods' released code."""
