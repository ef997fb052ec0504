"""silu(x @ gate.T) * (x @ up.T) in two kernels: the product with [gate; up], then silu_and_mul.

Gate and up are rounded to the dtype of x between the two.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qsun_kernels.backends.problems import (
    LinearImplementation,
    PreparedWeight,
    SiluAndMulProblem,
    Wna16GateUpSiluProblem,
)
from qsun_kernels.backends.triton import silu_and_mul, wna16_linear
from qsun_kernels.quant import PackedWeight


def prepare(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """The layout of the matmul, rows in the canonical order."""
    return replace(wna16_linear.prepare(packed, dtype), operator="wna16_gate_up_silu")


def wna16_gate_up_silu(x: Tensor, weight: PreparedWeight, out: Tensor | None = None) -> Tensor:
    """x (M, K) -> (M, N / 2) for the weight [gate; up] (N, K), into `out` when it is given."""
    return silu_and_mul.silu_and_mul(wna16_linear.wna16_linear(x, weight), out)


def supports(problem: Wna16GateUpSiluProblem) -> str | None:
    """None when the kernels run the problem, else why not."""
    return wna16_linear.supports(problem.linear)


def describe(problem: Wna16GateUpSiluProblem) -> str:
    """Which kernels they would be."""
    activation = SiluAndMulProblem(problem.N // 2, problem.dtype, problem.device)
    return f"{wna16_linear.describe(problem.linear)}; then {silu_and_mul.describe(activation)}"


WNA16_GATE_UP_SILU = LinearImplementation(supports, wna16_gate_up_silu, describe, prepare)
