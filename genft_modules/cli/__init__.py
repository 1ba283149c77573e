"""The command `genft`: `python -m genft_modules.cli` is the same."""
