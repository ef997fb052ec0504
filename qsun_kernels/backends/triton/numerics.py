"""Device functions that every Triton kernel here shares: conversions to and from float32, an exponential.

Kernels compute in float32 and round once, when they store. Under Triton's interpreter
(``TRITON_INTERPRET=1``) blocks are numpy arrays, and numpy has no bfloat16: the interpreter keeps such values
as 16-bit integers, truncates where the GPU rounds to nearest even, and would add or multiply the integers.
The conversions below are therefore the only way bfloat16 values enter and leave a kernel: on a GPU they are
the plain instruction, interpreted they work on the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

# Triton reads TRITON_INTERPRET when a function is decorated, and its own library was decorated when it was
# imported.
INTERPRETED = tl.constexpr(not isinstance(tl.sum, JITFunction))


def device_function(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what kernels call.

    Interpreted, the function itself: the kernel that calls it runs as Python, in the language as the
    interpreter has set it up. For a decorated one it would set that up anew at every call, which takes longer
    than most of these functions do.
    """
    return function if INTERPRETED else triton.jit(function)


@device_function
def loop_bound(x: tl.tensor) -> tl.tensor:
    """A bound of `range` that is known only when the kernel runs.

    The interpreter hands numpy arrays of one element to `range`, which numpy 2.4 refuses to convert; here
    they become Python integers. On a GPU this is nothing.
    """
    if INTERPRETED:
        return x.handle.data.item()
    return x


@device_function
def to_float32(x: tl.tensor) -> tl.tensor:
    """A float16, bfloat16 or float32 block as float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@device_function
def load_float32(pointers: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Load a floating-point block as float32, zero where `mask` is false."""
    return to_float32(tl.load(pointers, mask=mask, other=0.0))


@device_function
def _nearest_bfloat16(x: tl.tensor) -> tl.tensor:
    """The bits of a float32 block rounded to bfloat16, to nearest even, in the low half of uint32."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN must not be carried into infinity by the rounding: keep it, and keep it quiet.
    return tl.where(x == x, nearest, (bits >> 16) | 0x40)


@device_function
def round_float32(x: tl.tensor, pointers: tl.tensor) -> tl.tensor:
    """A float32 block rounded to the dtype that `pointers` point to, as float32."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        return (_nearest_bfloat16(x) << 16).to(tl.float32, bitcast=True)
    return x.to(pointers.dtype.element_ty).to(tl.float32)


@device_function
def store_rounded(pointers: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """Store a float32 block in the dtype that `pointers` point to, rounded to nearest even."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        x = _nearest_bfloat16(x).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@device_function
def exp_float32(x: tl.tensor) -> tl.tensor:
    """exp(x) to a few units in the last place for every float32 x; a NaN may become a number.

    The hardware has 2**x only, and rounding x * log2(e) to float32 costs about |x| units in the last place.
    Here x = n * ln(2) + r with ln(2) in two parts, the first so short that n times it is exact (W. J. Cody
    and W. Waite, Software Manual for the Elementary Functions, 1980, chapter 6), and exp(x) = 2**n * exp(r)
    with |r| <= 0.35.
    """
    # Beyond these bounds the result is 0 or infinity anyway, and an infinite x would give inf - inf.
    x = tl.minimum(tl.maximum(x, -110.0), 90.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.1219444005469057e-4
    # 2**n in two factors: in one it overflows, or underflows, where the product does not.
    half = tl.floor(n * 0.5)
    return tl.exp(r) * tl.exp2(half) * tl.exp2(n - half)


@device_function
def tanh_float32(x: tl.tensor) -> tl.tensor:
    """tanh(x) to a few units in the last place for every float32 x; a NaN stays one.

    Near 0, where 1 - 2 / (exp(2 |x|) + 1) would cancel, five terms of Lambert's continued fraction (J. H.
    Lambert, 1768), x / (1 + x^2 / (3 + x^2 / (5 + ...))): below 0.6 it errs by less than 1e-9 of the result.
    """
    magnitude = tl.abs(x)
    # Far out exp overflows, and the quotient is 0, as it should be.
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    return tl.where(magnitude < 0.6, near, tl.where(x < 0.0, -far, far))
