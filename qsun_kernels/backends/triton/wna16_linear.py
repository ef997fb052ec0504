"""wna16_linear through Triton: which kernel multiplies by which weight.

triton.tiles    16-bit activations, codes of 2, 4 or 8 bits: `wna16_tiles`
triton.rows     the rest (float32, 3 bits, act-order groups of uneven size): `wna16_rows`
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import LinearImplementation, PreparedWeight, Wna16Problem
from qsun_kernels.backends.triton import wna16_layout, wna16_rows, wna16_tiles
from qsun_kernels.backends.triton.launch import multiprocessors, refuse, rows_of
from qsun_kernels.backends.triton.wna16_configs import TilesConfig, choose_tiles
from qsun_kernels.backends.triton.wna16_rows import RowsConfig
from qsun_kernels.quant import PackedWeight

INVARIANT_TOKENS = 16
"""The tokens that the work is cut for, whatever their number, where a row's bits must not depend on it."""


def _is_tiled(bits: int, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and bits in wna16_layout.TILED_BITS


def prepare(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """The weight in tiles, or the canonical tensors as they are."""
    tensors = wna16_layout.tile(packed) if _is_tiled(packed.spec.bits, dtype) else None
    layout = wna16_layout.LAYOUT
    if tensors is None:
        tensors, layout = packed.tensors, wna16_rows.LAYOUT
    return PreparedWeight(packed.spec, packed.N, packed.K, dtype, "triton", layout, tensors)


def wna16_linear(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
    *,
    config: TilesConfig | RowsConfig | None = None,
) -> Tensor:
    """x (M, K) @ weight (N, K).T (+ bias (N,)) (+ residual (M, N)) -> (M, N), into `out` when it is given.

    batch_invariant: cut the work the same way for every M, so that a row's sums keep their order. config: how
    to cut it, of the kind that the weight's layout takes; by default the kernel's own choice.
    """
    M = x.shape[0]
    if out is None:
        out = torch.empty((M, weight.N), dtype=x.dtype, device=x.device)
    if M == 0:
        return out
    x = rows_of(x)
    if residual is not None:
        residual = rows_of(residual)
    tokens = INVARIANT_TOKENS if batch_invariant else M
    if weight.stored_layout == wna16_layout.LAYOUT:
        assert not isinstance(config, RowsConfig)
        wna16_tiles.multiply(x, weight, bias, residual, out, tokens, config)
    else:
        assert not isinstance(config, TilesConfig)
        wna16_rows.multiply(x, weight, bias, residual, out, tokens, config)
    return out


def supports(problem: Wna16Problem) -> str | None:
    """None when a kernel runs the problem, else why not."""
    return refuse(problem.device, dtype=problem.dtype)


def describe(problem: Wna16Problem) -> str:
    """Which kernel it would be."""
    p = problem
    group = p.group_size if p.group_size == "channel" else f"g{p.group_size}"
    what = f"W{p.bits} {group}{' act-order' if p.has_g_idx else ''}"
    if _is_tiled(p.bits, p.dtype):
        one = choose_tiles(1, p.N, p.K, p.bits)
        uneven = f", or {wna16_rows.LAYOUT} if its groups are uneven" if p.has_g_idx else ""
        slices = f"{one.slices} slices of " if one.slices > 1 else ""
        return (
            f"wna16_linear_kernel: {what} in the layout {wna16_layout.LAYOUT}{uneven}; for one token "
            f"{one.block_n} rows x {slices}{one.step_k} columns a step, K split in {one.splits}"
        )
    rows = wna16_rows.choose(1, p.N, p.K, p.group_size, p.has_g_idx, p.dtype, multiprocessors(p.device))
    why = "3 bits" if p.bits == 3 else str(p.dtype).removeprefix("torch.")
    return (
        f"wna16_rows_kernel: {what} in the layout {wna16_rows.LAYOUT}, the one for {why}; for one token "
        f"{rows.block_n} rows x {rows.block_k} columns a step, K split in {rows.splits}"
    )


WNA16_LINEAR = LinearImplementation(supports, wna16_linear, describe, prepare)
