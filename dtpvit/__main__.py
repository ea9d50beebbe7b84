"""``python -m dtpvit`` is the command ``dtpvit``."""

import sys

from dtpvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
