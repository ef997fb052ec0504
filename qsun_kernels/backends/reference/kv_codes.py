"""Keys and values as codes of 8 or 4 bits with scales, in torch: value = code * scale.

| dtype of the cache | code | largest code |
|---|---|---|
| float8_e4m3fn | the number itself | 448 |
| int8 | two's complement | 127 |
| uint8 | two codes a byte, element 2i in the low nibble; a nibble is code + 8 | 7 |
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: 7.0}


def quantize_kv(x: Tensor, kv_dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of the vectors x (..., D), float32.

    Without a `scale` each vector gets its own, float32 (...): with a the largest |x| and c the largest code,
    it is a / c, and codes are x * (c / a), rounded to the nearest, ties to even, within -c..c. A vector so
    small that c / a is infinite (a below 4e-37 for int8), zero included, has scale and codes 0. One that
    holds an infinity or NaN has scale NaN and codes 0, so that all of it reads as NaN.

    With a `scale` (1,), for float8_e4m3fn only, codes are x * (1 / scale) within -448..448, and NaN (0x7f)
    where x itself is not finite.

    Returns codes (..., D) of `kv_dtype`, (..., D / 2) for uint8, and the scales. Each division and each
    product is rounded to float32.
    """
    if scale is not None:
        scaled = (x * (1.0 / scale)).where(x.isfinite(), torch.nan)
        return _to_float8(scaled), scale
    largest_code = _LARGEST_CODE[kv_dtype]
    largest = x.abs().amax(-1)  # NaN where there is one
    # With a number on one side torch would multiply by a reciprocal, which is rounded twice.
    divisor = torch.full_like(largest, largest_code)
    inverse = divisor / largest
    is_zero = inverse == torch.inf
    is_finite = largest < torch.inf
    scales = (largest / divisor).masked_fill(is_zero, 0.0).where(is_finite, torch.nan)
    scaled = (x * inverse[..., None]).where((is_finite & ~is_zero)[..., None], 0.0)
    if kv_dtype == torch.float8_e4m3fn:
        return _to_float8(scaled), scales
    codes = scaled.round().clamp(-largest_code, largest_code).to(torch.int8)
    return (codes if kv_dtype == torch.int8 else _to_nibbles(codes)), scales


def dequantize_kv(codes: Tensor, scales: Tensor | None) -> Tensor:
    """code * scale, float32 (..., D), of codes of any dtype of a cache; scales (...), (1,), or None for 1."""
    values = _from_nibbles(codes) if codes.dtype == torch.uint8 else codes.float()
    if scales is None:
        return values
    return values * (scales if scales.shape == (1,) else scales[..., None])


def _to_float8(x: Tensor) -> Tensor:
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _to_nibbles(codes: Tensor) -> Tensor:
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _from_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float() - 8.0
