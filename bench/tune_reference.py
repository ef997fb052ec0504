"""What a tuned configuration's result must be: a product in float32, and how far from it is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.quant import PackedWeight

_TYPICAL_ERROR = 5e-3
_WORST_ERROR = 1.5e-2
"""Of the norm and of the largest value of the float32 result: some four roundings to bfloat16, while one lost
step of K shows as ten times that."""

_SLAB = 8192  # rows of a weight in float32 at a time: the largest would take 2 GB


def float32_product(x: Tensor, packed: PackedWeight) -> Tensor:
    """x (M, K) @ weight (N, K).T in float32, (M, N). packed: symmetric, in groups of equal size."""
    outs = []
    for n in range(0, packed.N, _SLAB):
        scales = packed.scales[n : n + _SLAB].contiguous()
        rows = PackedWeight(packed.spec, len(scales), packed.K, packed.qweight[n : n + _SLAB], scales)
        codes = rows.codes().float() - packed.spec.zero_point
        columns = packed.spec.columns_per_group(packed.K)
        outs.append(x.float() @ (codes * scales.float().repeat_interleave(columns, 1)).T)
    return torch.cat(outs, 1)


def error_of(got: Tensor, want: Tensor) -> str | None:
    """None, or what is wrong with a result that should be `want`."""
    difference = got.float() - want
    typical = float(difference.norm() / want.norm())
    worst = float(difference.abs().max() / want.abs().max())
    # Written so that NaN is an error.
    if typical < _TYPICAL_ERROR and worst < _WORST_ERROR:
        return None
    return f"error {typical:.3g} of the norm, {worst:.3g} of the largest value"
