"""wna16_linear through Triton with batch_invariant: a row's bits are its own.

Residuals here take the rounded product off again: what is left shows the last bits of the float32 sums, which
rounding to 16 bits would hide.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import QuantSpec, prepare_weight, wna16_linear
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_linear

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = [(4, 128, False), (4, "channel", False), (3, 32, False), (8, 64, True)]


def batches(M: int) -> list[tuple[int, int]]:
    """(first row, rows): one, a tile's worth, more than one tile."""
    return [(0, 1), (M - 1, 1), (3, 7), (1, 16), (2, 20)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size", "act_order"), FORMATS)
def test_a_row_is_the_same_in_every_batch(
    device: torch.device, bits: int, group_size: int | str, act_order: bool, dtype: torch.dtype
) -> None:
    M, N, K = 40, 37, 500
    source = inputs.generator(bits)
    spec = QuantSpec(bits, group_size, symmetric=False)
    packed = inputs.packed_weight(source, N, K, spec, act_order=act_order, device=device).with_scales(dtype)
    x = inputs.normal(source, (M, K), dtype, device)
    bias = inputs.normal(source, (N,), dtype, device)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    residual = -wna16_linear(x, prepared, bias)
    whole = wna16_linear(x, prepared, bias, residual, batch_invariant=True)
    judge_wna16_linear(whole, x, packed, bias, residual).require()
    for first, rows in batches(M):
        part = slice(first, first + rows)
        got = wna16_linear(x[part], prepared, bias, residual[part], batch_invariant=True)
        assert torch.equal(got, whole[part])
    # Neither the place in the batch nor what the others hold.
    others = torch.full_like(x, torch.nan)
    others[11] = x[5]
    alone = wna16_linear(others, prepared, bias, residual[5].expand_as(residual), batch_invariant=True)
    assert torch.equal(alone[11], whole[5])


def test_without_it_the_tiles_follow_the_number_of_tokens(device: torch.device) -> None:
    """Or the test above would pass for an argument that is ignored."""
    source, dtype = inputs.generator(0), torch.float16
    packed = inputs.packed_weight(source, 64, 2048, QuantSpec(4, "channel", True), device=device)
    x = inputs.normal(source, (40, 2048), dtype, device)
    prepared = prepare_weight(packed.with_scales(dtype), dtype=dtype, backend="triton")
    residual = -wna16_linear(x, prepared)
    for asked in (False, True):
        whole = wna16_linear(x, prepared, None, residual, batch_invariant=asked)
        one = wna16_linear(x[:1], prepared, None, residual[:1], batch_invariant=asked)
        assert torch.equal(whole[:1], one) is asked


def test_no_tokens_are_fine(device: torch.device) -> None:
    packed = inputs.packed_weight(inputs.generator(0), 8, 64, QuantSpec(4, 32, True), device=device)
    prepared = prepare_weight(packed, dtype=torch.float32, backend="triton")
    assert wna16_linear(torch.empty(0, 64, device=device), prepared, batch_invariant=True).shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (4096, 14336)])
def test_model_sizes(device: torch.device, N: int, K: int, dtype: torch.dtype) -> None:
    source = inputs.generator(N + K)
    packed = inputs.packed_weight(source, N, K, QuantSpec(4, 128, True), device=device).with_scales(dtype)
    x = inputs.normal(source, (200, K), dtype, device)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    whole = wna16_linear(x, prepared, batch_invariant=True)
    for first, rows in ((0, 1), (199, 1), (5, 33), (60, 128)):
        part = slice(first, first + rows)
        assert torch.equal(wna16_linear(x[part], prepared, batch_invariant=True), whole[part])
