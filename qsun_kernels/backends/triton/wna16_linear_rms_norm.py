"""wna16_linear_rms_norm in two kernels: the product with its residual, then the norm of what it rounded."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from qsun_kernels.backends.problems import Implementation, PreparedWeight, Wna16LinearRmsNormProblem
from qsun_kernels.backends.triton import rms_norm, wna16_linear


def wna16_linear_rms_norm(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (M, K), residual (M, N), norm_weight (N,) -> (norm of r, r), both (M, N)."""
    stream = wna16_linear.wna16_linear(x, weight, bias, residual, None, batch_invariant)
    return cast(Tensor, rms_norm.rms_norm(stream, norm_weight, eps, None)), stream


def supports(problem: Wna16LinearRmsNormProblem) -> str | None:
    """None when the kernels run the problem, else why not."""
    return wna16_linear.supports(problem.linear) or rms_norm.supports(problem.norm)


def describe(problem: Wna16LinearRmsNormProblem) -> str:
    """Which kernels they would be."""
    return f"{wna16_linear.describe(problem.linear)}; then {rms_norm.describe(problem.norm)}"


WNA16_LINEAR_RMS_NORM = Implementation(supports, wna16_linear_rms_norm, describe)
