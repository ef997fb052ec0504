"""The weight as tensor cores take it ("triton.tiles"): 16-bit activations, codes of 2, 4 or 8 bits.

A tile is 16 rows of one chunk of 256 / bits columns, 512 bytes: 16 for each of the 32 threads of a warp,
which are just the codes that this thread hands to the tensor cores. So a warp reads a tile in one coalesced
load, and its codes become operands in the registers they arrived in.

                 k = 16 s + 8 h_k + 2 t + e                lane 4 r + t, for tokens N = 8 of mma.m16n8k16:
        +-----------+-----------+---
 r      | s=0 h_k=0 | s=0 h_k=1 | s=1 ...                  rows r (h_n=0) and r + 8 (h_n=1),
 r + 8  | s=0 h_k=0 | s=0 h_k=1 | s=1 ...                  columns 2t, 2t+1 (e) of each 8

    words    int32 (rows / 16, chunks, 128)   word v of a lane's four is word 4 lane + v of the tile
    scales   int32 (rows / 16, groups, 8)     low half: the scale of row r, high half: that of row r + 8
    zeros    int32 (rows / 16, groups, 8)     the zero points likewise, as integers; asymmetric weights only
    order    int32 (K,)                       the column of x that stored column k multiplies; act-order only

The pairs e = 0, 1 lie 16 bits apart, so that a word, shifted and masked, holds two codes in its halves:

    2 bits   v = s // 2   bits 16 e + 2 (h_n + 2 h_k + 4 (s % 2))
    4 bits   v = s        bits 16 e + 4 (h_n + 2 h_k)
    8 bits   v = 2 s + h_k    bits 8 e + 16 h_n: bytes are picked, not masked

Rows are padded to 16 and columns to 128 with codes, scales and zero points of 0. Act-order columns are sorted
by group, which makes groups runs of columns again, as long as every group but the last is full.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qsun_kernels.quant import PackedWeight
from qsun_kernels.quant.packing import unpack_codes

LAYOUT = "triton.tiles"

TILE_ROWS = 16
TILE_WORDS = 128
COLUMNS = 128
"""Columns are padded to a multiple of this: whole chunks and whole groups."""

TILED_BITS = (2, 4, 8)

_SLAB = 1 << 25  # codes laid out at a time: the intermediates are a few bytes each


def chunk_columns(bits: int) -> int:
    """Columns of a tile."""
    return 256 // bits


def tile(packed: PackedWeight) -> tuple[Tensor, ...] | None:
    """(words, scales[, zeros][, order]) of a weight with 16-bit scales and codes of 2, 4 or 8 bits.

    None for act-order with a group that is neither full nor the last: sorting would not make runs of it.
    """
    N, K, spec = packed.N, packed.K, packed.spec
    order = None
    if packed.g_idx is not None and packed.scales.shape[1] > 1:
        order = _sorted_columns(packed.g_idx, spec.columns_per_group(K), packed.scales.shape[1])
        if order is None:
            return None
    rows, columns = _up(N, TILE_ROWS), _up(K, COLUMNS)
    chunks = columns // chunk_columns(spec.bits)
    words = packed.qweight.new_empty((rows // TILE_ROWS, chunks, TILE_WORDS))
    slab = max(1, _SLAB // (columns * TILE_ROWS)) * TILE_ROWS
    for first in range(0, N, slab):
        codes = unpack_codes(packed.qweight[first : first + slab], spec.bits, K)
        if order is not None:
            codes = codes.index_select(1, order)
        codes = pad(codes, (0, columns - K, 0, _up(len(codes), TILE_ROWS) - len(codes)))
        tiles = slice(first // TILE_ROWS, first // TILE_ROWS + len(codes) // TILE_ROWS)
        words[tiles] = _words(codes, spec.bits)
    groups = 1 if spec.group_size == "channel" else columns // spec.group_size
    tensors = [words, _row_pairs(packed.scales.view(torch.int16), rows, groups)]
    if packed.qzeros is not None:
        tensors.append(_row_pairs(packed.qzeros, rows, groups))
    if order is not None:
        tensors.append(order)
    return tuple(tensors)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _sorted_columns(g_idx: Tensor, group_size: int, groups: int) -> Tensor | None:
    """The columns in the order of their groups, int32 (K,); None when that does not make runs of them."""
    counts = torch.bincount(g_idx, minlength=groups)
    if not bool((counts[:-1] == group_size).all()) or int(counts[-1]) > group_size:
        return None
    return torch.argsort(g_idx, stable=True).to(torch.int32)


def _words(codes: Tensor, bits: int) -> Tensor:
    """int32 (rows / 16, chunks, 128) of codes uint8 (rows, columns), both padded."""
    rows, columns = codes.shape
    tiles, chunks = rows // TILE_ROWS, columns // chunk_columns(bits)
    # The numbers behind the axes: their place in the word, or in the tile.
    if bits == 8:
        # tile h_n r | chunk s h_k t e -> tile chunk r t (s h_k) [h_n e]
        split = codes.view(tiles, 2, 8, chunks, 2, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
        shifts = [16 * h_n + 8 * e for h_n in range(2) for e in range(2)]
    elif bits == 4:
        # tile h_n r | chunk s h_k t e -> tile chunk r t s [h_k h_n e]
        split = codes.view(tiles, 2, 8, chunks, 4, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
        shifts = [4 * (h_n + 2 * h_k) + 16 * e for h_k in range(2) for h_n in range(2) for e in range(2)]
    else:
        # tile h_n r | chunk s//2 s%2 h_k t e -> tile chunk r t s//2 [s%2 h_k h_n e]
        split = codes.view(tiles, 2, 8, chunks, 4, 2, 2, 4, 2).permute(0, 3, 2, 7, 4, 5, 6, 1, 8)
        shifts = [
            2 * (h_n + 2 * h_k + 4 * odd) + 16 * e
            for odd in range(2)
            for h_k in range(2)
            for h_n in range(2)
            for e in range(2)
        ]
    fields = split.reshape(tiles, chunks, TILE_WORDS, len(shifts))
    words = torch.zeros((tiles, chunks, TILE_WORDS), dtype=torch.int32, device=codes.device)
    for field, shift in enumerate(shifts):
        words |= fields[..., field].to(torch.int32) << shift
    return words


def _row_pairs(values: Tensor, rows: int, groups: int) -> Tensor:
    """int32 (rows / 16, groups, 8) of 16-bit or 8-bit values (N, G): row r in the low half, r + 8 in the high
    one.
    """
    values = values.to(torch.int32) & 0xFFFF
    values = pad(values, (0, groups - values.shape[1], 0, rows - values.shape[0]))
    low, high = values.view(rows // TILE_ROWS, 2, 8, groups).unbind(1)
    return (low | (high << 16)).transpose(1, 2).contiguous()
