"""One layer: a frozen linear layer and its adapters. Here x flows."""
