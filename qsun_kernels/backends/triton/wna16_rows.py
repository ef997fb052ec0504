"""x (M, K) times a weight of 2, 3, 4 or 8 bits (N, K), read in its canonical layout ("triton.rows").

A program computes BLOCK_N outputs of BLOCK_M tokens over one split of K, in chunks of BLOCK_K columns:

                                       K
               +-------+-------+-------++-------+-------+-------+
      BLOCK_N  | chunk | chunk | chunk || chunk | chunk | chunk |      codes: rows of a bit stream
               +-------+-------+-------++-------+-------+-------+
                        split 0                  split 1               sums: (BLOCK_N, BLOCK_M) a split

The weights are the left operand of the product: their tile is what tensor cores want 16 or 64 rows of, while
the tokens may be few. Within a chunk all columns of a row share one group, because BLOCK_K divides the group
size: the tensor cores multiply (code - zero), a small integer that float16 and bfloat16 hold exactly, and the
scale is applied to the sum in float32. So the only rounding of a 16-bit problem is the last one.

With a g_idx (act-order) neighbouring columns are of different groups, so each weight gets its scale before
the product; the weights then need more than 16 bits, and the product is of float32 weights in three TF32
passes (which hold the 16-bit x exactly), or in plain float32 when x is.

Few tokens times few rows are few programs, so K is split: each split writes its float32 sums, and a second
kernel adds them in order.

This kernel runs every format. It is the one for float32, codes of 3 bits and act-order groups of uneven size;
the others have a faster one in `wna16_tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import PreparedWeight
from qsun_kernels.backends.triton.codes import load_codes, minus_zero
from qsun_kernels.backends.triton.launch import Launching, multiprocessors
from qsun_kernels.backends.triton.numerics import (
    INTERPRETED,
    load_float32,
    loop_bound,
    store_rounded,
    to_float32,
)
from qsun_kernels.backends.triton.warpgroup_products import multiplies_by_warpgroups, wait_for_products
from qsun_kernels.backends.triton.wna16_combine import combine_splits

LAYOUT = "triton.rows"

MAX_SPLITS = 8


@dataclass(frozen=True, slots=True)
class RowsConfig:
    """How the work is cut: see the picture above. num_stages: chunks in flight."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def choose(
    M: int,
    N: int,
    K: int,
    group_size: int | Literal["channel"],
    has_g_idx: bool,
    dtype: torch.dtype,
    num_multiprocessors: int,
) -> RowsConfig:
    """The configuration for M tokens; a function of its arguments alone."""
    if dtype == torch.float32 or has_g_idx:
        # Operands of 32 bits: tiles of half the size take the same shared memory and registers.
        block_m, block_n, largest_k = (16 if M <= 16 else 32), 32, 32
    else:
        block_m = 16 if M <= 16 else 32 if M <= 32 else 64
        block_n, largest_k = 64, (128 if M <= 16 else 64)
    block_k = largest_k if group_size == "channel" else min(group_size, largest_k)

    tiles = -(-M // block_m) * -(-N // block_n)
    chunks = -(-K // block_k)
    splits = 1
    # Three programs on two multiprocessors hide each other's latencies; under 4 chunks, adding costs most.
    while splits < MAX_SPLITS and 2 * tiles * splits < 3 * num_multiprocessors and chunks >= 8 * splits:
        splits *= 2
    num_stages = 4 if block_m == 16 and block_n == 64 else 3
    return RowsConfig(block_m, block_n, block_k, splits, num_warps=4, num_stages=num_stages)


@triton.jit(do_not_specialize=["M"])
def wna16_rows_kernel(
    x: tl.tensor,  # (M, K), rows x_stride apart
    qweight: tl.tensor,  # int32 (N, W), the bit stream of each row
    scales: tl.tensor,  # (N, G)
    qzeros: tl.tensor,  # uint8 (N, G); None for symmetric weights
    g_idx: tl.tensor,  # int32 (K,); None where groups are runs of GROUP_SIZE columns, or one
    bias: tl.tensor,  # (N,) or None
    residual: tl.tensor,  # (M, N), rows residual_stride apart, or None
    out: tl.tensor,  # (M, N), rows out_stride apart; with SPLITS > 1 float32 (SPLITS, M, N), contiguous
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    W: tl.tensor,  # words a row
    G: tl.tensor,  # groups a row
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # a multiple of BLOCK_K; 0 when a row is one group
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPGROUPS: tl.constexpr,  # four warps may multiply at once, see `warpgroup_products`
) -> None:
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    m = ((pid % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
    n = ((pid // m_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    m_mask = m < M
    n_mask = n < N

    code_rows = qweight + n * W
    chunks = tl.cdiv(K, BLOCK_K)
    chunks_a_split = tl.cdiv(chunks, SPLITS)
    first = split * chunks_a_split
    last = tl.minimum(first + chunks_a_split, chunks)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for chunk in range(loop_bound(first), loop_bound(last)):
        k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + m * x_stride + k[:, None], mask=m_mask & (k[:, None] < K), other=0.0)
        codes = load_codes(code_rows, chunk, n_mask, W, BITS, BLOCK_N, BLOCK_K)
        if g_idx is not None:
            group = tl.load(g_idx + k, mask=k < K, other=0)[None, :]
            mask = n_mask & (k[None, :] < K)
            weight = minus_zero(codes, qzeros, n * G + group, mask, BITS)
            weight = weight * load_float32(scales + n * G + group, mask)
            if x.dtype.element_ty == tl.float32:
                acc = tl.dot(weight, x_tile, acc, input_precision="ieee")
            else:
                acc = tl.dot(weight, to_float32(x_tile), acc, input_precision="tf32x3")
        else:
            group = chunk * BLOCK_K // GROUP_SIZE if GROUP_SIZE != 0 else 0
            weight = minus_zero(codes, qzeros, n * G + group, n_mask, BITS)
            if INTERPRETED:
                x_tile = to_float32(x_tile)
            else:
                weight = weight.to(x.dtype.element_ty)
            if GROUP_SIZE != 0:
                scale = load_float32(scales + n * G + group, n_mask)
                acc += tl.dot(weight, x_tile, input_precision="ieee") * scale
            else:
                acc = tl.dot(weight, x_tile, acc, input_precision="ieee")
        if WARPGROUPS:
            # The next chunk writes the registers of `weight`.
            wait_for_products()
    if g_idx is None and GROUP_SIZE == 0:
        acc *= load_float32(scales + n * G, n_mask)

    if bias is not None:
        acc += load_float32(bias + n, n_mask)
    mask = n_mask & m_mask
    if residual is not None:
        acc += load_float32(residual + m * residual_stride + n, mask)
    store_rounded(out + (split * M.to(tl.int64) + m) * out_stride + n, acc, mask)


def multiply(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    tokens: int,
    config: RowsConfig | None,
) -> None:
    """x (M, K) @ weight (N, K).T (+ bias (N,)) (+ residual (M, N)) -> out (M, N), for M > 0.

    x and residual: rows of contiguous values. tokens: the number that the work is cut for, where `config`
    does not say how.
    """
    M, N, K, spec = x.shape[0], weight.N, weight.K, weight.spec
    qweight, scales, *optional = weight.tensors
    num_groups = scales.shape[1]
    one_group = num_groups == 1
    qzeros = None if spec.symmetric else optional.pop(0)
    # With one group every column is of that group, whatever the order.
    g_idx = optional.pop() if optional and not one_group else None
    if config is None:
        config = choose(tokens, N, K, spec.group_size, g_idx is not None, x.dtype, multiprocessors(x.device))
    split = config.splits > 1
    sums = torch.empty((config.splits, M, N), dtype=torch.float32, device=x.device) if split else out

    def shapes() -> str:
        return f"M={M} N={N} K={K} {spec} dtype={x.dtype} {config}"

    with Launching("wna16_linear", x.device, shapes):
        grid = (-(-M // config.block_m) * -(-N // config.block_n), config.splits)
        wna16_rows_kernel[grid](
            x,
            qweight,
            scales,
            qzeros,
            g_idx,
            None if split else bias,
            None if split else residual,
            sums,
            M,
            N,
            K,
            qweight.shape[1],
            num_groups,
            x.stride(0),
            0 if split or residual is None else residual.stride(0),
            N if split else out.stride(0),
            BITS=spec.bits,
            GROUP_SIZE=0 if one_group else spec.group_size,
            SPLITS=config.splits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            WARPGROUPS=multiplies_by_warpgroups(x.device),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if split:
            combine_splits(sums, bias, residual, out)
