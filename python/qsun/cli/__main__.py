"""`python -m qsun.cli`."""

from __future__ import annotations

import sys

from qsun.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
