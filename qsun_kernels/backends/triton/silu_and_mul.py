"""silu(gate) * up on rows of [gate | up].

out = gate / (1 + exp(-gate)) * up          in float32, rounded once
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qsun_kernels.backends.problems import Implementation, SiluAndMulProblem
from qsun_kernels.backends.triton.launch import Launching, next_power_of_two, refuse, rows_of
from qsun_kernels.backends.triton.numerics import exp_float32, load_float32, store_rounded

MAX_BLOCK = 1024


@triton.jit
def silu_and_mul_kernel(
    x: tl.tensor,  # (rows, 2F), rows x_stride apart
    out: tl.tensor,  # (rows, F), contiguous
    F: tl.tensor,
    x_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(F, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    column = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = load_float32(x + row * x_stride + column, mask)
    up = load_float32(x + row * x_stride + F + column, mask)
    # A NaN that the exponential loses is back with the numerator.
    activated = tl.div_rn(gate, 1.0 + exp_float32(-gate))
    store_rounded(out + row * F + column, activated * up, mask)


def silu_and_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x (..., 2F) = [gate | up] -> (..., F), into `out` (contiguous) when it is given."""
    F = x.shape[-1] // 2
    if out is None:
        out = torch.empty((*x.shape[:-1], F), dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        rows = rows_of(x)
        block = min(MAX_BLOCK, next_power_of_two(F))
        grid = (rows.shape[0] * -(-F // block),)
        with Launching("silu_and_mul", x.device, lambda: f"rows={rows.shape[0]} size={F} dtype={x.dtype}"):
            silu_and_mul_kernel[grid](rows, out, F, rows.stride(0), BLOCK=block, num_warps=4)
    return out


def supports(problem: SiluAndMulProblem) -> str | None:
    """None when the kernel runs the problem, else why not."""
    return refuse(problem.device, dtype=problem.dtype)


def describe(problem: SiluAndMulProblem) -> str:
    """Which kernel it would be."""
    return f"silu_and_mul_kernel: {min(MAX_BLOCK, next_power_of_two(problem.size))} values a program"


SILU_AND_MUL = Implementation(supports, silu_and_mul, describe)
