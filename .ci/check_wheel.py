"""Checks an installed wheel from outside the checkout: what it holds, and that an operator answers.

usage: check_wheel.py auto|off   (the QSUN_CUDA that the wheel was built with)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

import qsun_kernels

mode = sys.argv[1]
package = Path(qsun_kernels.__file__).parent
assert "site-packages" in package.parts, f"imported from {package}, expected the installed wheel"

has_library = any(package.glob("libqsun.so*"))
expected = mode != "off" and shutil.which("nvcc") is not None
assert has_library == expected, f"libqsun in the wheel: {has_library}, expected {expected}"

packed = qsun_kernels.quantize_rtn(
    torch.randn(40, 96), qsun_kernels.QuantSpec(bits=4, group_size=32, symmetric=True)
)
x = torch.randn(3, 96)
weight = qsun_kernels.prepare_weight(packed, dtype=torch.float32)
y = qsun_kernels.wna16_linear(x, weight)
torch.testing.assert_close(y, x @ qsun_kernels.dequantize(packed, torch.float32).T)

scripts = Path(sys.executable).parent
for command in (["qsun-bench", "list"], ["qsun", "--help"]):
    subprocess.run([scripts / command[0], *command[1:]], check=True, stdout=subprocess.DEVNULL)
doctor = subprocess.run([sys.executable, "-m", "qsun_kernels"], check=True, capture_output=True, text=True)
assert ("QSUN_CUDA=off" in doctor.stdout) == (mode == "off"), doctor.stdout
print(f"wheel ok (QSUN_CUDA={mode}, libqsun {'in' if has_library else 'not in'} it)")
