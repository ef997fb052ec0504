"""compute-sanitizer over every kernel instance: no access outside a tensor, no race in shared memory, no
barrier that some pass by, nothing read that nobody wrote.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parent / "sanitizer_suite.py"
TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("check", "families"),
    (
        ("memcheck", ()),
        ("racecheck", ()),
        ("synccheck", ()),
        # Kernels of the attention leave parts of results for each other.
        ("initcheck", ("attention", "coded_attention")),
    ),
)
def test_the_sanitizer_finds_nothing(check, families) -> None:
    if TOOL is None:
        pytest.skip("needs compute-sanitizer (PATH or /usr/local/cuda/bin)")
    command = [TOOL, "--tool", check, "--error-exitcode", "9", sys.executable, str(SUITE), *families]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " 0 wrong" in done.stdout, done.stdout
