"""Panels: the weight layout of the CUDA matmuls, where a 16-byte load is a lane's own tensor-core fragments.

A panel block holds 64 rows x 128 columns of the weight; blocks of one row follow one another along K. A block
is four row tiles of 16 rows, each one piece of memory with all that is needed to rebuild its rows:

                128 columns                          a block
               +-----------+-----------+---         +----------+----------+----------+----------+
    64 rows    |   block   |   block   | ...        |  tile 0  |  tile 1  |  tile 2  |  tile 3  |
               +-----------+-----------+---         +----------+----------+----------+----------+
                block_bytes                          tile_bytes

                                                     a tile (W4, groups of 128, symmetric: 1024 + 32 bytes)
                                                    +---------+----------+---------+
                                                    |  codes  |  scales  |  zeros  |
                                                    +---------+----------+---------+
                                                                          if stored

A tile has eight steps `s` of 16 columns, the shape of the left operand of mma.m16n8k16 and of wgmma. Lane
4 * g + t of a warp owns, of each step, four pairs of neighbouring columns (PTX ISA, "Matrix Fragments for
mma.m16n8k16"):

    pair r   row (of 16)   columns (of 16)
      0        g           2t, 2t + 1
      1        g + 8       2t, 2t + 1           a row is  8 * (r % 2) + g
      2        g           8 + 2t, 9 + 2t       a column  8 * (r / 2) + 2t + (0: low, 1: high)
      3        g + 8       8 + 2t, 9 + 2t

Where the codes of a pair lie in 32-bit words (low in the lower half, high 16 bits further):

             from byte of the tile       word                     bit
    8 bits   (s / 2 * 32 + lane) * 16    2 * (s % 2) + r / 2      16 * (r % 2), high 8 bits further
    4 bits   (s / 4 * 32 + lane) * 16    s % 4                    4r
    2 bits   lane * 16                   s / 2                    8 * (s % 2) + 2r
    3 bits   lane * 16                   2 * (s / 4) + s % 4      3r     for s % 4 = 0, 1
             512 + lane * 8              s / 4                    3r     for s % 4 = 2
             for s % 4 = 3, of whose twelve bits these three words have four each: bits 12 to 15

each word of less than 8 bits then turned left by 2 (4 bits), 1 (3 bits) or 3 (2 bits). So one mask
(0x003c003c for 4 bits) takes both codes of a pair out of a turned word, each in the half of a register where
the tensor core wants it, and high in the mantissa of a 16-bit float (csrc/device/panel_codes.cuh says why).
Scales are of the dtype of the activations, zero points whole bytes, both at index
(g * groups_per_block + group) * 2 + (0: row g, 1: row g + 8) of those of the tile.

A row of "channel" weights repeats its scale in every block, as if groups had 128 columns. What pads N to 64
and K to 128 is zero: codes, scales and zero points.

Act-order (g_idx): columns are stored sorted by group, and `perm` names the original column of each stored
one, so that x is gathered instead of scales. Groups of uneven size are padded to whole runs of 32
columns and stored as groups of 32.

Gate and up: of a weight [gate; up] each stored tile of 16 rows has 8 rows of gate and the 8 rows of up that
belong to the same outputs, so one lane accumulates both factors of an output of silu(gate) * up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qsun_kernels.quant import PackedWeight
from qsun_kernels.quant.packing import unpack_codes

__all__ = ["BLOCK_COLUMNS", "BLOCK_ROWS", "Panels", "block_bytes", "pack_panels", "tile_bytes"]

TILE_ROWS = 16
BLOCK_TILES = 4
BLOCK_ROWS = TILE_ROWS * BLOCK_TILES
BLOCK_COLUMNS = 128

_UNEVEN_GROUP = 32
"""Columns of a stored group where groups of a g_idx are of uneven size: the smallest that kernels know."""

_SLICE_WEIGHTS = 1 << 22
"""Weights unpacked at a time: a few bytes each, against the matrices of a model at half a byte a weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """A weight (N, K) in panels, see the head of this file.

    panels: uint8 (ceil(N / 64), column_blocks, block_bytes), contiguous. perm: int32 (128 * column_blocks,),
    the original column of each stored one, -1 for padding; None where columns are in order.
    groups_per_block: 4, 2 or 1 for stored groups of 32, 64 or 128 columns. is_regrouped: whether groups of
    uneven size were padded to runs of 32 columns. dtype: of the scales and of the activations.
    """

    panels: Tensor
    perm: Tensor | None
    bits: int
    groups_per_block: int
    has_zeros: bool
    is_gate_up: bool
    is_regrouped: bool
    N: int
    K: int
    dtype: torch.dtype

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 stored rows."""
        return self.panels.shape[0]

    @property
    def column_blocks(self) -> int:
        """Blocks of 128 stored columns."""
        return self.panels.shape[1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 64 x 128 weights."""
        return self.panels.shape[2]

    @property
    def layout(self) -> str:
        """The name of the layout, which says what the kernel cannot see from the weight's spec."""
        return f"cuda.{'gate_up_' * self.is_gate_up}panels{'32' * self.is_regrouped}"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """(panels[, perm])."""
        return (self.panels,) if self.perm is None else (self.panels, self.perm)


def tile_bytes(bits: int, groups_per_block: int, has_zeros: bool) -> int:
    """Bytes of one row tile of a block: codes, 16-bit scales, and zero points if they are stored."""
    return TILE_ROWS * (BLOCK_COLUMNS * bits // 8 + groups_per_block * (3 if has_zeros else 2))


def block_bytes(bits: int, groups_per_block: int, has_zeros: bool) -> int:
    """Bytes of one block: its row tiles, one after another."""
    return BLOCK_TILES * tile_bytes(bits, groups_per_block, has_zeros)


def pack_panels(packed: PackedWeight, dtype: torch.dtype, *, gate_up: bool = False) -> Panels:
    """The weight in panels, on the device where it is.

    dtype: float16 or bfloat16, to which the scales are rounded. gate_up: the rows are [gate; up], N even, and
    are stored interleaved. Works on slices of rows: beside the result it takes tens of megabytes.

    Raises TypeError or ValueError naming the argument.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"dtype is {dtype}, expected torch.float16 or torch.bfloat16")
    if gate_up and packed.N % 2:
        raise ValueError(f"packed has N = {packed.N} rows, expected an even number: gate, then up")
    packed = packed.with_scales(dtype)
    spec, device = packed.spec, packed.device
    columns = _stored_columns(packed)
    stored_rows = 2 * _round_up(packed.N // 2, BLOCK_ROWS // 2) if gate_up else packed.N
    row_blocks = _round_up(stored_rows, BLOCK_ROWS) // BLOCK_ROWS
    column_blocks = len(columns.groups) // columns.groups_per_block
    has_zeros = packed.qzeros is not None
    size = block_bytes(spec.bits, columns.groups_per_block, has_zeros)
    panels = torch.empty((row_blocks, column_blocks, size), dtype=torch.uint8, device=device)

    perm, groups = (None if t is None else t.to(device) for t in (columns.perm, columns.groups))
    assert groups is not None
    step = max(1, _SLICE_WEIGHTS // (BLOCK_ROWS * BLOCK_COLUMNS * column_blocks))
    for first in range(0, row_blocks, step):
        last = min(first + step, row_blocks)
        tiles = panels[first:last].unflatten(2, (BLOCK_TILES, -1))
        words = _take_rows(packed.qweight, first, last, gate_up)
        codes = _take_columns(unpack_codes(words, spec.bits, packed.K), perm, BLOCK_COLUMNS * column_blocks)
        at = 0
        for part in _code_parts(codes, spec.bits):
            at = _write(tiles, at, part)
        for table in (packed.scales, packed.qzeros):
            if table is not None:
                rows = _take_columns(_take_rows(table, first, last, gate_up), groups, len(groups))
                at = _write(tiles, at, _group_part(rows, columns.groups_per_block))
    return Panels(
        panels,
        None if perm is None else perm.to(torch.int32),
        spec.bits,
        columns.groups_per_block,
        has_zeros,
        gate_up,
        columns.is_regrouped,
        packed.N,
        packed.K,
        dtype,
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# ---- which columns are stored where


@dataclass(frozen=True, slots=True)
class _StoredColumns:
    """perm: int64, the original column of each stored one, -1 for padding; None for columns in order.

    groups: int64, the original group of each stored one, -1 for padding; groups_per_block a block.
    """

    perm: Tensor | None
    groups: Tensor
    groups_per_block: int
    is_regrouped: bool


def _stored_columns(packed: PackedWeight) -> _StoredColumns:
    spec, K = packed.spec, packed.K
    num_groups = spec.num_groups(K)
    group_size = BLOCK_COLUMNS if spec.group_size == "channel" else spec.group_size
    groups_per_block = BLOCK_COLUMNS // group_size
    stored = torch.arange(_round_up(K, BLOCK_COLUMNS) // group_size)
    in_order = stored.new_zeros(len(stored)) if spec.group_size == "channel" else stored
    in_order = in_order.where(in_order < num_groups, -1)
    if packed.g_idx is None:
        return _StoredColumns(None, in_order, groups_per_block, False)

    g_idx = packed.g_idx.cpu().long()
    outside = (g_idx < 0) | (g_idx >= num_groups)
    if bool(outside.any()):
        k = int(outside.nonzero()[0])
        raise ValueError(f"g_idx[{k}] is {int(g_idx[k])}, expected a group in 0..{num_groups - 1}")
    order = g_idx.argsort(stable=True)
    counts = g_idx.bincount(minlength=num_groups)
    columns_per_group = spec.columns_per_group(K)
    if torch.equal(counts, (torch.arange(K) // columns_per_group).bincount(minlength=num_groups)):
        return _StoredColumns(_perm(order, torch.arange(K)), in_order, groups_per_block, False)

    runs = (counts + _UNEVEN_GROUP - 1) // _UNEVEN_GROUP
    before = (runs * _UNEVEN_GROUP).cumsum(0) - runs * _UNEVEN_GROUP
    place_in_group = torch.arange(K) - (counts.cumsum(0) - counts)[g_idx[order]]
    perm = _perm(order, before[g_idx[order]] + place_in_group)
    groups = torch.arange(num_groups).repeat_interleave(runs)
    groups_per_block = BLOCK_COLUMNS // _UNEVEN_GROUP
    groups = functional.pad(groups, (0, -len(groups) % groups_per_block), value=-1)
    return _StoredColumns(perm, groups, groups_per_block, True)


def _perm(order: Tensor, places: Tensor) -> Tensor | None:
    """Column order[i] is stored at places[i] (rising); None when every column stays where it is."""
    if torch.equal(order, places):
        return None
    perm = torch.full((_round_up(int(places[-1]) + 1, BLOCK_COLUMNS),), -1)
    perm[places] = order
    return perm


# ---- rows and columns in stored order, padded


def _take_rows(table: Tensor, first: int, last: int, gate_up: bool) -> Tensor:
    """The stored rows of blocks first..last of a table (N, width), zero where there is none."""
    if not gate_up:
        return _pad_rows(table[BLOCK_ROWS * first : BLOCK_ROWS * last], BLOCK_ROWS * (last - first))
    half = BLOCK_ROWS // 2
    eights = [
        _pad_rows(rows[half * first : half * last], half * (last - first)).unflatten(0, (-1, 8))
        for rows in table.chunk(2)
    ]
    return torch.stack(eights, dim=1).flatten(0, 2)


def _pad_rows(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) == count else functional.pad(rows, (0, 0, 0, count - len(rows)))


def _take_columns(table: Tensor, columns: Tensor | None, count: int) -> Tensor:
    """The named columns of a table (rows, width), zero for -1; without names all of them, padded to count."""
    if columns is None:
        return table if table.shape[1] == count else functional.pad(table, (0, count - table.shape[1]))
    return table.index_select(1, columns.clamp(min=0)).masked_fill_(columns < 0, 0)


# ---- the bytes of row tiles


def _code_parts(codes: Tensor, bits: int) -> Iterator[Tensor]:
    """The codes (rows, columns) as (row blocks, column blocks, row tiles, ...) in the order of their bytes.

    uint8 for 8 bits, else words as int32.
    """
    if bits == 8:
        split = codes.view(-1, 4, 2, 8, codes.shape[1] // BLOCK_COLUMNS, 4, 2, 2, 4, 2)
        #           block, rt, r % 2, g, column block, s / 2, s % 2, r / 2, t, high
        yield split.permute(0, 4, 1, 5, 3, 8, 6, 7, 2, 9)
        return
    split = codes.view(-1, 4, 2, 8, codes.shape[1] // BLOCK_COLUMNS, 8, 2, 4, 2)
    #           block, rt, r % 2, g, column block, s, r / 2, t, high
    steps = _four_pairs(split, bits)  # block, rt, g, column block, s, t, high
    if bits == 4:
        words = _words(steps, turn=2).unflatten(4, (2, 4))  # block, rt, g, column block, s / 4, s % 4, t
        yield words.permute(0, 3, 1, 4, 2, 6, 5)
    elif bits == 2:
        pairs = steps.unflatten(4, (4, 2))
        words = _words(pairs[:, :, :, :, :, 0] | pairs[:, :, :, :, :, 1] << 8, turn=3)
        yield words.permute(0, 3, 1, 2, 5, 4)
    else:
        halves = steps.unflatten(4, (2, 4))  # block, rt, g, column block, s / 4, s % 4, t, high
        fourth = halves[:, :, :, :, :, 3]
        first, second, third = (
            _words(halves[:, :, :, :, :, i] | (fourth >> 4 * i & 15) << 12, turn=1) for i in range(3)
        )  # block, rt, g, column block, s / 4, t
        yield torch.stack((first, second), dim=-1).permute(0, 3, 1, 2, 5, 4, 6)
        yield third.permute(0, 3, 1, 2, 5, 4)


def _four_pairs(split: Tensor, bits: int) -> Tensor:
    """int32: the codes of the four pairs of a lane side by side, pair r at bit r * bits."""
    return (
        split[:, :, 0, :, :, :, 0].int()
        | split[:, :, 1, :, :, :, 0].int() << bits
        | split[:, :, 0, :, :, :, 1].int() << 2 * bits
        | split[:, :, 1, :, :, :, 1].int() << 3 * bits
    )


def _words(halves: Tensor, *, turn: int) -> Tensor:
    """int32 words of their 16-bit halves (..., 2), turned left by `turn` bits."""
    words = halves[..., 0] | halves[..., 1] << 16
    return words << turn | words >> (32 - turn) & (1 << turn) - 1


def _group_part(table: Tensor, groups_per_block: int) -> Tensor:
    """Scales or zero points (rows, groups) as (row blocks, column blocks, row tiles, ...)."""
    split = table.view(-1, 4, 2, 8, table.shape[1] // groups_per_block, groups_per_block)
    return split.permute(0, 4, 1, 3, 5, 2)


def _write(tiles: Tensor, at: int, part: Tensor) -> int:
    """Put a part at byte `at` of the tiles, whose bytes are the last dimension; returns the byte after it."""
    size = part[0, 0, 0].numel() * part.element_size()
    if part.element_size() > 1:
        part = part.contiguous().view(torch.uint8)
    tiles[:, :, :, at : at + size].view(part.shape).copy_(part)
    return at + size
