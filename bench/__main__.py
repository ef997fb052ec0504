"""`python -m qsun_bench`."""

from __future__ import annotations

import sys

from qsun_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
