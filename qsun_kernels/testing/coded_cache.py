"""Caches of codes for tests of who reads them: any code in unused slots, scales of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsun_kernels.testing.kv_codes import KvKind, dequantised, quantised_cache

__all__ = ["CodedCache", "code_cache"]


@dataclass(frozen=True, slots=True)
class CodedCache:
    """cache, scale: as the operator takes them. values: float64, (num_blocks, Hkv, block_size, D)."""

    cache: Tensor
    scale: Tensor
    values: Tensor


def code_cache(source: torch.Generator, x: Tensor, kind: KvKind, *, spread: int = 0) -> CodedCache:
    """x (num_blocks, Hkv, block_size, D) float32 on the CPU in codes of a kind.

    A vector with a NaN, which stands for a slot that nobody may look at, gets a scale of NaN and any codes at
    all ("fp8-tensor": codes that are NaN). spread: scales, where each vector has its own, are also
    multiplied by random powers of two from 2 ** -spread to 2 ** spread.
    """
    cache, scale = quantised_cache(x, kind)
    if kind == "fp8-tensor":
        return CodedCache(cache, scale, dequantised(cache, scale))
    if spread:
        scale = scale * 2.0 ** torch.randint(-spread, spread + 1, scale.shape, generator=source)
    noise = torch.randint(0, 256, cache.shape, generator=source).to(torch.uint8)
    codes = torch.where(x.isnan().any(-1, keepdim=True), noise, cache.view(torch.uint8))
    cache = codes.view(cache.dtype)
    return CodedCache(cache, scale, dequantised(cache, scale))
