"""x (M, K) times a weight of 2, 4 or 8 bits (N, K), laid out as tensor cores take it ("triton.tiles").

The weights are the left operand: their tiles are what tensor cores want 16 rows of, while tokens may be few.
The layout (see `wna16_layout`) puts a code into the registers of the very thread that multiplies by it, so a
weight goes from memory to the tensor cores without passing through shared memory or another thread. Triton is
not told so: it is told in which order the axes of a tile lie, finds that the operand's layout is the one that
the loaded words already have, and moves nothing.

A program computes BLOCK_N outputs of BLOCK_M tokens over one split of K, in steps:

                                   K
               +-----------------+-----------------+---
      BLOCK_N  | s0 | s1 | .. sS | s0 | s1 | .. sS |  ...       steps of SLICES * STEP_K columns
               +-----------------+-----------------+---

    SLICES = 1   all warps share a step's columns and divide the rows: 64 rows or more, multiplied by a group
                 of four warps at once on Hopper.
    SLICES > 1   each warp takes a slice of a step's columns, for all rows. Few rows a program then still mean
                 many loads in flight and programs enough for every multiprocessor; the sums of the slices are
                 added, in order, at the end.

Where that is not enough, K is split among programs, and a second kernel adds their sums. No step depends on
which program ends first, so results repeat bit for bit.

Weights are rounded to the dtype of x before the product, w = (code - zero) * scale, as in the dense weight;
sums are float32.

On Hopper a kernel may start while the one before it ends (see `dependent_launch`). Weights do not depend on
what came before: they are on their way meanwhile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import PreparedWeight
from qsun_kernels.backends.triton.dependent_launch import (
    can_launch_early,
    let_next_kernel_start,
    prefetch_lines,
    wait_for_earlier_kernels,
)
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two
from qsun_kernels.backends.triton.numerics import (
    INTERPRETED,
    device_function,
    load_float32,
    loop_bound,
    store_rounded,
    to_float32,
)
from qsun_kernels.backends.triton.warpgroup_products import multiplies_by_warpgroups, wait_for_products
from qsun_kernels.backends.triton.wna16_combine import combine_splits
from qsun_kernels.backends.triton.wna16_configs import TilesConfig, choose_tiles
from qsun_kernels.backends.triton.wna16_layout import TILE_WORDS
from qsun_kernels.backends.triton.wna16_unpack import unpack_assembly, unpack_words

LINE = 128  # bytes of an L2 cache line


@device_function
def _spread_groups(
    pairs: tl.tensor, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr
) -> tl.tensor:
    """What the words (CHUNKS * TILES, 128) of a step are scaled by, from (32, GROUPS * TILES, 1)."""
    pairs = tl.trans(tl.reshape(pairs, (32, GROUPS * TILES)))
    if GROUPS <= CHUNKS:
        pairs = tl.reshape(pairs, (GROUPS, 1, TILES, 32, 1))
        pairs = tl.broadcast_to(pairs, (GROUPS, CHUNKS // GROUPS, TILES, 32, 4))
    else:
        # Several groups in a chunk: neighbouring words of a lane belong to different ones.
        EACH: tl.constexpr = GROUPS // CHUNKS
        pairs = tl.permute(tl.reshape(pairs, (CHUNKS, EACH, TILES, 32)), (0, 2, 3, 1))
        pairs = tl.reshape(pairs, (CHUNKS, TILES, 32, EACH, 1))
        pairs = tl.broadcast_to(pairs, (CHUNKS, TILES, 32, EACH, 4 // EACH))
    return tl.reshape(pairs, (CHUNKS * TILES, 128))


@device_function
def _as_operand(
    weights: tl.tensor,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    SLICES: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """The unpacked words of a step as (SLICES, 16 * ROW_TILES, columns); see `_columns_as_operand`."""
    K: tl.constexpr = CHUNKS * (256 // BITS)
    if BITS == 8:
        # 0 chunk, 1 row tile, 2 slice, 3 r, 4 t, 5 s, 6 h_k, 7 e, 8 h_n
        w = tl.reshape(weights, (CHUNKS, ROW_TILES, SLICES, 8, 4, 2, 2, 2, 2))
        if PAIRED:
            w = tl.permute(w, (2, 1, 8, 3, 0, 5, 4, 6, 7))
        else:
            w = tl.permute(w, (2, 1, 8, 3, 0, 5, 6, 4, 7))
    elif BITS == 4:
        # 0 chunk, 1 row tile, 2 slice, 3 r, 4 t, 5 s, 6 e, 7 h_n, 8 h_k
        w = tl.reshape(weights, (CHUNKS, ROW_TILES, SLICES, 8, 4, 4, 2, 2, 2))
        if PAIRED:
            w = tl.permute(w, (2, 1, 7, 3, 0, 5, 4, 8, 6))
        else:
            w = tl.permute(w, (2, 1, 7, 3, 0, 5, 8, 4, 6))
    else:
        # 0 chunk, 1 row tile, 2 slice, 3 r, 4 t, 5 s // 2, 6 e, 7 h_n, 8 h_k, 9 s % 2
        w = tl.reshape(weights, (CHUNKS, ROW_TILES, SLICES, 8, 4, 4, 2, 2, 2, 2))
        if PAIRED:
            w = tl.permute(w, (2, 1, 7, 3, 0, 5, 9, 4, 8, 6))
        else:
            w = tl.permute(w, (2, 1, 7, 3, 0, 5, 9, 8, 4, 6))
    return tl.reshape(w, (SLICES, ROW_TILES * 16, K))


@device_function
def _columns_as_operand(
    x: tl.tensor, SLICES: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """x (SLICES, BLOCK_M, K) as (SLICES, K, BLOCK_M), in the order of columns that PAIRED means.

    In each 16 columns 8 h_k + 2 t + e it is 4 t + 2 h_k + e: for mma.sync Triton gives a thread four columns
    in a row where it has joined their values from smaller parts, for wgmma two. The order of a sum's terms is
    free, as long as both operands have the same.
    """
    x = tl.permute(tl.reshape(x, (SLICES, BLOCK_M, K // 16, 2, 4, 2)), (0, 2, 4, 3, 5, 1))
    return tl.reshape(x, (SLICES, K, BLOCK_M))


@device_function
def _load_step(
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    step: tl.tensor,
    last: tl.tensor,
    row_tile: tl.tensor,  # of each tile of a step
    chunk: tl.tensor,  # likewise, from the step's first
    pair_tile: tl.tensor,  # the row tile of each group of scales of a step
    pair_column: tl.tensor,  # likewise the first column of its slice, from the step's first
    pair_group: tl.tensor,  # likewise its group, from that of its slice's first column
    chunks: tl.tensor,
    groups: tl.tensor,
    EVEN: tl.constexpr,  # every step's columns are all of the weight
    IN_SPLIT: tl.constexpr,  # step < last is known
    GROUP_SIZE: tl.constexpr,
    STEP_K: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Words (CHUNKS * TILES, 128), and pairs of scales and of zero points, (32 lanes, GROUPS * TILES, 1)."""
    first_chunk = step * (SLICES * CHUNKS)
    word_pointers = words + ((row_tile * chunks + chunk) * 128)[:, None] + tl.arange(0, 128)[None, :]
    word_pointers += first_chunk * 128
    # Triton spreads the first axis of these tensors over lanes, having no reason to prefer another. The third
    # keeps it from taking them for the output, which may be of the same size and then gets the same layout.
    if GROUP_SIZE == 0:
        group = pair_group * 0
    else:
        group = (step * (SLICES * STEP_K) + pair_column) // GROUP_SIZE + pair_group
    offset = (pair_tile * groups + group)[None, :, None] * 8 + (tl.arange(0, 32) // 4)[:, None, None]
    if EVEN and IN_SPLIT:
        word = tl.load(word_pointers, eviction_policy="evict_first")
        scale = tl.load(scales + offset)
        zero = scale if zeros is None else tl.load(zeros + offset)
    else:
        # Scalars stay scalars until the last moment: a mask of its own for every word takes registers.
        word_mask = step < last
        pair_mask = step < last
        if not EVEN:
            word_mask &= (first_chunk + chunk < chunks)[:, None]
            pair_mask &= (group < groups)[None, :, None]
        word = tl.load(word_pointers, mask=word_mask, other=0, eviction_policy="evict_first")
        scale = tl.load(scales + offset, mask=pair_mask, other=0)
        zero = scale if zeros is None else tl.load(zeros + offset, mask=pair_mask, other=0)
    return word, scale, zero


@triton.jit(do_not_specialize=["M", "steps_a_split"])
def wna16_linear_kernel(
    x: tl.tensor,  # (M, K), rows x_stride apart
    words: tl.tensor,  # int32 (row tiles, chunks, 128)
    scales: tl.tensor,  # int32 (row tiles, groups, 8): pairs of the dtype of x
    zeros: tl.tensor,  # int32 (row tiles, groups, 8): pairs of integers; None for symmetric weights
    bias: tl.tensor,  # (N,) or None
    residual: tl.tensor,  # (M, N), rows residual_stride apart, or None
    out: tl.tensor,  # (M, N), rows out_stride apart; of splits of K float32 (splits, M, N), contiguous
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    chunks: tl.tensor,
    groups: tl.tensor,
    steps_a_split: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # 0 when a row is one group
    ASSEMBLY: tl.constexpr,  # of `unpack_assembly`
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP_K: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of SLICES * STEP_K
    PAIRED: tl.constexpr,  # the order of columns, see `_columns_as_operand`
    AHEAD: tl.constexpr,  # load a step's words while the step before is multiplied
    PREFETCH: tl.constexpr,  # cache lines of words to fetch first, a row tile
    EARLY: tl.constexpr,  # launched while the kernel before runs
    WARPGROUPS: tl.constexpr,  # four warps multiply at once, see `warpgroup_products`
) -> None:
    CHUNK: tl.constexpr = 256 // BITS
    CHUNKS: tl.constexpr = STEP_K // CHUNK  # a step and slice
    ROW_TILES: tl.constexpr = BLOCK_N // 16
    TILES: tl.constexpr = ROW_TILES * SLICES
    GROUPS: tl.constexpr = 1 if GROUP_SIZE == 0 or GROUP_SIZE >= STEP_K else STEP_K // GROUP_SIZE

    if EARLY:
        let_next_kernel_start()
    m_blocks = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    m_first = (pid % m_blocks) * BLOCK_M
    n_first = (pid // m_blocks) * BLOCK_N
    steps = tl.cdiv(K, SLICES * STEP_K)
    first = split * steps_a_split
    last = tl.minimum(first + steps_a_split, steps)
    # The last rows' tile again where BLOCK_N reaches past it: what comes out is not stored.
    last_row_tile = tl.cdiv(N, 16) - 1

    if PREFETCH > 0:
        row_tile = tl.minimum(n_first // 16 + tl.arange(0, ROW_TILES), last_row_tile).to(tl.int64)[:, None]
        line = tl.minimum(
            first * (SLICES * CHUNKS * 4) + tl.arange(0, PREFETCH),
            tl.minimum(last * (SLICES * CHUNKS), chunks) * 4 - 1,
        )
        prefetch_lines(words + (row_tile * chunks * 128 + line[None, :] * 32))
        GROUP_LINES: tl.constexpr = 1 if GROUP_SIZE == 0 else max(1, PREFETCH * CHUNK // (16 * GROUP_SIZE))
        group = first * (SLICES * STEP_K) // GROUP_SIZE if GROUP_SIZE != 0 else 0
        group = tl.minimum(group + tl.arange(0, GROUP_LINES) * 4, groups - 1)[None, :]
        prefetch_lines(scales + (row_tile * groups + group) * 8)
        if zeros is not None:
            prefetch_lines(zeros + (row_tile * groups + group) * 8)

    # Neighbouring warps take neighbouring tiles: slices first, then rows, then chunks.
    tile = tl.arange(0, CHUNKS * TILES)
    row_tile = tl.minimum(n_first // 16 + tile // SLICES % ROW_TILES, last_row_tile).to(tl.int64)
    chunk = (tile % SLICES) * CHUNKS + tile // TILES
    pair = tl.arange(0, GROUPS * TILES)
    pair_tile = tl.minimum(n_first // 16 + pair // SLICES % ROW_TILES, last_row_tile).to(tl.int64)
    pair_column = (pair % SLICES) * STEP_K
    pair_group = pair // TILES

    if SLICES == 1:
        x_row = m_first + tl.arange(0, BLOCK_M)[None, :]
        x_column = tl.arange(0, STEP_K)[:, None]
    else:
        # Pieces of 256 values, 16 bytes a lane, for each warp of its own slice.
        piece = tl.arange(0, BLOCK_M * STEP_K // 256 * SLICES)[:, None]
        value = (piece // SLICES) * 256 + tl.arange(0, 256)[None, :]
        x_row = m_first + value // STEP_K
        x_column = (piece % SLICES) * STEP_K + value % STEP_K
    x_pointers = x + x_row.to(tl.int64) * x_stride + x_column
    x_mask = x_row < M

    if AHEAD:
        q, scale, zero = _load_step(
            words,
            scales,
            zeros,
            first,
            last,
            row_tile,
            chunk,
            pair_tile,
            pair_column,
            pair_group,
            chunks,
            groups,
            EVEN,
            False,
            GROUP_SIZE,
            STEP_K,
            SLICES,
            CHUNKS,
        )
    if EARLY:
        wait_for_earlier_kernels()

    if SLICES == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(loop_bound(first), loop_bound(last)):
        if AHEAD:
            q_next, scale_next, zero_next = _load_step(
                words,
                scales,
                zeros,
                step + 1,
                last,
                row_tile,
                chunk,
                pair_tile,
                pair_column,
                pair_group,
                chunks,
                groups,
                EVEN,
                False,
                GROUP_SIZE,
                STEP_K,
                SLICES,
                CHUNKS,
            )
        else:
            q, scale, zero = _load_step(
                words,
                scales,
                zeros,
                step,
                last,
                row_tile,
                chunk,
                pair_tile,
                pair_column,
                pair_group,
                chunks,
                groups,
                EVEN,
                True,
                GROUP_SIZE,
                STEP_K,
                SLICES,
                CHUNKS,
            )
        x_step = x_pointers + step * (SLICES * STEP_K)
        if EVEN:
            x_tile = tl.load(x_step, mask=x_mask, other=0.0)
        else:
            x_tile = tl.load(x_step, mask=x_mask & (step * (SLICES * STEP_K) + x_column < K), other=0.0)
        scale = _spread_groups(scale, CHUNKS, GROUPS, TILES)
        if zeros is not None:
            zero = _spread_groups(zero, CHUNKS, GROUPS, TILES)
        weights = unpack_words(q, scale, None if zeros is None else zero, x, BITS, ASSEMBLY)
        weights = _as_operand(weights, BITS, CHUNKS, ROW_TILES, SLICES, PAIRED)
        if SLICES == 1:
            weights = tl.reshape(weights, (BLOCK_N, STEP_K))
            if PAIRED:
                x_tile = tl.reshape(tl.trans(x_tile), (1, BLOCK_M, STEP_K))
                x_tile = tl.reshape(_columns_as_operand(x_tile, 1, STEP_K, BLOCK_M), (STEP_K, BLOCK_M))
        else:
            x_tile = tl.reshape(x_tile, (BLOCK_M * STEP_K // 256, SLICES, 256))
            x_tile = tl.reshape(tl.permute(x_tile, (1, 0, 2)), (SLICES, BLOCK_M, STEP_K))
            x_tile = _columns_as_operand(x_tile, SLICES, STEP_K, BLOCK_M)
        if INTERPRETED:
            x_tile = to_float32(x_tile)
        acc = tl.dot(weights, x_tile, acc, input_precision="ieee")
        if WARPGROUPS:
            # The next step writes the registers of `weights`.
            wait_for_products()
        if AHEAD:
            q = q_next
            scale = scale_next
            zero = zero_next
    if SLICES > 1:
        acc = tl.sum(acc, 0)

    m = (m_first + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
    n = (n_first + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    n_mask = n < N
    if bias is not None:
        acc += load_float32(bias + n, n_mask)
    mask = n_mask & (m < M)
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
    config: TilesConfig | None,
) -> None:
    """x (M, K) @ weight (N, K).T (+ bias (N,)) (+ residual (M, N)) -> out (M, N), for M > 0.

    x and residual: rows of contiguous values. tokens: the number that the work is cut for, where `config`
    does not say how.
    """
    M, N, K, spec = x.shape[0], weight.N, weight.K, weight.spec
    words, scales, *optional = weight.tensors
    zeros = None if spec.symmetric else optional.pop(0)
    if optional:
        x = x.index_select(1, optional.pop())
    if config is None:
        config = choose_tiles(tokens, N, K, spec.bits)
    early = weight.is_prefetched and can_launch_early(x.device)
    warpgroups = config.slices == 1 and multiplies_by_warpgroups(x.device)
    steps = -(-K // (config.slices * config.step_k))
    split = config.splits > 1
    sums = torch.empty((config.splits, M, N), dtype=torch.float32, device=x.device) if split else out
    prefetch = 0
    if config.prefetch:
        lines_a_split = -(-words.shape[1] * TILE_WORDS * 4 // (LINE * config.splits))
        prefetch = min(next_power_of_two(lines_a_split), config.prefetch)
    # An option that is left out is one that older devices and Triton's interpreter need not know.
    options = {"launch_pdl": True} if early else {}

    def shapes() -> str:
        return f"M={M} N={N} K={K} {spec} dtype={x.dtype} {config}"

    with Launching("wna16_linear", x.device, shapes):
        grid = (-(-M // config.block_m) * -(-N // config.block_n), config.splits)
        wna16_linear_kernel[grid](
            x,
            words,
            scales,
            zeros,
            None if split else bias,
            None if split else residual,
            sums,
            M,
            N,
            K,
            words.shape[1],
            scales.shape[1],
            -(-steps // config.splits),
            x.stride(0),
            0 if split or residual is None else residual.stride(0),
            N if split else out.stride(0),
            BITS=spec.bits,
            GROUP_SIZE=0 if scales.shape[1] == 1 else spec.group_size,
            ASSEMBLY=unpack_assembly(spec.bits, x.dtype, spec.symmetric),
            SLICES=config.slices,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            STEP_K=config.step_k,
            EVEN=K % (config.slices * config.step_k) == 0,
            PAIRED=not warpgroups,
            AHEAD=config.ahead,
            PREFETCH=prefetch,
            EARLY=early,
            WARPGROUPS=warpgroups,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **options,
        )
        if split:
            combine_splits(sums, bias, residual, out, early=early)
