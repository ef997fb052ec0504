"""Random packed weights, drawn on the device they are for: those of a 70B model never pass the host."""

from __future__ import annotations

import torch
from torch import Tensor

from qsun_kernels.quant import PackedWeight, QuantSpec


def random_packed_weight(
    N: int,
    K: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    act_order: bool = False,
) -> PackedWeight:
    """Uniform codes, scales of `dtype` spread over a factor of three, zero points near the middle.

    The middle of 2**bits codes lies between two of them, and a zero point is one: entries of a group have a
    mean of half a step. It is up in half of the groups and down in the others, by the zero points, or where
    none are stored by the signs of the scales. Were it the same in all, every product would be led by the
    mean of its inputs: the layers of a random model would turn every token into one of two directions, and
    no answer would tell what it had read.

    A uniform code has variance max_code**2 / 12, so entries of variance 1/K need a scale of sqrt(12/K) /
    max_code: inputs of unit variance then give outputs of unit variance.

    act_order: the columns of a group lie scattered over the row, as they do when a quantiser sorted them by
    importance.
    """
    device = generator.device
    groups = spec.num_groups(K)
    spread = torch.rand(N, groups, device=device, generator=generator) + 0.5
    scales = (spread * (12.0 / K) ** 0.5 / spec.max_code).to(dtype)
    zeros: Tensor | None = None
    if spec.symmetric:
        is_up = torch.rand(N, groups, device=device, generator=generator) < 0.5
        scales = torch.where(is_up, -scales, scales)
    else:
        middle = 1 << (spec.bits - 1)
        zeros = torch.randint(
            middle - 1, middle + 1, (N, groups), dtype=torch.uint8, device=device, generator=generator
        )
    g_idx: Tensor | None = None
    if act_order:
        scattered = torch.randperm(K, device=device, generator=generator)
        g_idx = (scattered // spec.columns_per_group(K)).int()
    return PackedWeight(spec, N, K, _random_codes(N, K, spec.bits, generator), scales, zeros, g_idx)


def _random_codes(N: int, K: int, bits: int, generator: torch.Generator) -> Tensor:
    """Uniform codes as `pack_codes` lays them out, int32 (N, words).

    Codes fill the bits of a row without gaps, so uniform words are uniform codes, and nothing as wide as a
    byte a code is ever made.
    """
    words = -(-K * bits // 32)
    low, high = -(1 << 31), 1 << 31
    stream = torch.randint(
        low, high, (N, words), dtype=torch.int32, device=generator.device, generator=generator
    )
    used = K * bits % 32
    if used:
        # What lies behind the last code of a row is zero.
        stream[:, -1] &= (1 << used) - 1
    return stream


def weight_bytes(N: int, K: int, spec: QuantSpec | None, dtype: torch.dtype) -> int:
    """Algorithmic bytes of a weight: codes, scales of `dtype`, zero points; dense without a spec.

    Zero points are counted at the width of a code: that is all they hold, however they are stored.
    """
    if spec is None:
        return N * K * dtype.itemsize
    groups = spec.num_groups(K)
    zeros = 0 if spec.symmetric else N * groups * spec.bits // 8
    return N * K * spec.bits // 8 + N * groups * dtype.itemsize + zeros
