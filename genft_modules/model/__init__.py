"""A whole model: the methods as peft tuners, sums of adapters, several processes, slices chosen by their gradients."""
