"""Adapters on disk: saving, loading, export to LoRA, conversion of released checkpoints."""
