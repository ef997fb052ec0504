"""wna16_linear_rms_norm through Triton: the bits of its two kernels called one after the other."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import QuantSpec, prepare_weight, rms_norm, wna16_linear, wna16_linear_rms_norm
from qsun_kernels.testing import inputs

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [0, 1, 5])
def test_bits_are_those_of_the_two_operators(device: torch.device, M: int, dtype: torch.dtype) -> None:
    N, K = 74, 173
    source = inputs.generator(M)
    packed = inputs.packed_weight(source, N, K, QuantSpec(4, 32, False), device=device).with_scales(dtype)
    weight = prepare_weight(packed, dtype=dtype, backend="triton")
    x = inputs.normal(source, (M, K), dtype, device)
    residual = inputs.normal(source, (M, N), dtype, device)
    norm_weight, bias = (inputs.normal(source, (N,), dtype, device) for _ in range(2))
    with inputs.poisoned_outputs():
        norm, stream = wna16_linear_rms_norm(x, weight, residual, norm_weight, eps=1e-5, bias=bias)
    expected = wna16_linear(x, weight, bias, residual)
    assert torch.equal(stream, expected)
    assert torch.equal(norm, rms_norm(expected, norm_weight, eps=1e-5, backend="triton"))
