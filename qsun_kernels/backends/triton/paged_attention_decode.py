"""The last query tokens of each request against the keys and values of its blocks.

    s[t] = softmax_scale * q . k[t],   s[t] = softcap * tanh(s[t] / softcap) with a softcap,
    lse = log(sum_t exp(s[t]) + exp(sink)),    out = sum_t exp(s[t] - lse) v[t]

over the positions t that a query token sees: those up to its own, the last `window` of them. A program has a
block of query rows, which are the query tokens and the query heads of one KV head, so that each key and
value is read once for all of them, and an equal share of the tiles of all requests: see paged_attention_plan.
The softmax is computed online (M. Milakov and N. Gimelshein, arXiv 1805.02867). A request that lies in one
part is done there; of one that a boundary cuts each part keeps a partial result for paged_attention_merge.

Tokens are looked up one by one in the block table, so any block size does, and neither a block-table entry
nor a cache slot outside the attended positions is ever read: what is in there cannot matter, be it NaN. Keys
and values are marked to leave the cache first, except where another block of rows reads them, too (Triton 3.6
drops the mark where it copies asynchronously).

Weights of the softmax stay accurate to float32 beside 16-bit values: the weight is split into two 16-bit
numbers whose products are added, since the tensor cores have nothing else to do while the cache streams in.

A cache of codes (see kv_codes) is multiplied as it is, since codes are exact in 16 bits: the scale of a key
goes to its score, that of a value to its weight, which is a bfloat16 pair then, as a float16 has not the
range. Bytes of two 4-bit codes are not taken apart along the head: low and high nibbles, the even and the odd
elements, are two products each, with the even and the odd columns of q, and with two halves of the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import AttentionImplementation, PagedAttentionDecodeProblem
from qsun_kernels.backends.triton.dependent_launch import (
    can_launch_early,
    let_next_kernel_start,
    wait_for_earlier_kernels,
)
from qsun_kernels.backends.triton.kv_codes import as_bytes, assembly, format_of, unpack, unpack_pairs
from qsun_kernels.backends.triton.launch import (
    Launching,
    converts_float8,
    next_power_of_two,
    refuse,
    refuse_cache,
)
from qsun_kernels.backends.triton.numerics import (
    INTERPRETED,
    device_function,
    loop_bound,
    tanh_float32,
    to_float32,
)
from qsun_kernels.backends.triton.paged_attention_merge import (
    finite_shift,
    paged_attention_merge_kernel,
    store_result,
)
from qsun_kernels.backends.triton.paged_attention_plan import (
    NO_WINDOW,
    choose_rows,
    choose_tile,
    first_position,
    multiplies_in_16_bits,
    parts_of,
    plan_paged_attention,
    programs_a_part,
)

MAX_HEAD_DIM = 256

STAGES = 5
"""Two tiles are on their way while a third is multiplied: each waits for its block ids, another step."""

_MERGED_AT_ONCE = 32


@device_function
def _weighted_sum(p: tl.tensor, v: tl.tensor, IN_16_BITS: tl.constexpr) -> tl.tensor:
    """p (BLOCK_R, TILE) float32 times v (TILE, BLOCK_D)."""
    if INTERPRETED or not IN_16_BITS:
        return tl.dot(p, to_float32(v), input_precision="ieee")
    else:
        high = p.to(v.dtype)
        low = (p - high.to(tl.float32)).to(v.dtype)
        return tl.dot(low, v, tl.dot(high, v))


@triton.jit(do_not_specialize=["batch", "window"])
def paged_attention_decode_kernel(
    q: tl.tensor,  # (B * Q_LEN, NUM_KV_HEADS * GROUP, HEAD_DIM), tokens q_stride apart
    k_cache: tl.tensor,  # (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, or half as many bytes for int4)
    v_cache: tl.tensor,  # as k_cache
    k_scale: tl.tensor,  # float32 (num_blocks, NUM_KV_HEADS, BLOCK_SIZE), or (1,), or None for numbers
    v_scale: tl.tensor,  # as k_scale
    block_table: tl.tensor,  # int32 (B, max_blocks), rows table_stride apart
    seq_lens: tl.tensor,  # int32 (B,)
    sinks: tl.tensor,  # float32 (heads,), or None
    plan: tl.tensor,  # int32, see paged_attention_plan
    out: tl.tensor,  # (B * Q_LEN, heads, HEAD_DIM), contiguous
    lse: tl.tensor,  # float32 (B * Q_LEN, heads)
    sums: tl.tensor,  # float32 (2 * parts, Q_LEN, heads, HEAD_DIM), sum of exp(s - maximum) v
    weights: tl.tensor,  # float32 (2 * parts, Q_LEN, heads, 2): maximum of s, sum of exp(s - maximum)
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    batch: tl.tensor,
    window: tl.tensor,
    softmax_scale: tl.tensor,
    softcap: tl.tensor,
    Q_LEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    KEY_ASSEMBLY: tl.constexpr,
    VALUE_ASSEMBLY: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least the columns of a slot
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    if EARLY:
        let_next_kernel_start()
        wait_for_earlier_kernels()
    ROW_BLOCKS: tl.constexpr = (Q_LEN * GROUP + BLOCK_R - 1) // BLOCK_R
    EVICTION: tl.constexpr = "evict_first" if ROW_BLOCKS == 1 else ""
    NUM_Q_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    # Two different dtypes meet in float32; codes take that of q.
    IS_CODES: tl.constexpr = FORMAT != "numbers"
    SAME_DTYPE: tl.constexpr = IS_CODES or q.dtype.element_ty == k_cache.dtype.element_ty
    IN_16_BITS: tl.constexpr = SAME_DTYPE and q.dtype.element_ty != tl.float32
    KEY: tl.constexpr = q.dtype.element_ty
    VALUE: tl.constexpr = tl.bfloat16 if IN_16_BITS else tl.float32  # of the codes of values
    # Column c of a slot is element STEP * c, and with two elements a byte the next one, too.
    STEP: tl.constexpr = 2 if FORMAT == "int4" else 1
    COLUMNS: tl.constexpr = HEAD_DIM // STEP
    part = tl.program_id(0)
    kv_head = tl.program_id(1) // ROW_BLOCKS

    # Row i is query token i // GROUP and query head i % GROUP of those of the KV head.
    row = (tl.program_id(1) % ROW_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    c = tl.arange(0, BLOCK_C)
    row_mask = row < Q_LEN * GROUP
    c_mask = c < COLUMNS
    mask = row_mask[:, None] & c_mask[None, :]
    sink = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=row_mask, other=float("-inf"))

    one_k_scale = 1.0
    one_v_scale = 1.0
    if ONE_SCALE:
        one_k_scale = tl.load(k_scale)
        one_v_scale = tl.load(v_scale)

    # The part: tiles first..last - 1 of all, which lie in the requests r_first..r_stop - 1.
    offsets = plan + tl.num_programs(0) + 2
    share = tl.load(plan)
    r_first = tl.load(plan + part + 1)
    r_stop = tl.load(plan + part + 2)
    first = part * share
    last = tl.minimum(first + share, tl.load(offsets + batch))
    r_stop += (tl.load(offsets + r_stop) < last).to(tl.int32)
    for r in range(loop_bound(r_first), loop_bound(r_stop)):
        begin = tl.load(offsets + r)
        end = tl.load(offsets + r + 1)
        length = tl.load(seq_lens + r)
        request = tl.cast(r, tl.int64)
        q_row = request * Q_LEN + token
        query_at = q + q_row[:, None] * q_stride + head[:, None] * HEAD_DIM + STEP * c[None, :]
        query = tl.load(query_at, mask, 0.0)
        if INTERPRETED or not SAME_DTYPE:
            query = to_float32(query)
        if FORMAT == "int4":
            odd_query = tl.load(query_at + 1, mask, 0.0)
            if INTERPRETED:
                odd_query = to_float32(odd_query)
        own = length - Q_LEN + token
        start = first_position(length, window, Q_LEN)
        # A request without positions has a tile in the plan and none here.
        tiles = tl.cdiv(length - start, TILE)

        maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if FORMAT == "int4":
            odd_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for tile in range(
            loop_bound(tl.maximum(first - begin, 0)), loop_bound(tl.minimum(last - begin, tiles))
        ):
            position = start + tile * TILE + tl.arange(0, TILE)
            valid = position < length
            entry = block_table + request * table_stride + position // BLOCK_SIZE
            block = tl.load(entry, mask=valid, other=0).to(tl.int64)
            slot = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE

            keys = tl.load(
                k_cache + slot[None, :] * COLUMNS + c[:, None],
                mask=c_mask[:, None] & valid[None, :],
                other=0,
                eviction_policy=EVICTION,
            )
            if FORMAT == "int4":
                keys, odd_keys = unpack_pairs(keys, KEY, KEY_ASSEMBLY)
                s = tl.dot(query, keys, input_precision="ieee")
                s = tl.dot(odd_query, odd_keys, s, input_precision="ieee") * softmax_scale
            else:
                if IS_CODES:
                    keys = unpack(keys, KEY, FORMAT, KEY_ASSEMBLY, NATIVE_FLOAT8)
                elif INTERPRETED or not SAME_DTYPE:
                    keys = to_float32(keys)
                s = tl.dot(query, keys, input_precision="ieee") * softmax_scale
            if ONE_SCALE:
                s *= one_k_scale
            elif IS_CODES:
                s *= tl.load(k_scale + slot, mask=valid, other=0.0, eviction_policy=EVICTION)[None, :]
            if HAS_SOFTCAP:
                s = softcap * tanh_float32(s / softcap)
            seen = valid[None, :]
            if Q_LEN > 1:
                seen = (position[None, :] <= own[:, None]) & (position[None, :] > own[:, None] - window)
            s = tl.where(seen, s, float("-inf"))

            new_maximum = tl.maximum(maximum, tl.max(s, axis=1))
            shift = finite_shift(new_maximum)
            p = tl.exp(s - shift[:, None])
            rescale = tl.exp(maximum - shift)
            values = tl.load(
                v_cache + slot[:, None] * COLUMNS + c[None, :],
                mask=valid[:, None] & c_mask[None, :],
                other=0,
                eviction_policy=EVICTION,
            )
            total = total * rescale + tl.sum(p, axis=1)
            if ONE_SCALE:
                p *= one_v_scale
            elif IS_CODES:
                p *= tl.load(v_scale + slot, mask=valid, other=0.0, eviction_policy=EVICTION)[None, :]
            if FORMAT == "int4":
                values, odd_values = unpack_pairs(values, VALUE, VALUE_ASSEMBLY)
                odd_acc = odd_acc * rescale[:, None] + _weighted_sum(p, odd_values, IN_16_BITS)
            elif IS_CODES:
                values = unpack(values, VALUE, FORMAT, VALUE_ASSEMBLY, NATIVE_FLOAT8)
            acc = acc * rescale[:, None] + _weighted_sum(p, values, IN_16_BITS)
            maximum = new_maximum

        if (begin >= first) & (end <= last):
            place = q_row * NUM_Q_HEADS + head
            pointers = out + place[:, None] * HEAD_DIM + STEP * c[None, :]
            store_result(pointers, lse + place, acc, maximum, total, sink, mask, row_mask)
            if FORMAT == "int4":
                store_result(pointers + 1, lse + place, odd_acc, maximum, total, sink, mask, row_mask)
        else:
            kept = 2 * part + (r != r_first)
            kept_row = (kept * Q_LEN + token) * NUM_Q_HEADS + head
            tl.store(weights + kept_row * 2, maximum, mask=row_mask)
            tl.store(weights + kept_row * 2 + 1, total, mask=row_mask)
            kept_sums = sums + kept_row[:, None] * HEAD_DIM + STEP * c[None, :]
            tl.store(kept_sums, acc, mask=mask)
            if FORMAT == "int4":
                tl.store(kept_sums + 1, odd_acc, mask=mask)


def paged_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    plan: tuple[Tensor, ...] | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    follows_write: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out (B * q_len, Hq, D), lse float32 (B * q_len, Hq)); caches (num_blocks, Hkv, block_size, D or
    D / 2), scales (num_blocks, Hkv, block_size) or (1,).

    plan: what `plan_paged_attention` made for these sizes and lengths; None makes one. follows_write: nothing
    here makes use of it.
    """
    rows, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    batch = seq_lens.shape[0]
    if out is None:
        out = torch.empty((rows, num_q_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, num_q_heads), dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    q_len = rows // batch
    if plan is None:
        problem = PagedAttentionDecodeProblem(
            *(num_q_heads, num_kv_heads, head_dim, block_size, window, q.dtype, k_cache.dtype, q.device)
        )
        plan = plan_paged_attention(problem, seq_lens, q_len, window)
    (shares,) = plan
    parts = parts_of(shares, batch)
    group = num_q_heads // num_kv_heads
    rows_a_head = q_len * group
    block_r = choose_rows(rows_a_head)
    block_d = max(16, next_power_of_two(head_dim))
    form = format_of(k_cache.dtype)
    slots = (2 * parts, q_len, num_q_heads)
    sums = torch.empty((*slots, head_dim), dtype=torch.float32, device=q.device)
    weights = torch.empty((*slots, 2), dtype=torch.float32, device=q.device)
    early = can_launch_early(q.device)
    options = {"launch_pdl": True} if early else {}

    def shapes() -> str:
        return (
            f"q={tuple(q.shape)} {q.dtype} cache={tuple(k_cache.shape)} {k_cache.dtype} "
            f"block_table={tuple(block_table.shape)} window={window} parts={parts}"
        )

    with Launching("paged_attention_decode", q.device, shapes):
        paged_attention_decode_kernel[(parts, programs_a_part(rows_a_head, num_kv_heads))](
            q,
            as_bytes(k_cache),
            as_bytes(v_cache),
            k_scale,
            v_scale,
            block_table,
            seq_lens,
            sinks,
            shares,
            out,
            lse,
            sums,
            weights,
            q.stride(0),
            block_table.stride(0),
            batch,
            NO_WINDOW if window is None else min(window, NO_WINDOW),
            float(softmax_scale),  # an integer would be a type of its own
            0.0 if softcap is None else float(softcap),
            Q_LEN=q_len,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            HAS_SOFTCAP=softcap is not None,
            FORMAT=form,
            ONE_SCALE=k_scale is not None and k_scale.dim() == 1,
            KEY_ASSEMBLY=assembly(form, q.dtype),
            VALUE_ASSEMBLY=assembly(form, torch.bfloat16),
            NATIVE_FLOAT8=converts_float8(q.device),
            BLOCK_R=block_r,
            BLOCK_C=max(16, block_d // 2) if form == "int4" else block_d,
            TILE=choose_tile(head_dim, q.dtype, k_cache.dtype, block_r),
            EARLY=early,
            num_warps=_choose_warps(q.dtype, k_cache.dtype, block_r),
            num_stages=STAGES,
            **options,
        )
        if parts > 1:
            paged_attention_merge_kernel[(parts - 1, q_len * num_q_heads)](
                shares,
                sums,
                weights,
                sinks,
                out,
                lse,
                batch,
                NUM_Q_HEADS=num_q_heads,
                ROWS=q_len * num_q_heads,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                CHUNK=_MERGED_AT_ONCE,
                EARLY=early,
                num_warps=4,
                **options,
            )
    return out, lse


def _choose_warps(dtype: torch.dtype, kv_dtype: torch.dtype, rows: int) -> int:
    """Four, or eight where a tile is in registers twice: as it was loaded and as it is multiplied.

    Codes are unpacked there, which spills beside the sums of more than 16 rows.
    """
    if dtype == kv_dtype:
        return 4
    return 4 if multiplies_in_16_bits(dtype, kv_dtype) and rows <= 16 else 8


def supports(problem: PagedAttentionDecodeProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {problem.head_dim}, expected at most {MAX_HEAD_DIM}"
    return refuse(problem.device, dtype=problem.dtype) or refuse_cache(problem.kv_dtype, problem.kv_scales)


def describe(problem: PagedAttentionDecodeProblem) -> str:
    """Which kernel it would be."""
    group = problem.num_q_heads // problem.num_kv_heads
    tile = choose_tile(problem.head_dim, problem.dtype, problem.kv_dtype, choose_rows(group))
    return (
        f"paged_attention_decode_kernel: {group} query heads a KV head, tiles of {tile} positions, "
        "equal shares of all tiles, then merged"
    )


PAGED_ATTENTION_DECODE = AttentionImplementation(
    supports, paged_attention_decode, describe, plan_paged_attention
)
