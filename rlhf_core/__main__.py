"""`python -m rlhf_core` is `rlhf`."""

import sys

from rlhf_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
