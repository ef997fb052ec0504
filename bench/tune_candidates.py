"""Which configurations of the Triton matmul's tiles are worth timing for a problem.

Listed by hand, not the whole product: what spills registers, or takes more shared memory than an older GPU
has, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qsun_kernels.backends.triton.wna16_configs import TilesConfig
from qsun_kernels.backends.triton.wna16_layout import chunk_columns

_Geometry = tuple[int, int, int]  # block_n, step_k, warps
_Mode = tuple[bool, int, int]  # ahead, prefetch, stages

_AHEAD: _Mode = (True, 0, 1)
_AHEAD_PREFETCH: _Mode = (True, 256, 1)
_PLAIN: _Mode = (False, 0, 1)
_PREFETCH: _Mode = (False, 256, 1)
_STAGES3: _Mode = (False, 0, 3)
_STAGES4: _Mode = (False, 0, 4)
_AHEAD_STAGES3: _Mode = (True, 0, 3)


def candidates(bits: int, M: int, N: int, K: int, multiprocessors: int) -> Sequence[TilesConfig]:
    """Every configuration to time for M tokens and a weight (N, K) of 2, 4 or 8 bits, each once."""
    cuts = _four_bits(M) if bits == 4 else _other_bits(bits, M)
    found: dict[TilesConfig, None] = {}
    for cut in cuts:
        # A prefetch is for the start of a short kernel: long splits have none to gain.
        for splits in (1, 2) if cut.prefetch else _splits(cut, M, N, multiprocessors):
            config = replace(cut, splits=splits)
            if _fits(config, K, bits):
                found[config] = None
    return list(found)


def _four_bits(M: int) -> Sequence[TilesConfig]:
    found: list[TilesConfig] = []
    if M <= 16:
        block_m = 8 if M <= 8 else 16
        narrow = [(16, 128, 4), (16, 128, 8), (16, 128, 16), (16, 256, 4), (32, 128, 4), (32, 128, 8)]
        found += _sliced(block_m, narrow, [_AHEAD, _AHEAD_PREFETCH, _PREFETCH])
        found += _sliced(block_m, [(16, 128, 4), (16, 128, 8), (16, 256, 4), (32, 128, 4)], [_STAGES3])
        found += _sliced(block_m, [(64, 128, 4), (64, 128, 8), (32, 128, 4)], [_PREFETCH, _PLAIN])
        if block_m == 8:
            found += _sliced(block_m, [(64, 128, 4), (64, 128, 8), (16, 256, 8)], [_AHEAD])
            found += _sliced(block_m, [(32, 128, 8)], [_STAGES3])
    if 8 <= M <= 32:
        wide = [(64, 128, 4), (64, 256, 4), (128, 128, 8), (128, 128, 4)]
        found += _shared(16 if M <= 16 else 32, wide, [_STAGES3, _STAGES4, _AHEAD_STAGES3])
    if M == 32:
        found += _shared(32, [(256, 128, 8)], [_STAGES3, _STAGES4])
    if M >= 64:
        wide = [(64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 64, 8)]
        found += _shared(64, wide, [_STAGES3, _STAGES4, _AHEAD_STAGES3])
        found += _shared(64, [(256, 128, 8)], [_STAGES3, _AHEAD_STAGES3])
    if M >= 128:
        found += _shared(128, [(64, 64, 4), (128, 64, 4), (128, 64, 8), (256, 64, 8)], [_STAGES3, _STAGES4])
    return found


def _other_bits(bits: int, M: int) -> Sequence[TilesConfig]:
    found: list[TilesConfig] = []
    short, long = (64, 128) if bits == 8 else (128, 256)
    if M <= 16:
        block_m = 8 if M <= 8 else 16
        narrow = [(16, long, 8), (32, short, 4), (32, short, 8), (64, short, 4)]
        found += _sliced(block_m, narrow, [_AHEAD, _AHEAD_PREFETCH])
        found += _sliced(block_m, [(32, short, 4)], [_STAGES3])
    if 16 <= M <= 32:
        found += _shared(M, [(64, 128, 4), (128, 128, 8)], [_STAGES3, _AHEAD_STAGES3])
    if M >= 64:
        wide = [(64, 128, 4), (128, 128, 8), (256, 64 if bits == 8 else 128, 8)]
        found += _shared(64, wide, [_STAGES3, _AHEAD_STAGES3])
    return found


def _sliced(block_m: int, geometries: Sequence[_Geometry], modes: Sequence[_Mode]) -> Sequence[TilesConfig]:
    """Each warp with a slice of K of its own."""
    return [
        TilesConfig(block_m, block_n, step_k, warps, 1, warps, stages, ahead, prefetch)
        for block_n, step_k, warps in geometries
        for ahead, prefetch, stages in modes
    ]


def _shared(block_m: int, geometries: Sequence[_Geometry], modes: Sequence[_Mode]) -> Sequence[TilesConfig]:
    """All warps on the same columns."""
    return [replace(cut, slices=1) for cut in _sliced(block_m, geometries, modes)]


def _splits(cut: TilesConfig, M: int, N: int, multiprocessors: int) -> Sequence[int]:
    """At most three numbers of splits, from those with which about half of the multiprocessors have work."""
    tiles = -(-N // cut.block_n) * -(-M // cut.block_m)
    found: list[int] = []
    for splits in (1, 2, 4, 8, 16):
        programs = tiles * splits
        if splits > 1 and programs * cut.num_warps > 32 * multiprocessors:
            break
        if programs >= 0.45 * multiprocessors or splits == 16:
            found.append(splits)
    return found[:3] or [1]


def _fits(config: TilesConfig, K: int, bits: int) -> bool:
    columns = config.slices * config.step_k
    return config.step_k >= chunk_columns(bits) and columns <= K and config.splits <= -(-K // columns)
