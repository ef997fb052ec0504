"""`python -m qsun_kernels`: the doctor."""

from __future__ import annotations

import sys

from qsun_kernels.doctor import main

if __name__ == "__main__":
    sys.exit(main())
