"""How the tiles of `wna16_tiles` are cut: as was measured, and as was measured nearby where nothing was.

`wna16_tuned` holds the fastest way found for some weights and numbers of tokens. For any other problem:

1. Tokens: the next larger number in the table, or the largest.
2. Weights: of those measured with that width of codes, the nearest in |log2 N| + |log2 K|.
3. What does not fit is made to: a step has at least the columns of a tile, and a split at least a step.

Group size, zero points and the 16-bit dtype are left out: they change little of what a step costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2

from qsun_kernels.backends.triton.wna16_layout import chunk_columns
from qsun_kernels.backends.triton.wna16_tuned import TUNED


@dataclass(frozen=True, slots=True)
class TilesConfig:
    """How the work is cut: see the picture in `wna16_tiles`.

    block_m, block_n: tokens and outputs a program. step_k: columns a step of each slice. slices: num_warps,
    or 1 where all warps share a step's columns. splits: programs along K. num_stages: steps of x, and without
    `ahead` of weights, on their way at once. ahead: a step's weights are loaded into registers while the step
    before is multiplied. prefetch: cache lines to fetch first of each 16 rows.
    """

    block_m: int
    block_n: int
    step_k: int
    slices: int
    splits: int
    num_warps: int
    num_stages: int
    ahead: bool
    prefetch: int


def tuned() -> Iterator[tuple[int, int, int, int, TilesConfig]]:
    """(bits, N, K, tokens, the fastest configuration) of everything measured."""
    for bits, N, K, tokens, cut, _ in TUNED:
        block_m, block_n, step_k, slices, splits, num_warps, num_stages, ahead, prefetch = cut
        config = TilesConfig(
            block_m, block_n, step_k, slices, splits, num_warps, num_stages, bool(ahead), prefetch
        )
        yield bits, N, K, tokens, config


@lru_cache(maxsize=4096)
def choose_tiles(M: int, N: int, K: int, bits: int) -> TilesConfig:
    """The configuration for M tokens; a function of its arguments alone."""

    def distance(row: tuple[int, int, int, int, TilesConfig]) -> tuple[bool, int, float]:
        _, other_N, other_K, tokens, _ = row
        return tokens < M, abs(tokens - M), abs(log2(N / other_N)) + abs(log2(K / other_K))

    *_, config = min((row for row in tuned() if row[0] == bits), key=distance)
    step_k = max(config.step_k, chunk_columns(bits))
    steps = -(-K // (config.slices * step_k))
    return replace(config, step_k=step_k, splits=min(config.splits, steps))
