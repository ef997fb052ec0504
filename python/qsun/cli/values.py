"""Values of options: from the words of the command line to what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsun.cli.exits import UsageError

QUANTIZERS = ("rtn", "awq", "gptq")
KV_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", "fp8", "int8", "int4")
KV_CACHE_HELP = "how keys and values are kept; fp8, int8 and int4 are codes with scales (auto: as the model)"


def name_and_path(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=PATH")
    return name, Path(path)


def name_and_text(text: str) -> tuple[str, str]:
    """NAME:TEXT."""
    name, colon, prompt = text.partition(":")
    if not (name and colon):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME:TEXT (NAME of --prefill, or base)")
    return name, prompt


def group_size(text: str) -> int | str | None:
    """A group size; None for "auto"."""
    if text == "auto":
        return None
    if text not in ("32", "64", "128", "channel"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected auto, 32, 64, 128 or channel")
    return text if text == "channel" else int(text)


def check_calibration(option: str, quantizer: str, calibration: Path | None) -> None:
    """UsageError unless a calibration file is there exactly when the quantiser of `option` reads one."""
    if (quantizer == "rtn") != (calibration is None):
        raise UsageError(
            f"{option} {quantizer}: got --calibration {calibration}, "
            "expected a file for awq and gptq and none for rtn"
        )
