"""The second half of a matmul whose K was split: the float32 sums of the splits, added in order.

Which program of the first kernel ends first does not enter, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.triton.dependent_launch import let_next_kernel_start, wait_for_earlier_kernels
from qsun_kernels.backends.triton.numerics import load_float32, store_rounded

BLOCK = 256
"""Outputs a program: few, so that one token of a narrow weight still spreads over the device."""


@triton.jit(do_not_specialize=["M"])
def wna16_combine_kernel(
    sums: tl.tensor,  # float32 (SPLITS, M, N)
    bias: tl.tensor,  # (N,) or None
    residual: tl.tensor,  # (M, N), rows residual_stride apart, or None
    out: tl.tensor,  # (M, N), rows out_stride apart
    M: tl.tensor,
    N: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,  # launched while the kernel that writes `sums` runs
) -> None:
    if EARLY:
        let_next_kernel_start()
        wait_for_earlier_kernels()
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    m = (pid // blocks).to(tl.int64)
    n = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + (split * M.to(tl.int64) + m) * N + n, mask=mask, other=0.0)
    if bias is not None:
        total += load_float32(bias + n, mask)
    if residual is not None:
        total += load_float32(residual + m * residual_stride + n, mask)
    store_rounded(out + m * out_stride + n, total, mask)


def combine_splits(
    sums: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, *, early: bool = False
) -> None:
    """sums float32 (splits, M, N) (+ bias (N,)) (+ residual (M, N)) -> out (M, N)."""
    splits, M, N = sums.shape
    # An option that is left out is one that older devices and Triton's interpreter need not know.
    options = {"launch_pdl": True} if early else {}
    wna16_combine_kernel[(M * -(-N // BLOCK),)](
        sums,
        bias,
        residual,
        out,
        M,
        N,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        SPLITS=splits,
        BLOCK=BLOCK,
        EARLY=early,
        num_warps=BLOCK // 128,
        **options,
    )
