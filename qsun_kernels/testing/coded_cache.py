"""KV caches of codes for tests: value = code * scale, in every kind that `paged_attention_decode` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["KINDS", "CacheKind", "CodedCache", "code_cache", "values_of"]

CacheKind = Literal["fp8", "fp8_tensor", "int8", "int4"]
"""Codes, with a scale for each head of each token, or one for all of the cache ("fp8_tensor")."""

KINDS: tuple[CacheKind, ...] = get_args(CacheKind)

_LARGEST: dict[CacheKind, float] = {"fp8": 448.0, "fp8_tensor": 448.0, "int8": 127.0, "int4": 7.0}


@dataclass(frozen=True, slots=True)
class CodedCache:
    """cache, scale: as the operator takes them. values: float64, (num_blocks, Hkv, block_size, D)."""

    cache: Tensor
    scale: Tensor
    values: Tensor


def values_of(cache: Tensor, scale: Tensor) -> Tensor:
    """code * scale in float64, which is exact, (num_blocks, Hkv, block_size, D)."""
    if cache.dtype == torch.uint8:
        codes = torch.stack((cache & 15, cache >> 4), dim=-1).flatten(-2).double() - 8
    else:
        codes = cache.double()
    return codes * (scale.double() if scale.shape == (1,) else scale.double()[..., None])


def code_cache(source: torch.Generator, x: Tensor, kind: CacheKind, *, spread: int = 0) -> CodedCache:
    """x (num_blocks, Hkv, block_size, D) float32 on the CPU in codes of a kind.

    A vector with a NaN, which stands for a slot that nobody may look at, gets a scale of NaN and any codes at
    all ("fp8_tensor": codes that are NaN). spread: scales, where each vector has its own, are also
    multiplied by random powers of two from 2 ** -spread to 2 ** spread.
    """
    largest = _LARGEST[kind]
    if kind == "fp8_tensor":
        scale = x.nan_to_num(0.0).abs().max().clamp(min=1e-3).view(1) / largest
        cache = (x / scale).to(torch.float8_e4m3fn)
        return CodedCache(cache, scale, values_of(cache, scale))
    is_unused = x.isnan().any(-1)
    scale = x.nan_to_num(0.0).abs().amax(-1) / largest
    codes = (x.nan_to_num(0.0) / scale.clamp(min=1e-30)[..., None]).clamp(-largest, largest)
    if spread:
        scale = scale * 2.0 ** torch.randint(-spread, spread + 1, scale.shape, generator=source)
    scale[is_unused] = torch.nan
    noise = torch.randint(0, 256, x.shape, generator=source).to(torch.uint8)
    if kind == "int4":
        nibbles = torch.where(is_unused[..., None], noise & 15, (codes.round() + 8).to(torch.uint8))
        cache = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    else:
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        stored = (codes.round() if kind == "int8" else codes).to(dtype).view(torch.uint8)
        cache = torch.where(is_unused[..., None], noise, stored).view(dtype)
    return CodedCache(cache, scale, values_of(cache, scale))
