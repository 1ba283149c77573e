"""`python -m genft_modules.cli`, which torchrun can start."""

import sys

from genft_modules.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
