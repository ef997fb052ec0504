"""Norms that one product leaves to the next, in torch: what the kernels compute, and what they round."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import SQUARED_COLUMNS, PendingNorm, PendingNorms, PreparedWeight
from qsun_kernels.backends.reference import silu_and_mul, wna16_linear


def cannot(weight: PreparedWeight) -> str | None:
    """Why a norm cannot pend in front of or behind a product with this weight; None when it can."""
    if weight.dtype == torch.float16:
        return "dtype is torch.float16, which may not hold rows before their norm"
    return None


def leave(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
) -> tuple[PendingNorm, Tensor]:
    """x (M, K), residual (M, N), norm_weight (N,) -> (norm, r (M, N)); r is rounded before it is squared."""
    stream = wna16_linear.run(x, weight, bias, residual, None, False)
    rows = stream.float()
    weighted = (rows * norm_weight.float()).to(stream.dtype)
    padded = torch.nn.functional.pad(rows, (0, -weight.N % SQUARED_COLUMNS))
    squares = padded.square().unflatten(1, (-1, SQUARED_COLUMNS)).sum(dim=-1)
    return PendingNorm(weighted, squares, eps), stream


def take(
    x: PendingNorm, weight: PreparedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """The product of the norm, or silu(gate) * up of it. The int4 kernel of torch rounds its sums first."""
    mean = x.squares.sum(dim=-1, keepdim=True) / weight.K
    sums = _float32_product(x.weighted, weight) / torch.sqrt(mean + x.eps)
    if weight.operator == "wna16_gate_up_silu":
        y = silu_and_mul.run(sums).to(weight.dtype)
    else:
        for added in (bias, residual):
            sums = sums if added is None else sums + added.float()
        y = sums.to(weight.dtype)
    return y if out is None else out.copy_(y)


def _float32_product(x: Tensor, weight: PreparedWeight) -> Tensor:
    if weight.stored_layout == wna16_linear.DENSE:
        (dense,) = weight.tensors
        return x.float() @ dense.float().T
    return wna16_linear.run(x, weight, None, None, None, False).float()


PENDING_NORMS = PendingNorms(
    cannot_leave=cannot,
    cannot_take=cannot,
    pays=lambda rows, weight, reader: False,  # operations of torch are as many either way
    leave=leave,
    take=take,
)
