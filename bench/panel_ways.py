"""Ways to launch the CUDA matmuls on panel weights, and which of them are worth timing for a problem.

A way is what the table of choices holds (csrc/wna16/choices_table.py): the fields of its kernel's struct,
without the sizes. It becomes a configuration of the library for a matrix and a machine.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Kernel = Literal["stream", "gemm_sm90", "tiles_sm80"]
SM90_KERNELS: tuple[Kernel, ...] = ("stream", "gemm_sm90")
"""What an H100 takes."""
KERNELS: tuple[Kernel, ...] = (*SM90_KERNELS, "tiles_sm80")
Way = tuple[int, ...]

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "wna16"

TOKENS: Mapping[Kernel, tuple[int, ...]] = {
    "stream": (1, 2, 4, 8, 16),
    "gemm_sm90": (16, 24, 32, 48, 64, 96, 128, 192, 256),
    "tiles_sm80": (24, 32, 48, 64),
}
"""Numbers of tokens that each kernel is measured at."""
BITS: Mapping[Kernel, tuple[int, ...]] = {
    "stream": (2, 3, 4, 8),
    "gemm_sm90": (2, 3, 4, 8),
    "tiles_sm80": (4, 8),
}
"""Widths of codes that each is compiled for."""

SM80_SHARED_MEMORY = 163 << 10
"""Of a block on an A100, in whose place tiles_sm80 is measured."""

_BLOCK_ROWS, _BLOCK_COLUMNS, _TILE_ROWS, _TOKENS = 64, 128, 16, 8
_RESERVED_BYTES = 1024  # of shared memory, by the system, a block
_MOST_SPLITS, _MOST_STAGES = 16, 8
_STREAM_STAGES = (2, 3, 4)
_NARROW_STREAM_STAGES = (2, 3, 4, 5, 6, 8)
"""Of weights below 4 bits: a stage has fewer bytes of them, and as many bytes should be in flight."""
_MOST_COPIED_STAGES, _MOST_STREAM_BARRIERS = 4, 64  # without the copy engine; warps * stages
_LEAST_IN_FLIGHT = 24 << 10  # bytes of a weight, a multiprocessor: fewer do not keep the memory busy
_FEWEST_CLUSTER_TOKENS, _MOST_CLUSTER = 64, 8  # of a tile and of splits whose blocks add among themselves
_MOST_TURNS = 4  # of the blocks that a multiprocessor holds at once
_FEWEST_BLOCKS = 60  # a launch of fewer leaves more than half of an H100 idle
_TILE_WARPS = ((1, 4), (1, 8), (2, 2), (2, 4), (4, 2))  # groups of rows x of columns of tiles_sm80
_MOST_TILE_TOKENS, _MOST_TILE_STAGES = 64, 6
_REGISTERS = 1 << 16  # of a multiprocessor


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A weight (N, K) of some width and a number of tokens."""

    K: int
    N: int
    M: int
    bits: int = 4

    @property
    def matrix(self) -> tuple[int, int]:
        return self.K, self.N

    @property
    def weight(self) -> tuple[int, int, int]:
        return self.K, self.N, self.bits

    def __str__(self) -> str:
        return f"W{self.bits} {self.K}x{self.N} M={self.M}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What candidates depend on.

    shared_bytes: the shared memory of a block launched a way. tiles: of the kernel for many tokens.
    estimate: the way that the library gives tiles_sm80 on a GPU of sm_80 with as many multiprocessors.
    """

    sm_count: int
    shared_memory: int
    tiles: Sequence[tuple[int, int]]
    shared_bytes: Callable[[Kernel, Cell, Way], int]
    estimate: Callable[[Cell], Way]

    def room(self, kernel: Kernel, blocks: int) -> int:
        """Shared memory of each of so many blocks on a multiprocessor."""
        of_block = SM80_SHARED_MEMORY if kernel == "tiles_sm80" else self.shared_memory
        return (of_block + _RESERVED_BYTES) // blocks - _RESERVED_BYTES

    def beside(self, shared_bytes: int) -> int:
        """Blocks that a multiprocessor has so much shared memory for."""
        return (self.shared_memory + _RESERVED_BYTES) // (shared_bytes + _RESERVED_BYTES)


@cache
def table() -> ModuleType:
    """csrc/wna16/choices_table.py. FileNotFoundError where the package lies without its sources."""
    path = SOURCE / "choices_table.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, expected this package in the checkout of its sources")
    spec = importlib.util.spec_from_file_location("choices_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(kernel: Kernel) -> tuple[str, ...]:
    """The names of a way's numbers."""
    names: Mapping[str, tuple[str, ...]] = table().WAYS
    return names[kernel]


def in_words(kernel: Kernel, way: Way) -> str:
    """A way for people."""
    return f"{kernel} " + " ".join(f"{name}={value}" for name, value in zip(fields(kernel), way, strict=True))


def settings(kernel: Kernel, cell: Cell, way: Way, sm_count: int) -> dict[str, Any]:
    """The arguments of the library's StreamConfig, GemmConfig or TilesConfig."""
    if kernel == "tiles_sm80":
        # Before sm_90 no launch overlaps the one in front.
        return {**dict(zip(fields(kernel), way, strict=True)), "overlaps_producer": False}
    if kernel == "gemm_sm90":
        *numbers, in_cluster = way
        made_of = dict(zip(fields(kernel)[:-1], numbers, strict=True))
        return {**made_of, "adds_in_cluster": bool(in_cluster)}
    token_tiles, row_tiles, warps, stages, copy_engine, waves = way
    tiles = -(-cell.N // _TILE_ROWS)
    return {
        "token_tiles": token_tiles,
        "row_tiles": row_tiles,
        "row_blocks": -(-tiles // row_tiles) if waves == 0 else min(tiles, waves * sm_count),
        "warps": warps,
        "stages": stages,
        "copy_engine": bool(copy_engine),
        "overlaps_producer": True,
    }


def candidates(kernel: Kernel, cell: Cell, machine: Machine) -> Sequence[Way]:
    """Every way worth timing, each once."""
    makers = {"stream": _stream_ways, "gemm_sm90": _gemm_ways, "tiles_sm80": _tiles_ways}
    return list(dict.fromkeys(makers[kernel](cell, machine)))


def _stream_ways(cell: Cell, machine: Machine) -> Iterator[Way]:
    token_tiles = -(-cell.M // _TOKENS)
    column_blocks, tiles = -(-cell.K // _BLOCK_COLUMNS), -(-cell.N // _TILE_ROWS)
    all_stages = _NARROW_STREAM_STAGES if cell.bits < 4 else _STREAM_STAGES
    # Small weights are over before so many bytes are read: of those half of a multiprocessor's share.
    least = min(_LEAST_IN_FLIGHT, cell.K * cell.N * cell.bits // 8 // (2 * machine.sm_count))
    for row_tiles, warps, stages, engine, waves in itertools.product(
        (2, 4), (4, 6, 8, 12, 16), all_stages, (0, 1), (0, 1, 2, 3)
    ):
        # More warps are compiled for the smallest tile alone, and one without columns of its own only waits.
        most_warps = 16 if token_tiles == 1 and row_tiles == 2 and cell.bits < 8 else 8
        if warps > min(most_warps, column_blocks):
            continue
        if warps * stages > _MOST_STREAM_BARRIERS or (not engine and stages > _MOST_COPIED_STAGES):
            continue
        # More blocks than row tiles to deal them to.
        if waves * machine.sm_count > tiles:
            continue
        blocks = waves * machine.sm_count if waves else -(-tiles // row_tiles)
        # A warp has no more stages to fill than turns of its own.
        turns = -(-column_blocks // warps) * -(-tiles // (blocks * row_tiles))
        if stages > 2 and stages > turns + 1:
            continue
        way = (token_tiles, row_tiles, warps, stages, engine, waves)
        shared_bytes = machine.shared_bytes("stream", cell, way)
        if shared_bytes > machine.shared_memory:
            continue
        # The rows of x of one token tile leave room for more.
        beside = min(-(-blocks // machine.sm_count), machine.beside(shared_bytes))
        in_flight = beside * warps * stages * row_tiles * _TILE_ROWS * _BLOCK_COLUMNS * cell.bits // 8
        if token_tiles > 1 or in_flight >= least:
            yield way


def _gemm_ways(cell: Cell, machine: Machine) -> Iterator[Way]:
    column_blocks, row_blocks = -(-cell.K // _BLOCK_COLUMNS), -(-cell.N // _BLOCK_ROWS)
    for token_tile, warp_groups in machine.tiles:
        token_tiles = -(-cell.M // token_tile)
        # Tokens that are mostly padding, or weights that are taken apart more than four times.
        if token_tiles * token_tile > 2 * max(cell.M, 16) or token_tiles > 4:
            continue
        most_beside = _most_beside(token_tile, warp_groups)
        for split in range(1, min(_MOST_SPLITS, column_blocks) + 1):
            blocks = -(-row_blocks // warp_groups) * token_tiles * split
            # Sums of many splits cost more than the last wave gains.
            if blocks < _FEWEST_BLOCKS or (
                split > 1 and blocks > _MOST_TURNS * most_beside * machine.sm_count
            ):
                continue
            columns = -(-column_blocks // split)
            # One more than come together, for the next launch's, or as many.
            beside = min(most_beside, -(-blocks // machine.sm_count) + 1)
            may_add = token_tile >= _FEWEST_CLUSTER_TOKENS and 2 <= split <= _MOST_CLUSTER
            made = [(token_tile, warp_groups, split, stages, 0) for stages in _up_to(_MOST_STAGES, columns)]
            for way in _most_stages("gemm_sm90", cell, machine, made, beside):
                yield way
                if may_add:
                    yield *way[:4], 1


def _tiles_ways(cell: Cell, machine: Machine) -> Iterator[Way]:
    column_blocks, row_blocks = -(-cell.K // _BLOCK_COLUMNS), -(-cell.N // _BLOCK_ROWS)
    # Tiles come in pairs, and the tokens of a block in one weight.
    token_tiles = 2 * -(-min(cell.M, _MOST_TILE_TOKENS) // (2 * _TOKENS))
    token_blocks = -(-cell.M // (token_tiles * _TOKENS))
    for row_groups, column_groups in _TILE_WARPS:
        chunks = -(-column_blocks * 2 // column_groups)
        registers = _tile_registers(token_tiles, cell.bits) * 32 * row_groups * column_groups
        most_beside = _REGISTERS // registers
        for split in range(1, min(_MOST_SPLITS, chunks) + 1):
            blocks = -(-row_blocks // row_groups) * token_blocks * split
            if blocks < _FEWEST_BLOCKS or (split > 1 and blocks > 2 * most_beside * machine.sm_count):
                continue
            beside = min(most_beside, -(-blocks // machine.sm_count))
            tile = token_tiles, row_groups, column_groups, split
            # One stage more than a block has to fill is never waited for.
            made = [(*tile, stages) for stages in _up_to(_MOST_TILE_STAGES, -(-chunks // split) + 1)]
            yield from _most_stages("tiles_sm80", cell, machine, made, beside)


def _tile_registers(token_tiles: int, bits: int) -> int:
    """About how many a thread takes, as csrc/wna16/tiles_sm80.h counts them."""
    most = 128 if token_tiles <= 2 and bits < 8 else 256
    return min(88 + 20 * token_tiles + (24 if bits == 8 else 0), most)


def _most_beside(token_tile: int, warp_groups: int) -> int:
    """About how many blocks of the kernel for many tokens the registers of a multiprocessor hold."""
    if token_tile > 96 or warp_groups > 2:
        return 1
    if token_tile > 32:
        return 2
    return 3 if warp_groups == 2 else 6


def _up_to(most: int, columns: int) -> range:
    """Numbers of stages for so many columns of stages."""
    return range(2, min(most, columns) + 1)


def _most_stages(
    kernel: Kernel, cell: Cell, machine: Machine, ways: Sequence[Way], blocks: int
) -> Iterator[Way]:
    """Of ways in the order of their stages the last that fits for so many blocks a multiprocessor, and the
    last for one fewer.
    """
    for beside in range(max(1, blocks - 1), blocks + 1):
        room = machine.room(kernel, beside)
        yield from [way for way in ways if machine.shared_bytes(kernel, cell, way) <= room][-1:]
