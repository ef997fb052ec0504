"""Random packed weights, drawn on the device they are for: those of a 70B model never pass the host."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.quant import PackedWeight, QuantSpec


def random_packed_weight(
    N: int, K: int, spec: QuantSpec, dtype: torch.dtype, generator: torch.Generator
) -> PackedWeight:
    """Uniform codes, scales of `dtype` spread over a factor of three, zero points near the middle.

    A uniform code has variance max_code**2 / 12, so entries of variance 1/K need a scale of sqrt(12/K) /
    max_code: inputs of unit variance then give outputs of unit variance.
    """
    device = generator.device
    shape, groups = (N, K), spec.num_groups(K)
    codes = torch.randint(0, spec.max_code + 1, shape, dtype=torch.uint8, device=device, generator=generator)
    spread = torch.rand(N, groups, device=device, generator=generator) + 0.5
    scales = (spread * (12.0 / K) ** 0.5 / spec.max_code).to(dtype)
    zeros: Tensor | None = None
    if not spec.symmetric:
        middle = 1 << (spec.bits - 1)
        zeros = torch.randint(
            middle - 1, middle + 1, (N, groups), dtype=torch.uint8, device=device, generator=generator
        )
    return PackedWeight.from_codes(codes, scales, spec, zeros)


def weight_bytes(N: int, K: int, spec: QuantSpec | None, dtype: torch.dtype) -> int:
    """Algorithmic bytes of a weight: codes, scales of `dtype`, zero points; dense without a spec.

    Zero points are counted at the width of a code: that is all they hold, however they are stored.
    """
    if spec is None:
        return N * K * dtype.itemsize
    groups = spec.num_groups(K)
    zeros = 0 if spec.symmetric else N * groups * spec.bits // 8
    return N * K * spec.bits // 8 + N * groups * dtype.itemsize + zeros
