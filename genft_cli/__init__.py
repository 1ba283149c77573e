"""The `genft` command, also available as `python -m genft_cli`."""
