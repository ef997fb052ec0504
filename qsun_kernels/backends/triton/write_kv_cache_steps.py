"""write_kv_cache with the steps before it: norm, rotary embedding and rotation of q and k; codes for k and v.

    x = x / sqrt(mean(x^2) + eps) * weight           rounded to the dtype of q, k    (see rms_norm)
    x[i], x[i + D/2] turned by the position's angle  rounded likewise                (see apply_rope)
    x = x H / sqrt(D)                                H[i, j] = (-1)^(ones of i & j)
    code = x / scale, scale = max |x| / largest code                                 (see kv_codes)

Everything is float32 from load to store. A program has one token and a block of heads of one of q, k and v;
each head is in two halves, which is what the rotary embedding pairs. The Hadamard matrix of 2**n rows is n
rounds of sums and differences: of neighbours, of pairs, ..., of halves; the last is between the two halves of
a head. Those of a half regroup the elements, which the compiler makes shuffles of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.triton.kv_codes import (
    as_bytes,
    format_of,
    quantize,
    quantize_given,
    quantize_scale,
)
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two
from qsun_kernels.backends.triton.numerics import device_function, load_float32, round_float32, store_rounded

BLOCK_PAIRS = 1024
"""Pairs of values that one program has, at most (unless one head has more)."""


@device_function
def _round_of_hadamard(
    x: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, DISTANCE: tl.constexpr
) -> tl.tensor:
    """(a, b) -> (a + b, a - b) for elements DISTANCE apart in rows of WIDTH."""
    groups = tl.reshape(x, (ROWS, WIDTH // (2 * DISTANCE), 2, DISTANCE))
    a, b = tl.split(tl.permute(groups, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, WIDTH))


@device_function
def _hadamard(
    low: tl.tensor, high: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Rows of two halves of WIDTH = 2**ROUNDS times the Hadamard matrix over sqrt(2 * WIDTH)."""
    for i in tl.static_range(ROUNDS):
        low = _round_of_hadamard(low, ROWS, WIDTH, 1 << i)
        high = _round_of_hadamard(high, ROWS, WIDTH, 1 << i)
    NORM: tl.constexpr = (2 * WIDTH) ** -0.5
    return (low + high) * NORM, (low - high) * NORM


@device_function
def _prepare(
    x: tl.tensor,  # pointers to the heads of a token
    head: tl.tensor,  # (ROWS, 1)
    num_heads: tl.tensor,
    pair: tl.tensor,  # (1, BLOCK_PAIR)
    head_dim: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    ROPE: tl.constexpr,
    ROTATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PAIR: tl.constexpr,
    ROUNDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of each head after its steps; zeros where there is none. weight: None without a norm."""
    half = tl.cdiv(head_dim, 2)
    in_low = (head < num_heads) & (pair < half)
    in_high = (head < num_heads) & (half + pair < head_dim)
    low = load_float32(x + head * head_dim + pair, in_low)
    high = load_float32(x + head * head_dim + half + pair, in_high)
    if weight is not None:
        mean = tl.sum(low * low + high * high, axis=1) / head_dim
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        low = round_float32(low * scale * load_float32(weight + pair, pair < half), x)
        high = round_float32(high * scale * load_float32(weight + half + pair, half + pair < head_dim), x)
    if ROPE:
        turned = round_float32(low * cos - high * sin, x)
        high = round_float32(high * cos + low * sin, x)
        low = turned
    if ROTATE:
        low, high = _hadamard(low, high, ROWS, BLOCK_PAIR, ROUNDS)
    return low, high


@device_function
def _store_codes(
    row: tl.tensor,  # pointers (ROWS, 1) to the first byte of each head, or of its second half
    codes: tl.tensor,  # uint32 (ROWS, BLOCK_PAIR)
    pair: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,  # elements of the half
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PAIR: tl.constexpr,
) -> None:
    if FORMAT == "int4":
        even, odd = tl.split(tl.reshape(codes, (ROWS, BLOCK_PAIR // 2, 2)))
        byte = tl.arange(0, BLOCK_PAIR // 2)[None, :]
        tl.store(row + byte, (even | odd << 4).to(tl.uint8), mask=mask & (2 * byte < size))
    else:
        tl.store(row + pair, codes.to(tl.uint8), mask=mask & (pair < size))


@device_function
def _append(
    low: tl.tensor,
    high: tl.tensor,
    cache: tl.tensor,
    cache_scale: tl.tensor,
    cache_row: tl.tensor,  # (ROWS, 1): where a head lies, in heads
    pair: tl.tensor,
    head_dim: tl.tensor,
    mask: tl.tensor,  # (ROWS, 1)
    FORMAT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PAIR: tl.constexpr,
) -> None:
    half = tl.cdiv(head_dim, 2)
    if FORMAT == "numbers":
        row = cache + cache_row * head_dim
        store_rounded(row + pair, low, mask & (pair < half))
        store_rounded(row + half + pair, high, mask & (half + pair < head_dim))
    else:
        if ONE_SCALE:
            inverse = tl.div_rn(1.0, tl.load(cache_scale))
            low_codes = quantize_given(low, inverse)
            high_codes = quantize_given(high, inverse)
        else:
            low_bits = low.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            high_bits = high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            scale, inverse = quantize_scale(tl.max(tl.maximum(low_bits, high_bits), axis=1)[:, None], FORMAT)
            tl.store(cache_scale + cache_row, scale, mask=mask)
            low_codes = quantize(low, inverse, FORMAT)
            high_codes = quantize(high, inverse, FORMAT)
        PER_BYTE: tl.constexpr = 2 if FORMAT == "int4" else 1
        row = cache + cache_row * (head_dim // PER_BYTE)
        _store_codes(row, low_codes, pair, mask, half, FORMAT, ROWS, BLOCK_PAIR)
        _store_codes(
            row + half // PER_BYTE, high_codes, pair, mask, head_dim - half, FORMAT, ROWS, BLOCK_PAIR
        )


@triton.jit
def write_kv_cache_steps_kernel(
    q: tl.tensor,  # (T, num_q_heads, head_dim), tokens q_stride apart; None without queries
    k: tl.tensor,  # (T, num_kv_heads, head_dim), tokens k_stride apart
    v: tl.tensor,  # (T, num_kv_heads, head_dim), tokens v_stride apart
    q_out: tl.tensor,  # as q, contiguous; None without queries
    k_cache: tl.tensor,  # (num_blocks, num_kv_heads, block_size, head_dim, or half as many bytes for int4)
    v_cache: tl.tensor,  # as k_cache
    k_scale: tl.tensor,  # float32 (num_blocks, num_kv_heads, block_size), or (1,), or None for numbers
    v_scale: tl.tensor,  # as k_scale
    slot_mapping: tl.tensor,  # int64 (T,)
    positions: tl.tensor,  # int64 (T,); None without a rotary embedding
    cos_sin: tl.tensor,  # float32 (max_positions, head_dim): cosines, then sines; None likewise
    q_norm: tl.tensor,  # (head_dim,), or None
    k_norm: tl.tensor,  # (head_dim,), or None
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    num_q_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    head_dim: tl.tensor,
    block_size: tl.tensor,
    eps: tl.tensor,
    FORMAT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIR: tl.constexpr,
    ROUNDS: tl.constexpr,  # log2(BLOCK_PAIR)
) -> None:
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    ROPE: tl.constexpr = positions is not None
    pair = tl.arange(0, BLOCK_PAIR)[None, :]
    half = tl.cdiv(head_dim, 2)
    cos = 1.0
    sin = 0.0
    if ROPE:
        angles = cos_sin + tl.load(positions + token) * head_dim
        cos = tl.load(angles + pair, mask=pair < half, other=0.0)
        sin = tl.load(angles + half + pair, mask=pair < half, other=0.0)

    q_blocks = 0
    if q is not None:
        q_blocks = tl.cdiv(num_q_heads, BLOCK_H)
        if block < q_blocks:
            head = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            low, high = _prepare(
                *(q + token * q_stride, head, num_q_heads, pair, head_dim, q_norm, eps, cos, sin),
                *(ROPE, ROTATE, BLOCK_H, BLOCK_PAIR, ROUNDS),
            )
            row = q_out + (token * num_q_heads + head) * head_dim
            store_rounded(row + pair, low, (head < num_q_heads) & (pair < half))
            store_rounded(row + half + pair, high, (head < num_q_heads) & (half + pair < head_dim))
    slot = tl.load(slot_mapping + token)
    if (block >= q_blocks) & (slot >= 0):
        kv_blocks = tl.cdiv(num_kv_heads, BLOCK_H)
        kv_block = block - q_blocks
        head = (kv_block % kv_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        cache_row = ((slot // block_size) * num_kv_heads + head) * block_size + slot % block_size
        mask = head < num_kv_heads
        if kv_block < kv_blocks:
            low, high = _prepare(
                *(k + token * k_stride, head, num_kv_heads, pair, head_dim, k_norm, eps, cos, sin),
                *(ROPE, ROTATE, BLOCK_H, BLOCK_PAIR, ROUNDS),
            )
            _append(
                *(low, high, k_cache, k_scale, cache_row, pair, head_dim, mask),
                *(FORMAT, ONE_SCALE, BLOCK_H, BLOCK_PAIR),
            )
        else:
            low, high = _prepare(
                *(v + token * v_stride, head, num_kv_heads, pair, head_dim, None, eps, cos, sin),
                *(False, False, BLOCK_H, BLOCK_PAIR, ROUNDS),
            )
            _append(
                *(low, high, v_cache, v_scale, cache_row, pair, head_dim, mask),
                *(FORMAT, ONE_SCALE, BLOCK_H, BLOCK_PAIR),
            )


def write_kv_cache_steps(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q: Tensor | None,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotate: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor | None:
    """k, v (T, Hkv, D) into the caches; q (T, Hq, D) after its steps, contiguous, or None without one."""
    T, num_kv_heads, head_dim = k.shape
    q_out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if T == 0:
        return q_out
    num_q_heads = 0 if q is None else q.shape[1]
    # Two elements make a byte of 4-bit codes, so that a half has to have two.
    block_pair = max(2, next_power_of_two(-(-head_dim // 2))) if not rotate else max(1, head_dim // 2)
    block_h = max(1, min(BLOCK_PAIRS // block_pair, next_power_of_two(max(num_q_heads, num_kv_heads))))
    blocks = -(-num_q_heads // block_h) + 2 * -(-num_kv_heads // block_h)

    def shapes() -> str:
        return (
            f"T={T} heads={num_q_heads}/{num_kv_heads} head_dim={head_dim} dtype={k.dtype} "
            f"cache={tuple(k_cache.shape)} {k_cache.dtype} norm={k_norm is not None} "
            f"rope={positions is not None} rotate={rotate}"
        )

    with Launching("write_kv_cache", k.device, shapes):
        write_kv_cache_steps_kernel[(T, blocks)](
            q,
            k,
            v,
            q_out,
            as_bytes(k_cache),
            as_bytes(v_cache),
            k_scale,
            v_scale,
            slot_mapping,
            positions,
            cos_sin,
            q_norm,
            k_norm,
            0 if q is None else q.stride(0),
            k.stride(0),
            v.stride(0),
            num_q_heads,
            num_kv_heads,
            head_dim,
            k_cache.shape[2],
            float(eps),  # an integer would be a type of its own
            FORMAT=format_of(k_cache.dtype),
            ONE_SCALE=k_scale is not None and k_scale.dim() == 1,
            ROTATE=rotate,
            BLOCK_H=block_h,
            BLOCK_PAIR=block_pair,
            ROUNDS=block_pair.bit_length() - 1,
            num_warps=4,
        )
    return q_out
