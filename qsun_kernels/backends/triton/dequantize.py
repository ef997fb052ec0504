"""The dense weight that a packed weight stands for.

    w[n, k] = (code[n, k] - zero[n, g(k)]) * scale[n, g(k)]          in float32, rounded once

One program a tile of BLOCK_N rows and BLOCK_K columns; every width of codes takes the same path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import DequantizeProblem, Implementation
from qsun_kernels.backends.triton.codes import load_codes, minus_zero
from qsun_kernels.backends.triton.launch import Launching, refuse
from qsun_kernels.backends.triton.numerics import load_float32, store_rounded
from qsun_kernels.quant import PackedWeight

BLOCK_N = 16
BLOCK_K = 128


@triton.jit
def dequantize_kernel(
    qweight: tl.tensor,  # int32 (N, W), the bit stream of each row
    scales: tl.tensor,  # (N, G)
    qzeros: tl.tensor,  # uint8 (N, G); None for symmetric weights
    g_idx: tl.tensor,  # int32 (K,); None where the group of column k is k // group_size
    out: tl.tensor,  # (N, K), contiguous
    N: tl.tensor,
    K: tl.tensor,
    W: tl.tensor,  # words a row
    G: tl.tensor,  # groups a row
    group_size: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    k_blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    n = ((pid // k_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    chunk = pid % k_blocks
    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N) & (k < K)
    group = k // group_size if g_idx is None else tl.load(g_idx + k, mask=k < K, other=0)
    codes = load_codes(qweight + n * W, chunk, n < N, W, BITS, BLOCK_N, BLOCK_K)
    weight = minus_zero(codes, qzeros, n * G + group, mask, BITS)
    store_rounded(out + n * K + k, weight * load_float32(scales + n * G + group, mask), mask)


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in `dtype`."""
    N, K, spec = packed.N, packed.K, packed.spec
    out = torch.empty((N, K), dtype=dtype, device=packed.device)
    grid = (-(-N // BLOCK_N) * -(-K // BLOCK_K),)
    with Launching("dequantize", out.device, lambda: f"N={N} K={K} {spec} dtype={dtype}"):
        dequantize_kernel[grid](
            packed.qweight,
            packed.scales,
            packed.qzeros,
            packed.g_idx,
            out,
            N,
            K,
            packed.qweight.shape[1],
            packed.scales.shape[1],
            spec.columns_per_group(K),
            BITS=spec.bits,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
        )
    return out


def supports(problem: DequantizeProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    return refuse(problem.device, dtype=problem.dtype)


def describe(problem: DequantizeProblem) -> str:
    """Which kernel it would be."""
    return f"dequantize_kernel: {BLOCK_N} x {BLOCK_K} weights of {problem.bits} bits a program"


DEQUANTIZE = Implementation(supports, dequantize, describe)
