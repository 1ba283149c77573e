"""Fused operations that adapt a frozen linear layer: tensors in, tensors out."""
