"""Root-mean-square norm of each row, with an optional residual add in front.

    r = x + residual                            in float32, rounded to the dtype of x
    y = r / sqrt(mean(r^2) + eps) * weight      in float32, rounded once

The norm is of the rounded r, because that is what the caller gets and carries on.
One program a row. A row of at most BLOCK values stays in registers between the sum of squares and the
scaling; a longer one is read a second time, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, RmsNormProblem
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two, refuse, rows_of
from qsun_kernels.backends.triton.numerics import (
    device_function,
    load_float32,
    loop_bound,
    round_float32,
    store_rounded,
)

MAX_BLOCK = 8192
"""Values of a row that one program holds: 64 registers a thread at 8 warps, in 32 bits."""


@device_function
def _load_row(
    x: tl.tensor,
    residual: tl.tensor,
    x_start: tl.tensor,
    residual_start: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """x + residual of some columns of a row, as float32 but rounded to the dtype of x."""
    value = load_float32(x + x_start + column, mask)
    if residual is not None:
        value = round_float32(value + load_float32(residual + residual_start + column, mask), x)
    return value


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,  # (rows, H), rows x_stride apart
    residual: tl.tensor,  # (rows, H), rows residual_stride apart; None without a residual
    weight: tl.tensor,  # (H,)
    y: tl.tensor,  # (rows, H), contiguous
    r: tl.tensor,  # (rows, H), contiguous; None without a residual
    H: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,  # a power of two
    ROW_FITS: tl.constexpr,  # H <= BLOCK
) -> None:
    row = tl.program_id(0).to(tl.int64)
    x_start = row * x_stride
    residual_start = row * residual_stride
    out_start = row * H

    if ROW_FITS:
        column = tl.arange(0, BLOCK)
        mask = column < H
        value = _load_row(x, residual, x_start, residual_start, column, mask)
        if r is not None:
            store_rounded(r + out_start + column, value, mask)
        mean = tl.sum(value * value, axis=0) / H
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        store_rounded(y + out_start + column, value * scale * load_float32(weight + column, mask), mask)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, loop_bound(H), BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < H
            value = _load_row(x, residual, x_start, residual_start, column, mask)
            if r is not None:
                store_rounded(r + out_start + column, value, mask)
            squares += value * value
        mean = tl.sum(squares, axis=0) / H
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        for start in range(0, loop_bound(H), BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < H
            # Summed again rather than read back from r: another thread may have written it.
            value = _load_row(x, residual, x_start, residual_start, column, mask)
            store_rounded(y + out_start + column, value * scale * load_float32(weight + column, mask), mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, prefetch_weight: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm of x (..., H) by weight (H,): y (..., H), or (y, x + residual) when a residual (..., H) is
    given. prefetch_weight: nothing here begins early."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = None if residual is None else torch.empty_like(y)
    H = x.shape[-1]
    num_rows = x.numel() // H
    if num_rows > 0:
        x_rows = rows_of(x)
        residual_rows = None if residual is None else rows_of(residual)
        block = min(MAX_BLOCK, next_power_of_two(H))
        with Launching("rms_norm", x.device, lambda: f"rows={num_rows} hidden_size={H} dtype={x.dtype}"):
            rms_norm_kernel[(num_rows,)](
                x_rows,
                residual_rows,
                weight,
                y,
                r,
                H,
                x_rows.stride(0),
                0 if residual_rows is None else residual_rows.stride(0),
                float(eps),  # an integer would be a type of its own
                BLOCK=block,
                ROW_FITS=block >= H,
                num_warps=min(8, max(1, block // 512)),
            )
    return y if r is None else (y, r)


def supports(problem: RmsNormProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    return refuse(problem.device, dtype=problem.dtype)


def describe(problem: RmsNormProblem) -> str:
    """Which kernel it would be."""
    passes = "one pass" if problem.hidden_size <= MAX_BLOCK else "two passes"
    return f"rms_norm_kernel: one program a row, {passes}"


RMS_NORM = Implementation(supports, rms_norm, describe)
