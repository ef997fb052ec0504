"""The table of rounding errors in docs/formats.md, computed again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qsun_kernels.quant import QuantSpec
from qsun_kernels.quant.rtn import fake_quantize

DOC = Path(__file__).parents[3] / "docs" / "formats.md"
ROW = re.compile(
    r"^\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.M
)


def relative_errors(weight: torch.Tensor, bits: int) -> list[float]:
    """Root mean square errors in the order of the table's columns, groups of 64."""
    groups = weight.view(-1, 64)
    half, top = 1 << (bits - 1), (1 << bits) - 1
    absmax = groups.abs().amax(dim=1, keepdim=True)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    restored = []
    for divisor in (half - 1, half - 0.5, half):
        scale = absmax / divisor
        restored.append((groups / scale).round().clamp(-half, half - 1) * scale)
    restored.append(fake_quantize(weight, QuantSpec(bits, 64, True)).view(-1, 64))
    scale = (high - low) / top
    zero = (-low / scale).round()
    restored.append((((groups / scale).round() + zero).clamp(0, top) - zero) * scale)
    restored.append(fake_quantize(weight, QuantSpec(bits, 64, False)).view(-1, 64))
    return [float((values - groups).norm() / groups.norm()) for values in restored]


def test_table_of_rounding_errors():
    rows = ROW.findall(DOC.read_text())
    assert [row[0] for row in rows] == ["2", "3", "4", "8"]
    weight = torch.randn(1024, 1024)
    for bits, *written in rows:
        for value, computed in zip(written, relative_errors(weight, int(bits)), strict=True):
            assert computed == pytest.approx(float(value), rel=0.02), (bits, value)
