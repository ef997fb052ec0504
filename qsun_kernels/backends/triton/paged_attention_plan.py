"""How the attention of one decode step is shared out among programs, worked out on the device.

The positions that a request attends to are cut into tiles, at least one a request; the tiles of all requests,
one after another, are cut into parts of equal size, whatever the requests' lengths:

    requests  |     0     |1|              2              |  3  |
    tiles     |t t t t t t|t|t t t t t t t t t t t t t t t|t t t|
    parts     |    part 0     |    part 1     |    part 2     |

A program has one part for one block of query rows and walks from request to request. Requests that a
boundary cuts (0 to 2 a part) leave partial results, which a second kernel merges: see paged_attention_merge.
The number of parts depends on sizes that the host knows, what is in them on lengths that the device reads: a
captured graph serves every length. All layers of a step share one plan, as the sum and the search need be
done once.

    plan      share | first request of parts 0..parts | first tile of requests 0..B       int32
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import PagedAttentionDecodeProblem
from qsun_kernels.backends.triton.dependent_launch import (
    can_launch_early,
    let_next_kernel_start,
    wait_for_earlier_kernels,
)
from qsun_kernels.backends.triton.kv_codes import FORMATS
from qsun_kernels.backends.triton.launch import Launching, multiprocessors, next_power_of_two
from qsun_kernels.backends.triton.numerics import device_function, loop_bound

TILE_VALUES = 8192
"""Numbers in a tile of keys; with the tile of values and the next two in flight, 64 KiB in 16 bits."""

MAX_ROWS = 32
"""Query rows of one program: with more, its tiles and sums do not fit beside those of a second program."""

PROGRAMS_A_MULTIPROCESSOR = 2
"""Programs of the attention kernel that run at once, by the registers and shared memory they take."""

MIN_SHARE = 2
"""Tiles of the smallest part: two are on their way at once, so one alone takes hardly less time."""

NO_WINDOW = 2**31 - 16
"""Stands for no window: what is subtracted from a length must not overflow together with q_len."""

_BLOCK = 1024
"""Requests that are summed at once."""


def multiplies_in_16_bits(dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply q with the cache: codes take the dtype of q, numbers have their own."""
    return dtype != torch.float32 and (kv_dtype == dtype or kv_dtype in FORMATS)


def choose_tile(head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, rows: int) -> int:
    """Positions of a tile: 16 to 128. rows: query rows of a program (`choose_rows`)."""
    width = max(16, next_power_of_two(head_dim))
    if not multiplies_in_16_bits(dtype, kv_dtype):
        # Products of float32 run without tensor cores and hold their operands in registers; two different
        # dtypes meet in float32.
        return max(16, min(128, TILE_VALUES // 4 // width))
    tile = min(128, TILE_VALUES // width)
    # Query rows stay in registers: beside many of them the scores of a whole tile would spill.
    if rows <= 16:
        return tile
    # Codes are there a second time, unpacked.
    most = 32 if kv_dtype in FORMATS else tile
    return min(tile, most, TILE_VALUES // 2 // min(width, 128))


def choose_rows(rows: int) -> int:
    """Query rows of one program, 16 to 32: of all tokens and query heads of a KV head, or of some of them.

    rows: query tokens times query heads of a KV head. What does not fit reads keys and values once more.
    """
    return max(16, min(MAX_ROWS, next_power_of_two(rows)))


def choose_parts(programs: int, num_multiprocessors: int) -> int:
    """Parts of so many programs each that all fill the device once: none has to wait for another to end."""
    return max(1, PROGRAMS_A_MULTIPROCESSOR * num_multiprocessors // programs)


def programs_a_part(rows: int, num_kv_heads: int) -> int:
    """Programs of a part: blocks of the query rows of a KV head, of every KV head."""
    return num_kv_heads * -(-rows // choose_rows(rows))


def parts_of(plan: Tensor, batch: int) -> int:
    """The number of parts of a plan for that many requests."""
    return plan.shape[0] - batch - 3


@device_function
def first_position(length: tl.tensor, window: tl.tensor, Q_LEN: tl.constexpr) -> tl.tensor:
    """The first position that any of the last Q_LEN tokens attends to."""
    return tl.maximum(length - Q_LEN - window + 1, 0)


@triton.jit(do_not_specialize=["batch", "steps", "window"])
def paged_attention_plan_kernel(
    seq_lens: tl.tensor,  # int32 (batch,)
    plan: tl.tensor,  # int32 (parts + batch + 3,), see above
    batch: tl.tensor,
    parts: tl.tensor,
    steps: tl.tensor,  # halvings that bring a range of `batch` requests down to none
    window: tl.tensor,
    Q_LEN: tl.constexpr,
    TILE: tl.constexpr,
    SMALLEST: tl.constexpr,  # tiles of a part
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,  # a power of two above `parts`
    EARLY: tl.constexpr,
) -> None:
    if EARLY:
        let_next_kernel_start()
        wait_for_earlier_kernels()
    firsts = plan + 1
    ends = plan + parts + 3  # where the tiles of a request end
    tl.store(plan + parts + 2, 0)
    total = tl.full((), 0, tl.int32)
    for begin in range(0, loop_bound(batch), BLOCK):
        request = begin + tl.arange(0, BLOCK)
        exists = request < batch
        length = tl.load(seq_lens + request, mask=exists, other=0)
        tiles = tl.cdiv(length - first_position(length, window, Q_LEN), TILE)
        # A request without positions has a tile, too, or nobody would write its zeros.
        tiles = tl.where(exists, tl.maximum(tiles, 1), 0)
        tl.store(ends + request, total + tl.cumsum(tiles, axis=0), mask=exists)
        total += tl.sum(tiles, axis=0)
    share = tl.maximum(tl.cdiv(total, parts), SMALLEST)
    tl.store(plan, share)

    # The request of a part's first tile is the first one that ends behind it; `batch` past the last tile.
    tl.debug_barrier()
    part = tl.arange(0, BLOCK_PARTS)
    low = tl.zeros((BLOCK_PARTS,), tl.int32)
    high = low + batch
    for _ in range(0, loop_bound(steps)):
        middle = (low + high) // 2
        is_open = low < high
        ended = tl.load(ends + middle, mask=is_open, other=0) <= part * share
        low = tl.where(is_open & ended, middle + 1, low)
        high = tl.where(is_open & ended, high, middle)
    tl.store(firsts + part, low, mask=part <= parts)


def make_plan(seq_lens: Tensor, parts: int, tile: int, q_len: int, window: int | None) -> Tensor:
    """The plan of `parts` parts in tiles of `tile` positions."""
    batch = seq_lens.shape[0]
    plan = torch.empty(parts + batch + 3, dtype=torch.int32, device=seq_lens.device)
    if batch == 0:
        return plan
    early = can_launch_early(seq_lens.device)
    options = {"launch_pdl": True} if early else {}

    def shapes() -> str:
        return f"seq_lens={tuple(seq_lens.shape)} q_len={q_len} window={window} parts={parts}"

    with Launching("plan_paged_attention", seq_lens.device, shapes):
        paged_attention_plan_kernel[(1,)](
            seq_lens,
            plan,
            batch,
            parts,
            batch.bit_length(),
            NO_WINDOW if window is None else min(window, NO_WINDOW),
            Q_LEN=q_len,
            TILE=tile,
            SMALLEST=MIN_SHARE,
            BLOCK=_BLOCK,
            BLOCK_PARTS=next_power_of_two(parts + 1),
            EARLY=early,
            num_warps=4,
            **options,
        )
    return plan


def plan_paged_attention(
    problem: PagedAttentionDecodeProblem,
    seq_lens: Tensor,
    q_len: int,
    window: int | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(plan,) for seq_lens int32 (B,). block_table is not looked at: every request reads its own prefix."""
    rows = q_len * (problem.num_q_heads // problem.num_kv_heads)
    programs = programs_a_part(rows, problem.num_kv_heads)
    parts = choose_parts(programs, multiprocessors(seq_lens.device))
    tile = choose_tile(problem.head_dim, problem.dtype, problem.kv_dtype, choose_rows(rows))
    return (make_plan(seq_lens, parts, tile, q_len, window),)
