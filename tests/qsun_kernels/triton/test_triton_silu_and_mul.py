"""silu_and_mul through Triton against float64, at the precision of torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import silu_and_mul
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_silu_and_mul

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("size", [1, 2, 33, 127, 576, 1025])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(device: torch.device, dtype: torch.dtype, size: int) -> None:
    x = inputs.normal(inputs.generator(size), (3, 2 * size), dtype, device, std=3.0)
    with inputs.poisoned_outputs():
        got = silu_and_mul(x, backend="triton")
    judge_silu_and_mul(got, x).require()
    assert torch.equal(got, silu_and_mul(x, backend="triton"))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,), (2, 3, 64)], ids=str)
def test_leading_dimensions(device: torch.device, shape: tuple[int, ...]) -> None:
    x = inputs.normal(inputs.generator(1), shape, torch.float32, device)
    got = silu_and_mul(x, backend="triton")
    assert got.shape == (*shape[:-1], 32)
    judge_silu_and_mul(got, x).require()


def test_rows_may_be_apart(device: torch.device) -> None:
    wide = torch.full((4, 100), torch.nan, dtype=torch.float16, device=device)
    wide[:, :66] = inputs.normal(inputs.generator(2), (4, 66), torch.float16, device)
    judge_silu_and_mul(silu_and_mul(wide[:, :66], backend="triton"), wide[:, :66]).require()


GATES = (-1e4, -90.0, -85.0, -60.0, -20.0, -3.0, -1e-30, 0.0, 3.0, 20.0, 85.0, 1e4, torch.inf, torch.nan)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, of exp(90)
def test_every_element_is_as_good_as_torch(device: torch.device, dtype: torch.dtype, gate: float) -> None:
    x = torch.tensor([[gate, 2.0]], device=device).to(dtype)
    judge_silu_and_mul(silu_and_mul(x, backend="triton"), x).require()


@pytest.mark.gpu
def test_model_size(device: torch.device) -> None:
    x = inputs.normal(inputs.generator(3), (300, 2 * 14336), torch.bfloat16, device)
    judge_silu_and_mul(silu_and_mul(x, backend="triton"), x).require()
