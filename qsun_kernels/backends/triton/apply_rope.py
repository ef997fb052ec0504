"""Rotary position embedding of query and key heads, half-split pairs.

Position p turns the pair (x[i], x[i + D/2]) of every head by the angle whose cosine and sine the table holds:

    out[i]       = x[i] * cos[p, i] - x[i + D/2] * sin[p, i]
    out[i + D/2] = x[i + D/2] * cos[p, i] + x[i] * sin[p, i]          in float32, rounded once

(J. Su et al., RoFormer, arXiv 2104.09864, section 3.2.2; the pairing is that of GPT-NeoX and Llama
checkpoints.) One launch turns q and k: programs of a token are dealt to blocks of query heads first, then to
blocks of key heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import ApplyRopeProblem, Implementation
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two, refuse
from qsun_kernels.backends.triton.numerics import device_function, load_float32, store_rounded

BLOCK_PAIRS = 1024
"""Pairs that one program turns, at most (unless one head has more)."""


@device_function
def _rotate(
    x: tl.tensor,
    out: tl.tensor,
    head: tl.tensor,
    num_heads: tl.tensor,
    pair: tl.tensor,
    half: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
) -> None:
    """Turn heads `head` (BLOCK_H, 1) of one token; x and out are the addresses of its first head."""
    mask = (head < num_heads) & (pair < half)
    first = head * (2 * half) + pair
    low = load_float32(x + first, mask)
    high = load_float32(x + first + half, mask)
    store_rounded(out + first, low * cos - high * sin, mask)
    store_rounded(out + first + half, high * cos + low * sin, mask)


@triton.jit
def apply_rope_kernel(
    q: tl.tensor,  # (T, num_q_heads, D), tokens q_stride apart
    k: tl.tensor,  # (T, num_kv_heads, D), tokens k_stride apart
    positions: tl.tensor,  # int64 (T,)
    cos_sin: tl.tensor,  # float32 (max_positions, D): D/2 cosines, then D/2 sines
    q_out: tl.tensor,  # (T, num_q_heads, D), contiguous
    k_out: tl.tensor,  # (T, num_kv_heads, D), contiguous
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    num_q_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    half: tl.tensor,  # D/2
    BLOCK_H: tl.constexpr,
    BLOCK_PAIR: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(num_q_heads, BLOCK_H)

    pair = tl.arange(0, BLOCK_PAIR)[None, :]
    row = cos_sin + tl.load(positions + token) * (2 * half)
    cos = tl.load(row + pair, mask=pair < half, other=0.0)
    sin = tl.load(row + half + pair, mask=pair < half, other=0.0)

    if block < q_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        q_token = q + token * q_stride
        _rotate(q_token, q_out + token * num_q_heads * (2 * half), head, num_q_heads, pair, half, cos, sin)
    else:
        head = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        k_token = k + token * k_stride
        _rotate(k_token, k_out + token * num_kv_heads * (2 * half), head, num_kv_heads, pair, half, cos, sin)


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, Hq, D) and k (T, Hk, D) turned by their positions (T,): contiguous tensors of the same shapes."""
    T, num_q_heads, D = q.shape
    num_kv_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if T > 0:
        half = D // 2
        block_pair = next_power_of_two(half)
        block_h = max(1, min(BLOCK_PAIRS // block_pair, next_power_of_two(max(num_q_heads, num_kv_heads))))
        grid = (T, -(-num_q_heads // block_h) + -(-num_kv_heads // block_h))

        def shapes() -> str:
            return f"T={T} heads={num_q_heads}/{num_kv_heads} head_dim={D} dtype={q.dtype}"

        with Launching("apply_rope", q.device, shapes):
            apply_rope_kernel[grid](
                q,
                k,
                positions,
                cos_sin,
                q_out,
                k_out,
                q.stride(0),
                k.stride(0),
                num_q_heads,
                num_kv_heads,
                half,
                BLOCK_H=block_h,
                BLOCK_PAIR=block_pair,
                num_warps=4,
            )
    return q_out, k_out


def supports(problem: ApplyRopeProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    return refuse(problem.device, dtype=problem.dtype)


def describe(problem: ApplyRopeProblem) -> str:
    """Which kernel it would be."""
    return f"apply_rope_kernel: q and k in one launch, {problem.head_dim // 2} pairs a head"


APPLY_ROPE = Implementation(supports, apply_rope, describe)
