"""dequantize through Triton, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import QuantSpec, dequantize
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_dequantize

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, "channel")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_every_format(device: torch.device, bits: int, group_size: int | str, symmetric: bool) -> None:
    # K ends in the middle of a group and of a word of every width of codes.
    index = BITS.index(bits) + GROUP_SIZES.index(group_size)
    spec, dtype = QuantSpec(bits, group_size, symmetric), DTYPES[index % 3]
    packed = inputs.packed_weight(
        inputs.generator(bits), 19, 173, spec, act_order=index % 2 == 0, device=device
    )
    with inputs.poisoned_outputs():
        got = dequantize(packed, dtype, backend="triton")
    judge_dequantize(got, packed, dtype).require()


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 11), (33, 32), (2, 1025)])
def test_shapes_and_dtypes_of_scales(device: torch.device, N: int, K: int, scale_dtype: torch.dtype) -> None:
    packed = inputs.packed_weight(
        inputs.generator(N + K), N, K, QuantSpec(3, 64, False), scale_dtype=scale_dtype, device=device
    )
    judge_dequantize(dequantize(packed, torch.bfloat16, backend="triton"), packed, torch.bfloat16).require()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_model_size(device: torch.device, bits: int) -> None:
    packed = inputs.packed_weight(
        inputs.generator(bits), 4096, 4096, QuantSpec(bits, 128, False), act_order=True, device=device
    )
    judge_dequantize(dequantize(packed, torch.float16, backend="triton"), packed, torch.float16).require()
