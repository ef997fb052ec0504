"""No kernel reads or writes outside its tensors, not even what it then ignores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer does it on a GPU"),
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect"),
]

SCRIPT = Path(__file__).with_name("guarded_memory.py")


@pytest.mark.parametrize("place", ["end", "start"])
def test_kernels_stay_within_their_tensors(place: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), place], capture_output=True, text=True)
    assert done.returncode == 0, f"an access past the {place} of a tensor:\n{done.stderr}"
    assert done.stdout.endswith("in bounds\n")
