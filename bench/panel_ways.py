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

Kernel = Literal["stream", "gemm_sm90"]
KERNELS: tuple[Kernel, ...] = ("stream", "gemm_sm90")
Way = tuple[int, ...]

SOURCE = Path(__file__).resolve().parents[1] / "csrc" / "wna16"

STREAM_TOKENS = (1, 2, 4, 8, 16)
GEMM_TOKENS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tokens that each kernel is measured at."""

_BLOCK_ROWS, _BLOCK_COLUMNS, _TILE_ROWS, _TOKENS = 64, 128, 16, 8
_RESERVED_BYTES = 1024  # of shared memory, by the system, a block
_MOST_SPLITS, _MOST_STAGES = 16, 8
_FEWEST_CLUSTER_TOKENS, _MOST_CLUSTER = 64, 8  # of a tile and of splits whose blocks add among themselves
_MOST_TURNS = 4  # of the blocks that a multiprocessor holds at once
_FEWEST_BLOCKS = 60  # a launch of fewer leaves more than half of an H100 idle


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A weight (N, K) and a number of tokens."""

    K: int
    N: int
    M: int

    @property
    def matrix(self) -> tuple[int, int]:
        return self.K, self.N

    def __str__(self) -> str:
        return f"{self.K}x{self.N} M={self.M}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What candidates depend on.

    shared_bytes: the shared memory of a block launched a way. tiles: of the kernel for many tokens.
    """

    sm_count: int
    shared_memory: int
    tiles: Sequence[tuple[int, int]]
    shared_bytes: Callable[[Kernel, Cell, Way], int]

    def room(self, blocks: int) -> int:
        """Shared memory of each of so many blocks on a multiprocessor."""
        return (self.shared_memory + _RESERVED_BYTES) // blocks - _RESERVED_BYTES


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
    """The arguments of the library's StreamConfig or GemmConfig."""
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
    ways = _gemm_ways(cell, machine) if kernel == "gemm_sm90" else _stream_ways(cell, machine)
    return list(dict.fromkeys(ways))


def _stream_ways(cell: Cell, machine: Machine) -> Iterator[Way]:
    token_tiles = -(-cell.M // _TOKENS)
    column_blocks, tiles = -(-cell.K // _BLOCK_COLUMNS), -(-cell.N // _TILE_ROWS)
    for row_tiles, warps, stages, engine, waves in itertools.product(
        (2, 4), (4, 6, 8, 12, 16), (2, 3, 4), (0, 1), (0, 1, 2, 3)
    ):
        # More warps are compiled for the smallest tile alone, and one without columns of its own only waits.
        if warps > (16 if token_tiles == 1 and row_tiles == 2 else 8) or warps > column_blocks:
            continue
        # A warp has no more stages to fill than turns of its own.
        if stages > 2 and stages > -(-column_blocks // warps) + 1:
            continue
        # More blocks than row tiles to deal them to.
        if waves * machine.sm_count > tiles:
            continue
        way = (token_tiles, row_tiles, warps, stages, engine, waves)
        if machine.shared_bytes("stream", cell, way) <= machine.shared_memory:
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
            for stages in _stages(cell, machine, (token_tile, warp_groups, split), beside, columns):
                yield token_tile, warp_groups, split, stages, 0
                if may_add:
                    yield token_tile, warp_groups, split, stages, 1


def _most_beside(token_tile: int, warp_groups: int) -> int:
    """About how many blocks of the kernel for many tokens the registers of a multiprocessor hold."""
    if token_tile > 96 or warp_groups > 2:
        return 1
    if token_tile > 32:
        return 2
    return 3 if warp_groups == 2 else 6


def _stages(
    cell: Cell, machine: Machine, tile: tuple[int, int, int], blocks: int, columns: int
) -> Sequence[int]:
    """The most that fit for so many blocks a multiprocessor, and for one fewer."""
    found = []
    for beside in range(max(1, blocks - 1), blocks + 1):
        fitting = [
            stages
            for stages in range(2, min(_MOST_STAGES, columns) + 1)
            if machine.shared_bytes("gemm_sm90", cell, (*tile, stages, 0)) <= machine.room(beside)
        ]
        found += fitting[-1:]
    return list(dict.fromkeys(found))
