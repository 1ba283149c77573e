"""The built-in demo: pretrain a small model and fine-tune it with every method."""
