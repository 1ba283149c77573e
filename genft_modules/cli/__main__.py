"""Entry point of `python -m genft_modules.cli`, for use with torchrun."""

import sys

from genft_modules.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
