"""wna16_gate_up_silu in torch: the product with [gate; up] as `wna16_linear` has it, then silu_and_mul.

Layouts and their tensors are those of `wna16_linear`, rows in the canonical order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qsun_kernels.backends.problems import LinearImplementation, PreparedWeight, Wna16GateUpSiluProblem
from qsun_kernels.backends.reference import silu_and_mul, wna16_linear
from qsun_kernels.quant import PackedWeight


def supports(problem: Wna16GateUpSiluProblem) -> str | None:
    """Every shape, bits and group size, on every device."""
    return wna16_linear.supports(problem.linear)


def describe(problem: Wna16GateUpSiluProblem) -> str:
    """Which layout of the linear operator, and why not the other."""
    return f"{wna16_linear.describe(problem.linear)}; then silu and the product in float32"


def prepare(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """The weight as `wna16_linear` lays it out. Raises ValueError when a dequantised value overflows."""
    return replace(wna16_linear.prepare(packed, dtype), operator="wna16_gate_up_silu")


def run(x: Tensor, weight: PreparedWeight, out: Tensor | None) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for x (M, K) -> (M, N / 2).

    Sums of 16-bit x are accumulated in float32 and rounded to the dtype of x, once, because torch has no
    product of 16-bit matrices with a float32 result on every device; silu and the multiplication then run in
    float32, with one rounding at the end. For float32 x nothing is rounded in between.
    """
    y = silu_and_mul.run(wna16_linear.run(x, weight, None, None, None, False))
    return y if out is None else out.copy_(y)


IMPLEMENTATION = LinearImplementation(supports=supports, run=run, describe=describe, prepare=prepare)
