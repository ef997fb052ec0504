"""Sums that a product split along K leaves to the operator behind (csrc/wna16/parts.h)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.panels import BLOCK_ROWS
from qsun_kernels.backends.problems import PendingSums, PreparedWeight, SplitProducts


def splits(rows: int, weight: PreparedWeight) -> int:
    """Parts that a product of so many rows leaves; 1 where the library does not split it."""
    if weight.stored_layout == linear.ROWS_LAYOUT:
        return 1
    spec = weight.spec
    return _splits(
        rows,
        weight.N,
        _columns(weight),
        spec.bits,
        linear.groups_per_block(weight),
        not spec.symmetric,
        weight.tensors[0].get_device(),
    )


def _columns(weight: PreparedWeight) -> int:
    """Those of x, once gathered."""
    return len(weight.tensors[1]) if len(weight.tensors) == 2 else weight.K


@lru_cache(maxsize=4096)
def _splits(M: int, N: int, K: int, bits: int, groups_per_block: int, has_zeros: bool, device: int) -> int:
    return library.binding.wna16_panels_splits(
        M, N, K, bits, groups_per_block, has_zeros, library.device_props(device)
    )


def leave(x: Tensor, weight: PreparedWeight) -> PendingSums:
    """x (M, K) -> sums of (M, N), rows a multiple of 64 floats apart."""
    if len(weight.tensors) == 1 and (x.data_ptr() % 16 or x.stride(0) % 8):
        x = x.clone(memory_format=torch.contiguous_format)  # else the kernel that splits could not read it
    rows = x.shape[0]
    shape = (splits(rows, weight), rows, -(-weight.N // BLOCK_ROWS) * BLOCK_ROWS)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    linear.launch_panels(x, weight, None, None, None, False, sums=parts)
    return PendingSums(parts[..., : weight.N], weight.dtype)


SPLIT_PRODUCTS = SplitProducts(splits, leave)
