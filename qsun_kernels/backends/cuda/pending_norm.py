"""Norms that one product leaves to the next, both by the streaming kernel (csrc/wna16/stream_norm.cuh)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.problems import SQUARED_COLUMNS, PendingNorm, PendingNorms, PreparedWeight


def cannot_leave(weight: PreparedWeight) -> str | None:
    """Why a product with this weight cannot leave a norm; None when it can."""
    if weight.dtype != torch.bfloat16:
        return f"dtype is {weight.dtype}, expected torch.bfloat16 for a norm that is left to the next product"
    return None


def cannot_take(weight: PreparedWeight) -> str | None:
    """Why a product with this weight cannot take a norm that was left; None when it can."""
    if len(weight.tensors) == 2:
        return "the weight is stored in act-order, for which columns of whole rows are gathered"
    if weight.K % (4 * SQUARED_COLUMNS):
        return f"K is {weight.K}, expected a multiple of {4 * SQUARED_COLUMNS} where a norm is pending"
    return cannot_leave(weight)


def pays(rows: int, weight: PreparedWeight, reader: PreparedWeight) -> bool:
    """Whether the library streams both weights for so many rows, whoever makes the norm."""
    return _is_streamed(rows, weight) and _is_streamed(rows, reader)


def _is_streamed(rows: int, weight: PreparedWeight) -> bool:
    spec = weight.spec
    columns = len(weight.tensors[1]) if len(weight.tensors) == 2 else weight.K  # those of x, once gathered
    return _may_pend(
        rows,
        weight.N,
        columns,
        spec.bits,
        linear.groups_per_block(weight),
        not spec.symmetric,
        library.DTYPE_CODES[weight.dtype],
        weight.tensors[0].get_device(),
    )


@lru_cache(maxsize=4096)
def _may_pend(
    M: int, N: int, K: int, bits: int, groups_per_block: int, has_zeros: bool, dtype: int, device: int
) -> bool:
    return library.binding.may_pend_wna16_norm(
        M, N, K, bits, groups_per_block, has_zeros, dtype, library.device_props(device)
    )


def leave(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
) -> tuple[PendingNorm, Tensor]:
    """x (M, K), residual (M, N), norm_weight (N,) -> (norm, r (M, N))."""
    stream = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    weighted = torch.empty_like(stream)
    shape = (x.shape[0], -(-weight.N // SQUARED_COLUMNS))
    squares = torch.empty(shape, dtype=torch.float32, device=x.device)
    norm = linear.Norm(norm_weight, eps, weighted, squares)
    linear.launch_panels(x, weight, bias, residual, stream, False, norm=norm)
    return PendingNorm(weighted, squares, eps), stream


def take(
    x: PendingNorm, weight: PreparedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """The product of the norm, or silu(gate) * up of it: (M, N), or (M, N / 2)."""
    if out is None:
        width = weight.N // 2 if weight.operator == "wna16_gate_up_silu" else weight.N
        out = torch.empty((x.weighted.shape[0], width), dtype=weight.dtype, device=weight.device)
    linear.launch_panels(x, weight, bias, residual, out, False)
    return out


PENDING_NORMS = PendingNorms(cannot_leave, cannot_take, pays, leave, take)
