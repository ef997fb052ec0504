"""wna16_linear_rms_norm in torch: `wna16_linear` with a residual, then `rms_norm` of what it rounded."""

from __future__ import annotations

from torch import Tensor

from qsun_kernels.backends.problems import Implementation, PreparedWeight, Wna16LinearRmsNormProblem
from qsun_kernels.backends.reference import rms_norm, wna16_linear


def supports(problem: Wna16LinearRmsNormProblem) -> str | None:
    """What both parts support."""
    return wna16_linear.supports(problem.linear) or rms_norm.supports(problem.norm)


def describe(problem: Wna16LinearRmsNormProblem) -> str:
    """What the two parts are."""
    return f"{wna16_linear.describe(problem.linear)}; then the norm: {rms_norm.describe(problem.norm)}"


def run(
    x: Tensor,
    weight: PreparedWeight,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """x (M, K), residual (M, N), norm_weight (N,) -> (norm of r, r), both (M, N)."""
    stream = wna16_linear.run(x, weight, bias, residual, None, batch_invariant)
    return rms_norm.normalize(stream, norm_weight, eps), stream


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
