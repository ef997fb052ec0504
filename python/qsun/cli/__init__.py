"""The command line: `qsun generate | quantize | train | eval | doctor`."""

from __future__ import annotations

from qsun.cli.main import main

__all__ = ["main"]
