"""The adapted linear layer: forward pass, mixed batches, sharded weights, cached forms."""
