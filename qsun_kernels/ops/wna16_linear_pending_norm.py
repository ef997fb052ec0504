"""A norm between two products without a pass of its own: the one in front leaves it, the one behind takes it.

Eager calls alone: nothing here is registered with torch.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from qsun_kernels.backends.problems import (
    MAX_PENDING_ROWS,
    SQUARED_COLUMNS,
    BackendName,
    PendingNorm,
    PendingNorms,
    PreparedWeight,
)
from qsun_kernels.errors import BackendUnavailable
from qsun_kernels.ops import checks
from qsun_kernels.ops.library import is_traced, refuse_gradient
from qsun_kernels.ops.prepared import check_prepared, linear_implementation

__all__ = ["norm_may_pend", "take", "wna16_linear_pending_norm"]


def wna16_linear_pending_norm(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    bias: Tensor | None = None,
    backend: BackendName | None = None,
) -> tuple[PendingNorm, Tensor]:
    """``r = x @ W.T (+ bias) + residual``, and of its norm what needs no other column: the rest is pending.

    Returns (norm, r): r (M, N) as `wna16_linear_rms_norm` has it, and the norm of its rows for `wna16_linear`
    or `wna16_gate_up_silu` to take as x. The norm is rounded before its root is applied and not after, so
    results differ by roundings. `norm_may_pend` tells whether this saves anything; where it does, r has the
    same bits.

    x (M, K) of at most 16 rows, weight from `prepare_weight` for bfloat16 (torch: float32, too), residual
    (M, N), norm_weight and bias (N,); backend as for `wna16_linear`. norm_weight may be read as early as the
    weight (see `wna16_linear_rms_norm`).

    Raises TypeError or ValueError naming the argument, BackendUnavailable where the weight's backend cannot
    leave a norm, RuntimeError if a gradient is wanted or the call is traced.
    """
    check_prepared(weight, "wna16_linear", backend)
    dtype, device = weight.dtype, weight.device
    checks.beside("x", x, dtype, device, "for which the weight was prepared")
    checks.rank("x", x, 2, "(M, K)")
    checks.rows("x", x)
    _check_rows("x", x, weight.K)
    checks.beside("residual", residual, dtype, device, "like x")
    checks.shape("residual", residual, (x.shape[0], weight.N), "(M, N)")
    checks.rows("residual", residual)
    vectors = {"norm_weight": norm_weight} if bias is None else {"norm_weight": norm_weight, "bias": bias}
    for name, vector in vectors.items():
        checks.beside(name, vector, dtype, device, "like x")
        checks.shape(name, vector, (weight.N,), "(N,)")
        checks.contiguous(name, vector)
    checks.epsilon("eps", eps)
    operator = "wna16_linear_pending_norm"
    refuse_gradient(operator, x=x, residual=residual, norm_weight=norm_weight, bias=bias)
    if is_traced(x, residual, norm_weight, bias, *weight.tensors):
        _refuse_tracing(operator)
    pending = _pending_norms(weight.backend)
    reason = "it leaves no norms" if pending is None else pending.cannot_leave(weight)
    if pending is None or reason is not None:
        raise BackendUnavailable(operator, weight.backend, str(reason))
    return pending.leave(x, weight, residual, norm_weight, eps, bias)


def norm_may_pend(rows: int, weight: PreparedWeight, reader: PreparedWeight) -> bool:
    """Whether the norm between two products of so many rows should be left to the second one.

    weight: of the product whose rows are normed; reader: of the one behind, prepared for either operator.
    True where the backend runs both by kernels that can, and would run them by the same kernels otherwise.
    Pure: depends on sizes, dtypes, layouts and the device alone. False in traced code.
    """
    if weight.backend != reader.backend or weight.dtype != reader.dtype or weight.device != reader.device:
        return False
    if is_traced(*weight.tensors, *reader.tensors):
        return False
    pending = _pending_norms(weight.backend)
    return (
        pending is not None
        and 0 < rows <= MAX_PENDING_ROWS
        and (weight.operator, weight.N) == ("wna16_linear", reader.K)
        and pending.cannot_leave(weight) is None
        and pending.cannot_take(reader) is None
        and pending.pays(rows, weight, reader)
    )


def take(
    x: PendingNorm, weight: PreparedWeight, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """The operator of a weight on rows whose norm is pending; all but x has been checked.

    Raises TypeError or ValueError naming a part of x, BackendUnavailable where the weight's backend cannot
    take x, RuntimeError in traced code.
    """
    weighted, squares = x.weighted, x.squares
    checks.beside("x.weighted", weighted, weight.dtype, weight.device, "for which the weight was prepared")
    checks.rank("x.weighted", weighted, 2, "(M, K)")
    checks.rows("x.weighted", weighted)
    _check_rows("x.weighted", weighted, weight.K)
    checks.beside("x.squares", squares, torch.float32, weight.device, "sums, beside the rows")
    shape = (weighted.shape[0], -(-weight.K // SQUARED_COLUMNS))
    checks.shape("x.squares", squares, shape, "(M, ceil(K / 16))")
    checks.contiguous("x.squares", squares)
    checks.epsilon("x.eps", x.eps)
    operator = f"{weight.operator} of a PendingNorm"
    if is_traced(weighted, squares, bias, residual, out, *weight.tensors):
        _refuse_tracing(operator)
    pending = _pending_norms(weight.backend)
    reason = "it takes no norm that is pending" if pending is None else pending.cannot_take(weight)
    if pending is None or reason is not None:
        raise BackendUnavailable(operator, weight.backend, str(reason))
    return pending.take(x, weight, bias, residual, out)


def _check_rows(name: str, rows: Tensor, K: int) -> None:
    if rows.shape[1] != K:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected (M, K) = (M, {K})")
    if rows.shape[0] > MAX_PENDING_ROWS:
        raise ValueError(f"{name} has {rows.shape[0]} rows, expected at most {MAX_PENDING_ROWS}")


def _refuse_tracing(operator: str) -> NoReturn:
    raise RuntimeError(f"{operator} was called in traced code, where a norm cannot be pending; norm the rows")


def _pending_norms(backend: BackendName) -> PendingNorms | None:
    implementation = linear_implementation(backend)
    return None if implementation is None else implementation.pending
