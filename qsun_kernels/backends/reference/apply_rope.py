"""apply_rope in torch: float32 arithmetic, one rounding to the dtype of q and k."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.backends.problems import ApplyRopeProblem, Implementation
from qsun_kernels.backends.reference.dtypes import refuse_dtypes


def supports(problem: ApplyRopeProblem) -> str | None:
    """Every number and width of heads, on every device."""
    return refuse_dtypes(dtype=problem.dtype)


def describe(problem: ApplyRopeProblem) -> str:
    """What runs."""
    return "torch operations in float32"


def run(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the pairs (i, i + D/2) of every head by the angles of its position (arXiv 2104.09864, section
    3.4.2).

    q (T, Hq, D), k (T, Hk, D), positions int64 (T,), cos_sin float32 (max_positions, D) -> contiguous q, k.
    A position outside the table raises IndexError on the CPU, and fails the device assertion of torch on a
    GPU.
    """
    return turn(q, positions, cos_sin), turn(k, positions, cos_sin)


def turn(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """One of q and k: heads (T, H, D), turned, contiguous."""
    # index_select refuses what indexing would wrap around: a negative position is an error, not the table's
    # end.
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(heads.dtype)


IMPLEMENTATION = Implementation(supports=supports, run=run, describe=describe)
