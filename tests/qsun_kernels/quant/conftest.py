"""What the tests of quantisation share: the meaning of a PackedWeight, written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qsun_kernels.quant import PackedWeight


def _float_weight(packed: PackedWeight) -> torch.Tensor:
    """w[n, k] = (code - zero) * scale in float64, one number at a time."""
    scales = packed.scales.double().tolist()
    zeros = None if packed.qzeros is None else packed.qzeros.tolist()
    columns = packed.K if packed.spec.group_size == "channel" else packed.spec.group_size
    groups = [k // columns for k in range(packed.K)] if packed.g_idx is None else packed.g_idx.tolist()
    words = [[word & 0xFFFFFFFF for word in row] for row in packed.qweight.tolist()]
    rows = []
    for n in range(packed.N):
        stream = sum(word << (32 * i) for i, word in enumerate(words[n]))
        row = []
        for k in range(packed.K):
            code = (stream >> (packed.spec.bits * k)) & ((1 << packed.spec.bits) - 1)
            zero = 1 << (packed.spec.bits - 1) if zeros is None else zeros[n][groups[k]]
            row.append((code - zero) * scales[n][groups[k]])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run, whichever tests run before."""
    torch.manual_seed(0)


@pytest.fixture
def float_weight() -> Callable[[PackedWeight], torch.Tensor]:
    """The float64 weight that a PackedWeight stands for, by slow loops over bits."""
    return _float_weight
