"""Adapted models: peft tuners, weighted sums of adapters, distributed training, GRFT's slice selection."""
