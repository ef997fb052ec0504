"""wna16_linear, wna16_linear_rms_norm, wna16_gate_up_silu and dequantize on the CUDA library."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import fused, library
from qsun_kernels.backends.panels import BLOCK_COLUMNS, pack_panels
from qsun_kernels.backends.problems import (
    DequantizeProblem,
    LinearOperator,
    PendingNorm,
    PreparedWeight,
    Wna16GateUpSiluProblem,
    Wna16LinearRmsNormProblem,
    Wna16Problem,
)

if TYPE_CHECKING:
    from qsun_kernels.quant import PackedWeight

ROWS_LAYOUT = "cuda.rows"
"""(qweight, scales[, qzeros][, g_idx]) as in PackedWeight, for float32. The others: backends/panels.py."""

PANEL_DTYPES = (torch.float16, torch.bfloat16)
"""Activations that the tensor cores take."""


def supports_linear(problem: Wna16Problem | DequantizeProblem) -> str | None:
    return library.refuse(problem.device, dtype=problem.dtype)


def describe_linear(problem: Wna16Problem) -> str:
    if problem.dtype == torch.float32:
        gather = ", group by group index" if problem.has_g_idx else ""
        return (
            f"wna16_rows<{problem.bits} bits>: a warp streams two weight rows, up to 8 tokens at once{gather}"
        )
    gather = ", x gathered by column" if problem.has_g_idx else ""
    return f"panels of {problem.bits} bits: streamed for few tokens, wgmma for many on sm_90a{gather}"


def supports_gate_up(problem: Wna16GateUpSiluProblem) -> str | None:
    if problem.dtype not in PANEL_DTYPES:
        return f"dtype is {problem.dtype}, expected one of {', '.join(map(str, PANEL_DTYPES))}"
    return library.refuse(problem.device, dtype=problem.dtype)


def describe_gate_up(problem: Wna16GateUpSiluProblem) -> str:
    return f"{describe_linear(problem.linear)}; silu(gate) * up before the one rounding"


def supports_linear_rms_norm(problem: Wna16LinearRmsNormProblem) -> str | None:
    return supports_linear(problem.linear) or fused.supports_rms_norm(problem.norm)


def describe_linear_rms_norm(problem: Wna16LinearRmsNormProblem) -> str:
    if problem.dtype not in PANEL_DTYPES:
        return f"{describe_linear(problem.linear)}; then {fused.describe_rms_norm(problem.norm)}"
    return (
        f"{describe_linear(problem.linear)}; the norm in the launch that adds the parts of a product whose "
        f"columns were split, else {fused.describe_rms_norm(problem.norm)}"
    )


def prepare(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    if dtype not in PANEL_DTYPES:
        return PreparedWeight(packed.spec, packed.N, packed.K, dtype, "cuda", ROWS_LAYOUT, packed.tensors)
    return _prepare_panels(packed, dtype, "wna16_linear")


def prepare_gate_up(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    return _prepare_panels(packed, dtype, "wna16_gate_up_silu")


def _prepare_panels(packed: PackedWeight, dtype: torch.dtype, operator: LinearOperator) -> PreparedWeight:
    panels = pack_panels(packed, dtype, gate_up=operator == "wna16_gate_up_silu")
    return PreparedWeight(
        packed.spec, packed.N, packed.K, dtype, "cuda", panels.layout, panels.tensors, operator
    )


def wna16_linear(
    x: Tensor,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool = False,
) -> Tensor:
    """x (M, K) -> (M, N), into `out` when that is given."""
    if out is None:
        out = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    if weight.stored_layout == ROWS_LAYOUT:
        # The tile that a row of x is in does not change the order in which its products are added.
        _launch_rows(x, weight, bias, residual, out)
    else:
        launch_panels(x, weight, bias, residual, out, batch_invariant)
    return out


class Norm(NamedTuple):
    """What a product's rows go through at its end: out (M, N) is their norm.

    squares: None, or the sums of squares of a norm that is left to the product behind
    (`PendingNorm.squares`); out is then its weighted rows.
    """

    weight: Tensor
    eps: float
    out: Tensor
    squares: Tensor | None = None


def wna16_linear_rms_norm(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """x (M, K), residual (M, N), norm_weight (N,) -> (norm of r, r), both (M, N)."""
    stream = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    if weight.stored_layout == ROWS_LAYOUT:
        _launch_rows(x, weight, bias, residual, stream)
        norm = fused.rms_norm(stream, norm_weight, eps, None)
        assert isinstance(norm, Tensor)
        return norm, stream
    norm = torch.empty_like(stream)
    launch_panels(x, weight, bias, residual, stream, batch_invariant, norm=Norm(norm_weight, eps, norm))
    return norm, stream


def wna16_gate_up_silu(x: Tensor, weight: PreparedWeight, out: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N / 2), into `out` when that is given."""
    if out is None:
        out = torch.empty((x.shape[0], weight.N // 2), dtype=x.dtype, device=x.device)
    launch_panels(x, weight, None, None, out, False)
    return out


@lru_cache(maxsize=4096)
def _scratch_bytes(
    M: int,
    N: int,
    K: int,
    bits: int,
    groups_per_block: int,
    has_zeros: bool,
    batch_invariant: bool,
    device: int,
    in_layer: bool,
) -> int:
    needed: int = library.binding.wna16_panels_scratch_bytes(
        M, N, K, bits, groups_per_block, has_zeros, batch_invariant, library.device_props(device), in_layer
    )
    return needed


def groups_per_block(weight: PreparedWeight) -> int:
    """Groups of a block of a panel weight."""
    group = 32 if weight.stored_layout.endswith("32") else weight.spec.group_size
    return 1 if group == "channel" else BLOCK_COLUMNS // group


def launch_panels(
    x: Tensor | PendingNorm,
    weight: PreparedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool,
    config: library.binding.StreamConfig
    | library.binding.GemmConfig
    | library.binding.TilesConfig
    | None = None,
    norm: Norm | None = None,
    sums: Tensor | None = None,
) -> None:
    """config: which kernel to run and how, for tests and tuning; by default the library chooses.

    sums: float32 (splits, M, N rounded up to 64), what blocks that split K leave; out is None then.
    """
    spec, panels, groups = weight.spec, weight.tensors[0], groups_per_block(weight)
    is_gate_up = weight.operator == "wna16_gate_up_silu"
    # With a residual, too: it may not matter to the bits whether the norm behind it is the same call.
    in_layer = is_gate_up or residual is not None or norm is not None or isinstance(x, PendingNorm)
    x_squares, x_eps = None, 0.0
    if isinstance(x, PendingNorm):
        x_squares, x_eps, x = x.squares, x.eps, x.weighted
    elif len(weight.tensors) == 2:
        x = _gathered(x, weight.tensors[1], weight.is_prefetched)
    device = x.get_device()
    scratch, scratch_bytes = sums, 0
    if sums is not None:
        scratch_bytes = sums.nbytes
    elif config is not None:
        if not isinstance(config, library.binding.StreamConfig):
            sizes = x.shape[0], weight.N, x.shape[1]
            scratch_bytes = library.binding.wna16_parts_bytes(*sizes, config)
    elif x_squares is None and (norm is None or norm.squares is None):
        scratch_bytes = _scratch_bytes(
            x.shape[0],
            weight.N,
            x.shape[1],
            spec.bits,
            groups,
            not spec.symmetric,
            batch_invariant,
            device,
            in_layer,
        )
    if scratch_bytes and scratch is None:
        scratch = torch.empty(scratch_bytes // 4, dtype=torch.float32, device=x.device)
    library.binding.wna16_panels(
        config,
        x.data_ptr(),
        panels.data_ptr(),
        library.address(bias),
        library.address(residual),
        0 if norm is None else norm.weight.data_ptr(),
        library.address(x_squares),
        library.address(out),
        0 if norm is None else norm.out.data_ptr(),
        0 if norm is None else library.address(norm.squares),
        library.address(scratch),
        scratch_bytes,
        x.shape[0],
        weight.N,
        x.shape[1],
        panels.shape[1],
        x.stride(0),
        library.row_stride(residual),
        library.row_stride(out),
        0.0 if norm is None else norm.eps,
        x_eps,
        spec.bits,
        groups,
        not spec.symmetric,
        is_gate_up,
        in_layer,
        batch_invariant,
        sums is not None,
        weight.is_prefetched,
        library.DTYPE_CODES[x.dtype],
        device,
        library.stream(device),
    )


def _gathered(x: Tensor, perm: Tensor, is_prefetched: bool) -> Tensor:
    """x (M, K) with its columns as the weight stores them: (M, len(perm)), zero where perm is -1.

    is_prefetched: of the weight that perm belongs to.
    """
    out = torch.empty((x.shape[0], len(perm)), dtype=x.dtype, device=x.device)
    device = x.get_device()
    library.binding.gather_columns(
        x.data_ptr(),
        perm.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        len(perm),
        x.stride(0),
        is_prefetched,
        library.DTYPE_CODES[x.dtype],
        device,
        library.stream(device),
    )
    return out


def _launch_rows(
    x: Tensor, weight: PreparedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor
) -> None:
    spec, tensors = weight.spec, weight.tensors
    qzeros = None if spec.symmetric else tensors[2]
    g_idx = tensors[-1] if len(tensors) == (3 if spec.symmetric else 4) else None
    device = x.get_device()
    library.binding.wna16_linear(
        x.data_ptr(),
        tensors[0].data_ptr(),
        tensors[1].data_ptr(),
        library.address(qzeros),
        library.address(g_idx),
        library.address(bias),
        library.address(residual),
        out.data_ptr(),
        x.shape[0],
        weight.N,
        weight.K,
        x.stride(0),
        library.row_stride(residual),
        out.stride(0),
        spec.bits,
        -1 if spec.group_size == "channel" else spec.group_size,
        library.DTYPE_CODES[x.dtype],
        device,
        library.stream(device),
    )


def dequantize(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as (N, K) of `dtype`."""
    spec = packed.spec
    out = torch.empty((packed.N, packed.K), dtype=dtype, device=packed.device)
    device = out.get_device()
    library.binding.dequantize(
        packed.qweight.data_ptr(),
        packed.scales.data_ptr(),
        library.address(packed.qzeros),
        library.address(packed.g_idx),
        out.data_ptr(),
        packed.N,
        packed.K,
        spec.bits,
        -1 if spec.group_size == "channel" else spec.group_size,
        library.DTYPE_CODES[packed.scales.dtype],
        library.DTYPE_CODES[dtype],
        device,
        library.stream(device),
    )
    return out
