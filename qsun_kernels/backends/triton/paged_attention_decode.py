"""One query token a request against the keys and values of its blocks.

    s[t] = softmax_scale * q . k[t],    lse = log sum_t exp(s[t]),    out = sum_t exp(s[t] - lse) v[t]

over the last min(window, seq_len) positions t of request b. A program has one request, the query heads of one
KV head (so that each key and value is read once for the whole group) and one part of the positions:

      positions   start ...................................... seq_len
                  | tile | tile | tile || tile | tile | tile ||          one program a part
                      part 0                part 1

The softmax is computed online (M. Milakov and N. Gimelshein, arXiv 1805.02867). With several parts each
writes its sum of values relative to its own maximum, its maximum and its sum of weights; a second kernel adds
the parts in order, so results repeat bit for bit. The number of parts depends on sizes that the host knows,
where a part begins and ends on the length that the device reads: one captured graph serves every length.

Tokens are looked up one by one in the block table, so any block size does, and neither a block-table entry
nor a cache slot outside the attended positions is ever read: what is in there cannot matter, be it NaN.

Weights of the softmax stay accurate to float32 beside 16-bit values: the weight is split into two 16-bit
numbers whose products are added, since the tensor cores have nothing else to do while the cache streams in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, PagedAttentionDecodeProblem
from qsun_kernels.backends.triton.launch import Launching, multiprocessors, next_power_of_two, refuse
from qsun_kernels.backends.triton.numerics import (
    INTERPRETED,
    loop_bound,
    store_rounded,
    to_float32,
)

MAX_HEAD_DIM = 256

MAX_BLOCK_H = 32
"""Query heads of one program; a larger group is cut, and its keys and values are read once a piece."""

MIN_PART = 256
"""Positions under which a further part costs more to combine than it saves."""

MAX_PARTS = 128

TILE_VALUES = 8192
"""Numbers in a tile of keys; with the tile of values and the next two in flight, 64 KiB in 16 bits."""

NO_WINDOW = 2**31 - 1


def choose_parts(programs: int, capacity: int, num_multiprocessors: int) -> int:
    """Parts that the positions of a request are cut in; a function of its arguments alone.

    programs: how many there are with one part. capacity: the most positions a request can attend to.
    """
    wanted = -(-4 * num_multiprocessors // programs)
    return max(1, min(wanted, -(-capacity // MIN_PART), MAX_PARTS))


def choose_tile(head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> int:
    """Positions of a tile: 16 to 128."""
    # Products of float32 run without tensor cores and hold their operands in registers; two different dtypes
    # meet in float32.
    in_16_bits = dtype == kv_dtype != torch.float32
    values = TILE_VALUES if in_16_bits else TILE_VALUES // 4
    return max(16, min(128, values // max(16, next_power_of_two(head_dim))))


@triton.jit
def _weighted_sum(p: tl.tensor, v: tl.tensor, IN_16_BITS: tl.constexpr) -> tl.tensor:
    """p (BLOCK_H, TILE) float32 times v (TILE, BLOCK_D)."""
    if INTERPRETED or not IN_16_BITS:
        return tl.dot(p, to_float32(v), input_precision="ieee")
    else:
        high = p.to(v.dtype)
        low = (p - high.to(tl.float32)).to(v.dtype)
        return tl.dot(low, v, tl.dot(high, v))


@triton.jit(do_not_specialize=["window"])
def paged_attention_decode_kernel(
    q: tl.tensor,  # (B, NUM_KV_HEADS * GROUP, HEAD_DIM), tokens q_stride apart
    k_cache: tl.tensor,  # (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), contiguous
    v_cache: tl.tensor,  # as k_cache
    block_table: tl.tensor,  # int32 (B, max_blocks), rows table_stride apart
    seq_lens: tl.tensor,  # int32 (B,)
    # Without PARTIAL the results: (B, heads, HEAD_DIM) and float32 (B, heads). With it, of each part and
    # relative to its maximum of s: float32 (B, heads, parts, HEAD_DIM), sum of exp(s - maximum) v; float32
    # (B, heads, parts, 2), the maximum and the sum of exp(s - maximum).
    out: tl.tensor,
    lse: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    softmax_scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    H_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    b = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1) // H_BLOCKS
    part = tl.program_id(2)
    parts = tl.num_programs(2)

    in_group = (tl.program_id(1) % H_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, BLOCK_D)
    head_mask = in_group < GROUP
    d_mask = d < HEAD_DIM
    q_mask = head_mask[:, None] & d_mask[None, :]
    query = tl.load(q + b * q_stride + head[:, None] * HEAD_DIM + d[None, :], mask=q_mask, other=0.0)
    # Two different dtypes meet in float32.
    SAME_DTYPE: tl.constexpr = q.dtype.element_ty == k_cache.dtype.element_ty
    IN_16_BITS: tl.constexpr = SAME_DTYPE and q.dtype.element_ty != tl.float32
    if INTERPRETED or not SAME_DTYPE:
        query = to_float32(query)

    length = tl.load(seq_lens + b)
    start = tl.maximum(length - window, 0)
    tiles = tl.cdiv(length - start, TILE)
    tiles_a_part = tl.cdiv(tiles, parts)
    first = part * tiles_a_part
    last = tl.minimum(first + tiles_a_part, tiles)

    maximum = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for tile in range(loop_bound(first), loop_bound(last)):
        position = start + tile * TILE + tl.arange(0, TILE)
        valid = position < length
        entry = block_table + b * table_stride + position // BLOCK_SIZE
        block = tl.load(entry, mask=valid, other=0).to(tl.int64)
        row = ((block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * HEAD_DIM

        keys = tl.load(k_cache + row[None, :] + d[:, None], mask=d_mask[:, None] & valid[None, :], other=0.0)
        if INTERPRETED or not SAME_DTYPE:
            keys = to_float32(keys)
        s = tl.dot(query, keys, input_precision="ieee") * softmax_scale
        # The first position of a tile is always valid, so no row is wholly -inf.
        s = tl.where(valid[None, :], s, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(s, axis=1))
        p = tl.exp(s - new_maximum[:, None])
        rescale = tl.exp(maximum - new_maximum)
        values = tl.load(
            v_cache + row[:, None] + d[None, :], mask=valid[:, None] & d_mask[None, :], other=0.0
        )
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None] + _weighted_sum(p, values, IN_16_BITS)
        maximum = new_maximum

    out_head = b * NUM_Q_HEADS + head
    if PARTIAL:
        slot = out_head * parts + part
        tl.store(lse + slot * 2, maximum, mask=head_mask)
        tl.store(lse + slot * 2 + 1, total, mask=head_mask)
        # A part without positions has weight zero, and its sums are not read.
        if first < last:
            tl.store(out + slot[:, None] * HEAD_DIM + d[None, :], acc, mask=q_mask)
    else:
        result = tl.div_rn(acc, tl.where(total == 0.0, 1.0, total)[:, None])
        store_rounded(out + out_head[:, None] * HEAD_DIM + d[None, :], result, q_mask)
        log_sum = tl.where(total == 0.0, float("-inf"), maximum + tl.log(total))
        tl.store(lse + out_head, log_sum, mask=head_mask)


@triton.jit(do_not_specialize=["parts"])
def paged_attention_combine_kernel(
    sums: tl.tensor,  # float32 (B, heads, parts, HEAD_DIM)
    weights: tl.tensor,  # float32 (B, heads, parts, 2): maximum of s, sum of exp(s - maximum)
    out: tl.tensor,  # (B, heads, HEAD_DIM), contiguous
    lse: tl.tensor,  # float32 (B, heads)
    parts: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,  # a power of two, at least `parts`
) -> None:
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_DIM
    every = tl.arange(0, BLOCK_PARTS)
    own = weights + head * parts * 2
    maxima = tl.load(own + every * 2, mask=every < parts, other=float("-inf"))
    maximum = tl.max(maxima, axis=0)

    total = tl.full((1,), 0.0, tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(0, loop_bound(parts)):
        part_total = tl.load(own + part * 2 + 1)
        # Zero only for a part without positions, whose sums were never written; a NaN is carried on.
        if part_total != 0.0:
            rescale = tl.exp(tl.load(own + part * 2) - maximum)
            total += part_total * rescale
            acc += rescale * tl.load(sums + (head * parts + part) * HEAD_DIM + d, mask=d_mask, other=0.0)

    store_rounded(out + head * HEAD_DIM + d, tl.div_rn(acc, tl.where(total == 0.0, 1.0, total)), d_mask)
    log_sum = tl.where(total == 0.0, float("-inf"), maximum + tl.log(total))
    tl.store(lse + head + tl.arange(0, 1), log_sum)


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, Hq, D), lse float32 (B, Hq)) of q (B, Hq, D) over caches (num_blocks, Hkv, block_size, D).

    parts: how many parts the positions are cut in; `choose_parts` decides when it is None.
    """
    B, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    out = torch.empty((B, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, num_q_heads), dtype=torch.float32, device=q.device)
    if B == 0:
        return out, lse
    group = num_q_heads // num_kv_heads
    block_h = max(16, min(MAX_BLOCK_H, next_power_of_two(group)))
    block_d = max(16, next_power_of_two(head_dim))
    head_blocks = num_kv_heads * -(-group // block_h)
    if parts is None:
        capacity = block_table.shape[1] * block_size
        attended = capacity if window is None else min(window, capacity)
        parts = choose_parts(B * head_blocks, attended, multiprocessors(q.device))
    partial = parts > 1
    sums, weights = out, lse
    if partial:
        sums = torch.empty((B, num_q_heads, parts, head_dim), dtype=torch.float32, device=q.device)
        weights = torch.empty((B, num_q_heads, parts, 2), dtype=torch.float32, device=q.device)

    def shapes() -> str:
        return (
            f"q={tuple(q.shape)} {q.dtype} cache={tuple(k_cache.shape)} {k_cache.dtype} "
            f"block_table={tuple(block_table.shape)} window={window} parts={parts}"
        )

    with Launching("paged_attention_decode", q.device, shapes):
        paged_attention_decode_kernel[(B, head_blocks, parts)](
            q,
            k_cache,
            v_cache,
            block_table,
            seq_lens,
            sums,
            weights,
            q.stride(0),
            block_table.stride(0),
            NO_WINDOW if window is None else min(window, NO_WINDOW),
            float(softmax_scale),  # an integer would be a type of its own
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            PARTIAL=partial,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            TILE=choose_tile(head_dim, q.dtype, k_cache.dtype),
            num_warps=4 if q.dtype == k_cache.dtype else 8,
            num_stages=3,
        )
        if partial:
            paged_attention_combine_kernel[(B * num_q_heads,)](
                sums,
                weights,
                out,
                lse,
                parts,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                BLOCK_PARTS=next_power_of_two(parts),
                num_warps=1,
            )
    return out, lse


def supports(problem: PagedAttentionDecodeProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {problem.head_dim}, expected at most {MAX_HEAD_DIM}"
    return refuse(problem.device, dtype=problem.dtype, kv_dtype=problem.kv_dtype)


def describe(problem: PagedAttentionDecodeProblem) -> str:
    """Which kernel it would be."""
    group = problem.num_q_heads // problem.num_kv_heads
    tile = choose_tile(problem.head_dim, problem.dtype, problem.kv_dtype)
    return (
        f"paged_attention_decode_kernel: {group} query heads a KV head, tiles of {tile} positions, split KV"
    )


PAGED_ATTENTION_DECODE = Implementation(supports, paged_attention_decode, describe)
