"""Keys and values as codes of 8 or 4 bits: float32 numbers to codes and scales, codes to numbers.

All formats are bytes here: float8_e4m3fn and int8 hold one code, uint8 two codes of 4 bits, element 2i in the
low nibble (docs/formats.md). Codes are exact in float16 and bfloat16; scales are left to the caller, who has
fewer of them than of codes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.triton.numerics import INTERPRETED, device_function

FORMATS = {torch.float8_e4m3fn: "float8", torch.int8: "int8", torch.uint8: "int4"}
"""What kernels call the dtypes of a cache that hold codes; any other dtype holds the numbers themselves."""

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 number of up to 22 bits added to it is rounded to an integer, ties to even, which
the low bits of the sum hold in two's complement."""


def format_of(dtype: torch.dtype) -> str:
    """What kernels call a cache of this dtype."""
    return FORMATS.get(dtype, "numbers")


def as_bytes(cache: Tensor) -> Tensor:
    """A cache of codes as the bytes that they are; any other as it is."""
    return cache.view(torch.uint8) if cache.dtype in FORMATS else cache


@device_function
def quantize_scale(largest_bits: tl.tensor, FORMAT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(scale, inverse) of vectors from the bits of their largest magnitudes, int32.

    Bits rather than numbers, since a maximum of numbers passes over NaN. scale is 0 where the inverse would
    overflow, NaN where a value is not finite; inverse is then 0.
    """
    CODE: tl.constexpr = 448.0 if FORMAT == "float8" else 127.0 if FORMAT == "int8" else 7.0
    largest = largest_bits.to(tl.float32, bitcast=True)
    is_number = (largest_bits > 0) & (largest_bits < 0x7F800000)
    inverse = tl.div_rn(CODE, tl.where(is_number, largest, 1.0))
    is_number = is_number & (inverse < float("inf"))
    scale = tl.where(is_number, tl.div_rn(largest, CODE), 0.0)
    scale = tl.where(largest_bits < 0x7F800000, scale, float("nan"))
    return scale, tl.where(is_number, inverse, 0.0)


@device_function
def quantize(x: tl.tensor, inverse: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Codes of x * inverse, uint32, in the low bits that the format has; 0 where inverse is 0.

    For int8 and int4, and for float8 with a scale a vector, numbers that are not finite come with inverse 0.
    """
    y = tl.where(inverse == 0.0, 0.0, x * inverse)
    if FORMAT == "float8":
        return _to_float8(y)
    else:
        CODE: tl.constexpr = 127.0 if FORMAT == "int8" else 7.0
        # The bounds come between the product and the sum, or both would become one operation.
        y = tl.minimum(tl.maximum(y, -CODE), CODE)
        codes = (y + MAGIC).to(tl.uint32, bitcast=True)
        return codes & 0xFF if FORMAT == "int8" else (codes + 8) & 15


@device_function
def quantize_given(x: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """float8 codes of x * inverse for a scale that was given; NaN (0x7f) where x is not finite."""
    codes = _to_float8(x * inverse)
    is_finite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    return tl.where(is_finite, codes, 0x7F)


@device_function
def _to_float8(y: tl.tensor) -> tl.tensor:
    """float8_e4m3fn codes of float32 numbers, uint32, within -448..448, rounded to nearest even."""
    sign = (y.to(tl.uint32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(y), 448.0)
    bits = magnitude.to(tl.uint32, bitcast=True)
    # Three bits of mantissa are kept; the exponent's bias goes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes count steps of 2**-9, the last bit of numbers from 2**14 on.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    return tl.where(magnitude < 0.015625, small, normal) | sign


@device_function
def _float8_to_float32(codes: tl.tensor) -> tl.tensor:
    wide = codes.to(tl.uint32)
    # The same digits with an exponent that is 120 too low, of a subnormal number, too.
    magnitude = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    magnitude = tl.where((wide & 0x7F) == 0x7F, float("nan"), magnitude)
    return tl.where(wide >= 0x80, -magnitude, magnitude)


@lru_cache(maxsize=8)
def _assembly(form: str, is_bfloat16: bool) -> str:
    """PTX that turns four bytes of codes into 16-bit numbers: $0, $1 of int8; of int4 $0, $1 of the low
    nibbles and $2, $3 of the high ones. The last operand is the bytes.

    A byte under the high byte of 128 (bfloat16) or 1024 (float16) is the low mantissa bits of a number; what
    is taken away again is exact.
    """
    base, kind = (0x43, "bf16x2") if is_bfloat16 else (0x64, "f16x2")
    one, minus_one = (0x3F80, 0xBF80) if is_bfloat16 else (0x3C00, 0xBC00)
    tops = f"{base * 0x01010101:#010x}"
    # The number under whose last bits the codes are put, plus the code that stands for zero, negative.
    offset = (0xC308 if is_bfloat16 else 0xE408) if form == "int4" else 0xE480
    lines = [
        ".reg .b32 bytes, shifted, pair, high, factor, offset;",
        f"mov.b32 bytes, {'$4' if form == 'int4' else '$2'};",
        f"mov.b32 factor, {_twice(minus_one if form == 'int8' and is_bfloat16 else one)};",
        f"mov.b32 offset, {_twice(offset)};",
    ]
    halves = ((0, "0x4140"), (1, "0x4342"))
    if form == "int4":
        for output, shift in ((0, 0), (2, 4)):
            lines.append(f"shr.u32 shifted, bytes, {shift};")
            for half, selector in halves:
                lines += [
                    f"prmt.b32 pair, shifted, {tops}, {selector};",
                    "and.b32 pair, pair, 0xff0fff0f;",
                    f"fma.rn.{kind} ${output + half}, pair, factor, offset;",
                ]
    elif is_bfloat16:
        # Eight bits do not fit under 128: its low seven, minus 128 or, with the sign bit, 256.
        for half, selector in halves:
            lines += [
                f"prmt.b32 pair, bytes, {tops}, {selector};",
                "and.b32 high, pair, 0xff80ff80;",
                "and.b32 pair, pair, 0xff7fff7f;",
                f"fma.rn.{kind} ${half}, high, factor, pair;",
            ]
    else:
        lines.append("xor.b32 bytes, bytes, 0x80808080;")
        for half, selector in halves:
            lines += [
                f"prmt.b32 pair, bytes, {tops}, {selector};",
                f"fma.rn.{kind} ${half}, pair, factor, offset;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


def _twice(half: int) -> str:
    return f"{half << 16 | half:#010x}"


def assembly(form: str, dtype: torch.dtype) -> str:
    """What `unpack` and `unpack_pairs` get as ASSEMBLY for a format and the 16-bit dtype of the numbers; ""
    where they need none.
    """
    is_16_bits = dtype in (torch.float16, torch.bfloat16)
    return _assembly(form, dtype == torch.bfloat16) if form in ("int8", "int4") and is_16_bits else ""


@device_function
def unpack(
    codes: tl.tensor,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
) -> tl.tensor:
    """Bytes of float8 or int8 codes as DTYPE; interpreted, or with a DTYPE of 32 bits, as float32."""
    if FORMAT == "int8":
        if INTERPRETED or DTYPE.is_fp32():
            return codes.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            return tl.inline_asm_elementwise(
                ASSEMBLY, "=r,=r,r", [codes], dtype=DTYPE.value, is_pure=True, pack=4
            )
    elif INTERPRETED or DTYPE.is_fp32():
        return _float8_to_float32(codes)
    elif NATIVE_FLOAT8:
        return codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    else:
        return _float8_to_float32(codes).to(DTYPE)


@device_function
def unpack_pairs(
    codes: tl.tensor, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The low and the high nibbles of bytes of int4 codes as DTYPE; interpreted, or in 32 bits, float32."""
    if INTERPRETED or DTYPE.is_fp32():
        even = (codes & 15).to(tl.float32) - 8.0
        odd = (codes >> 4).to(tl.float32) - 8.0
        return even, odd
    else:
        pair = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r", [codes], dtype=(DTYPE.value, DTYPE.value), is_pure=True, pack=4
        )
        return pair[0], pair[1]
