"""KV caches as codes and scales (docs/formats.md), made and read without the code of any backend."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["KV_KINDS", "KvKind", "dequantised", "kv_dtype_of", "quantised_cache", "quantised_rows"]

KvKind = Literal["fp8", "fp8-tensor", "int8", "int4"]
"""A cache of codes; "fp8" with a scale a head and token, "fp8-tensor" with one for all."""

KV_KINDS: tuple[KvKind, ...] = get_args(KvKind)

_DTYPES: dict[KvKind, torch.dtype] = {
    "fp8": torch.float8_e4m3fn,
    "fp8-tensor": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: 7.0}


def kv_dtype_of(kind: KvKind) -> torch.dtype:
    """The dtype of the cache."""
    return _DTYPES[kind]


def quantised_cache(cache: Tensor, kind: KvKind) -> tuple[Tensor, Tensor]:
    """Codes and scales of a cache of keys or values (num_blocks, Hkv, block_size, D), floating point.

    Codes (num_blocks, Hkv, block_size, D), or D / 2 for "int4"; scales float32 (num_blocks, Hkv, block_size),
    or (1,) for "fp8-tensor", so that the largest finite magnitude becomes 448. Slots that hold NaN read as
    NaN again.
    """
    scale = None
    if kind == "fp8-tensor":
        finite = cache.float().abs()
        largest = finite.where(finite.isfinite(), 0.0).max().reshape(1)
        scale = torch.where(largest > 0, largest / torch.full_like(largest, 448.0), 1.0)
    return quantised_rows(cache, kind, scale)


def quantised_rows(rows: Tensor, kind: KvKind, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (..., D or D / 2) and scales (...) of vectors (..., D); with a `scale` (1,), by that one."""
    dtype = _DTYPES[kind]
    x = rows.float()
    if scale is not None:
        # Quotients and products of float32, each rounded once, are what every backend takes.
        scaled = x * (torch.ones_like(scale) / scale)
        return _float8(scaled).where(x.isfinite(), 0x7F).view(dtype), scale
    largest = x.abs().amax(-1, keepdim=True)
    code = torch.full_like(largest, _LARGEST[dtype])
    inverse = code / largest
    is_vector = largest.isfinite() & inverse.isfinite()
    scaled = torch.where(is_vector, x * inverse, 0.0)
    scales = torch.where(is_vector, largest / code, torch.where(largest.isfinite(), 0.0, torch.nan))[..., 0]
    if dtype == torch.float8_e4m3fn:
        return _float8(scaled).view(dtype), scales
    codes = scaled.double().round().to(torch.int64)
    if dtype == torch.int8:
        return codes.to(torch.int8), scales
    nibbles = codes + 8
    return (nibbles[..., ::2] + 16 * nibbles[..., 1::2]).to(torch.uint8), scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """code * scale, float64 (..., D), of codes (..., D or D / 2) and scales (...) or (1,)."""
    numbers = codes.view(torch.uint8).long()
    if codes.dtype == torch.float8_e4m3fn:
        values = _float8_values().to(codes.device)[numbers]
    elif codes.dtype == torch.int8:
        values = (numbers - 256 * (numbers > 127)).double()
    else:
        values = torch.stack((numbers % 16, numbers // 16), dim=-1).flatten(-2).double() - 8
    return values * (scales.double() if scales.shape == (1,) else scales.double()[..., None])


@lru_cache(maxsize=1)
def _float8_values() -> Tensor:
    """The number of each code, float64 (256,): OCP 8-bit floating point specification, E4M3."""
    code = torch.arange(128)
    exponent, mantissa = code // 8, (code % 8).double()
    values = torch.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.double() - 7)
    )
    values[127] = torch.nan
    return torch.cat((values, -values))


def _float8(x: Tensor) -> Tensor:
    """Codes of the nearest numbers, uint8, even codes at ties, at most 448."""
    values = _float8_values()[:127].to(x.device)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = x.abs().double().nan_to_num(0.0).clamp(max=448.0)
    code = torch.searchsorted(middles, magnitude)
    is_tie = magnitude == middles[code.clamp(max=125)]
    code = code + (is_tie & (code % 2 == 1))
    return (code + 128 * x.signbit()).to(torch.uint8)
