"""rms_norm in torch: float32 arithmetic, one rounding to the dtype of x."""

from __future__ import annotations

from torch import Tensor

from qsun_kernels.backends.problems import Implementation, RmsNormProblem
from qsun_kernels.backends.reference.dtypes import refuse_dtypes


def supports(problem: RmsNormProblem) -> str | None:
    """Every width, on every device."""
    return refuse_dtypes(dtype=problem.dtype)


def describe(problem: RmsNormProblem) -> str:
    """What runs."""
    return "torch operations in float32"


def run(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, prefetch_weight: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = r / sqrt(mean(r**2) + eps) * weight`` (arXiv 1910.07467), r = x, or x + residual rounded to
    x.dtype.

    x, residual (..., H), weight (H,) -> y (..., H), or (y, r) with a residual. The squares are float32: they
    overflow, and y becomes zero, from magnitudes of about 1e19 on, which only float32 and bfloat16 can hold.
    """
    if residual is None:
        return normalize(x, weight, eps)
    r = x + residual
    return normalize(r, weight, eps), r


def normalize(r: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of r (..., H), to which a residual has been added already."""
    r32 = r.float()
    # The root of one number a row, in float64: a GPU's float32 rsqrt is off by more than rounding.
    scale = r32.square().mean(-1, keepdim=True).double().add_(eps).rsqrt_().float()
    return (r32 * scale).mul_(weight).to(r.dtype)


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
