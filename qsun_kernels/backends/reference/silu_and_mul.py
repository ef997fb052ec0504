"""silu_and_mul in torch: float32 arithmetic, one rounding to the dtype of x."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qsun_kernels.backends.problems import Implementation, SiluAndMulProblem
from qsun_kernels.backends.reference.dtypes import refuse_dtypes


def supports(problem: SiluAndMulProblem) -> str | None:
    """Every width, on every device."""
    return refuse_dtypes(dtype=problem.dtype)


def describe(problem: SiluAndMulProblem) -> str:
    """What runs."""
    return "torch operations in float32"


def run(x: Tensor) -> Tensor:
    """``gate / (1 + exp(-gate)) * up`` for rows [gate | up] of x (..., 2F) -> (..., F) (SwiGLU, arXiv
    2002.05202).
    """
    gate, up = x.float().chunk(2, dim=-1)
    return functional.silu(gate).mul_(up).to(x.dtype)


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
