"""What ends an attention: partial results are merged, a sink joins the denominator, one rounding.

A partial result is a sum of values relative to its own maximum of s, that maximum, and the sum of weights.
Each part of a plan (see paged_attention_plan) leaves at most two, of the requests at its two ends:

    slot 2 p        of the part's first request
    slot 2 p + 1    of the part's last request, where that is another one

so that scratch is bounded by the parts. A program of the merge has one boundary between two parts and one
query row. It merges the request that the boundary cuts if no earlier boundary does, adding in the order of
the parts: results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qsun_kernels.backends.triton.dependent_launch import let_next_kernel_start, wait_for_earlier_kernels
from qsun_kernels.backends.triton.numerics import device_function, loop_bound, store_rounded


@device_function
def finite_shift(maximum: tl.tensor) -> tl.tensor:
    """What to subtract from scores: their maximum, or 0 where there are none, as -inf - -inf is no number."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@device_function
def store_result(
    out: tl.tensor,  # pointers (rows, columns)
    lse: tl.tensor,  # pointers (rows,)
    acc: tl.tensor,  # float32 (rows, columns), sum of exp(s - maximum) v
    maximum: tl.tensor,  # float32 (rows,)
    total: tl.tensor,  # float32 (rows,), sum of exp(s - maximum)
    sink: tl.tensor,  # float32 (rows,), -inf for none
    mask: tl.tensor,
    row_mask: tl.tensor,
) -> None:
    shift = finite_shift(tl.maximum(maximum, sink))
    rescale = tl.exp(maximum - shift)
    total = total * rescale + tl.exp(sink - shift)
    result = tl.div_rn(acc * rescale[:, None], tl.where(total == 0.0, 1.0, total)[:, None])
    store_rounded(out, result, mask)
    tl.store(lse, tl.where(total == 0.0, float("-inf"), shift + tl.log(total)), mask=row_mask)


@triton.jit(do_not_specialize=["batch"])
def paged_attention_merge_kernel(
    plan: tl.tensor,  # int32, see paged_attention_plan
    sums: tl.tensor,  # float32 (2 * parts, ROWS, HEAD_DIM)
    weights: tl.tensor,  # float32 (2 * parts, ROWS, 2): maximum of s, sum of exp(s - maximum)
    sinks: tl.tensor,  # float32 (NUM_Q_HEADS,), or None
    out: tl.tensor,  # (batch, ROWS, HEAD_DIM), contiguous
    lse: tl.tensor,  # float32 (batch, ROWS)
    batch: tl.tensor,
    NUM_Q_HEADS: tl.constexpr,
    ROWS: tl.constexpr,  # query tokens of a request times NUM_Q_HEADS
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,  # partial results that are added at once
    EARLY: tl.constexpr,
) -> None:
    if EARLY:
        let_next_kernel_start()
        wait_for_earlier_kernels()
    first_part = tl.program_id(0)
    row = tl.program_id(1)
    offsets = plan + tl.num_programs(0) + 3  # of parts - 1 programs
    share = tl.load(plan)
    boundary = (first_part + 1) * share
    if boundary < tl.load(offsets + batch):
        r = tl.load(plan + first_part + 2)
        begin = tl.load(offsets + r)
        if (begin < boundary) & (begin >= boundary - share):
            parts = (tl.load(offsets + r + 1) - 1) // share - first_part + 1
            # Every part but the first begins with this request.
            is_second = (tl.load(plan + first_part + 1) != r).to(tl.int32)
            d = tl.arange(0, BLOCK_D)
            maximum = tl.full((1,), float("-inf"), tl.float32)
            total = tl.zeros((1,), tl.float32)
            acc = tl.zeros((1, BLOCK_D), tl.float32)
            for chunk in range(0, loop_bound(parts), CHUNK):
                one = chunk + tl.arange(0, CHUNK)
                exists = one < parts
                slot = (2 * (first_part + one) + tl.where(one == 0, is_second, 0)).to(tl.int64)
                place = slot * ROWS + row
                maxima = tl.load(weights + place * 2, mask=exists, other=float("-inf"))
                totals = tl.load(weights + place * 2 + 1, mask=exists, other=0.0)
                values = tl.load(
                    sums + place[:, None] * HEAD_DIM + d[None, :],
                    mask=exists[:, None] & (d < HEAD_DIM)[None, :],
                    other=0.0,
                )
                # Never -inf: a request that is cut has more positions than query tokens, and the windows of
                # all its tokens begin in its first tile.
                new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
                rescale = tl.exp(maximum - new_maximum)
                factor = tl.exp(maxima - new_maximum)
                total = total * rescale + tl.sum(totals * factor, axis=0)
                acc = acc * rescale[:, None] + tl.sum(values * factor[:, None], axis=0)[None, :]
                maximum = new_maximum

            sink = tl.full((1,), float("-inf"), tl.float32)
            if sinks is not None:
                sink = tl.load(sinks + row % NUM_Q_HEADS + tl.arange(0, 1))
            result = r.to(tl.int64) * ROWS + row + tl.arange(0, 1)
            store_result(
                out + result[:, None] * HEAD_DIM + d[None, :],
                lse + result,
                acc,
                maximum,
                total,
                sink,
                (d < HEAD_DIM)[None, :],
                result >= 0,
            )
