"""What torch's two int4 kernels share: which problems they take, and their scales and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_bench.cases import Case
from qsun_bench.cases.wna16 import Wna16Operands
from qsun_kernels.backends.problems import Wna16Problem


def refusal(case: Case, device: torch.device, *, n_multiple: int, k_multiple: int) -> str | None:
    """Why torch's int4 kernels cannot run a case; None when they can."""
    problem = case.problem(device)
    assert isinstance(problem, Wna16Problem)
    if problem.bits != 4:
        return f"4 bits only, got {problem.bits}"
    if problem.dtype != torch.bfloat16:
        return f"bfloat16 only, got {problem.dtype}"
    if problem.group_size not in (32, 64, 128):
        return f"group sizes 32, 64 and 128 only, got {problem.group_size}"
    if problem.has_g_idx:
        return "no act-order"
    if problem.K % problem.group_size or problem.K % k_multiple:
        return f"K must be a multiple of the group size and of {k_multiple}, got {problem.K}"
    if problem.N % n_multiple:
        return f"N must be a multiple of {n_multiple}, got {problem.N}"
    return None


def scales_and_zeros(operands: Wna16Operands) -> Tensor:
    """(K / group_size, N, 2) bfloat16: the scale s and the offset z of w = (code - 8) * s + z."""
    weight = operands.weight
    scales = weight.scales.float()
    offsets = torch.zeros_like(scales) if weight.qzeros is None else (8 - weight.qzeros.float()) * scales
    return torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)


def group_size(operands: Wna16Operands) -> int:
    size = operands.weight.spec.group_size
    assert size != "channel"
    return size
