"""`python -m ssdtune` is `ssdtune`."""

import sys

from ssdtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
