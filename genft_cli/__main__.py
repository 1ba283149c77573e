"""Entry point of `python -m genft_cli`, for use with torchrun."""

import sys

from genft_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
