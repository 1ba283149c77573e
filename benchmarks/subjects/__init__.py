"""Who runs: our layers and models, those of others, and the naive ones that tell the truth."""
