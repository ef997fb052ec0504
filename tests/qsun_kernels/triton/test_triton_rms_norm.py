"""rms_norm through Triton against float64, at the precision of torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from qsun_kernels import rms_norm
from qsun_kernels.backends.triton.rms_norm import MAX_BLOCK
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_rms_norm

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (1, 2, 31, 127, 130, 576, MAX_BLOCK, MAX_BLOCK + 5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(device: torch.device, dtype: torch.dtype, width: int) -> None:
    source = inputs.generator(width)
    x = inputs.normal(source, (3, width), dtype, device)
    residual = inputs.normal(source, (3, width), dtype, device, std=3.0)
    weight = inputs.normal(source, (width,), dtype, device)
    with inputs.poisoned_outputs():
        plain = rms_norm(x, weight, eps=1e-6, backend="triton")
        added = rms_norm(x, weight, eps=1e-5, residual=residual, backend="triton")
    judge_rms_norm(plain, x, weight, 1e-6).require()
    judge_rms_norm(added, x, weight, 1e-5, residual).require()
    again = rms_norm(x, weight, eps=1e-5, residual=residual, backend="triton")
    assert torch.equal(added[0], again[0]) and torch.equal(added[1], again[1])


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (1, 64), (2, 3, 64), (64,)], ids=str)
def test_leading_dimensions(device: torch.device, shape: tuple[int, ...]) -> None:
    source = inputs.generator(1)
    x = inputs.normal(source, shape, torch.float32, device)
    weight = inputs.normal(source, (64,), torch.float32, device)
    y, r = rms_norm(x, weight, eps=1e-6, residual=x, backend="triton")
    assert y.shape == r.shape == shape
    if x.numel():
        judge_rms_norm((y, r), x, weight, 1e-6, x).require()


def test_rows_may_be_apart(device: torch.device) -> None:
    source = inputs.generator(2)
    wide = torch.full((5, 100), torch.nan, dtype=torch.bfloat16, device=device)
    wide[:, :67] = inputs.normal(source, (5, 67), torch.bfloat16, device)
    x, residual = wide[:, :67], wide.flip(0)[:, :67]
    weight = inputs.normal(source, (67,), torch.bfloat16, device)
    got = rms_norm(x, weight, eps=1e-6, residual=residual, backend="triton")
    assert got[0].is_contiguous() and got[1].is_contiguous()
    judge_rms_norm(got, x, weight, 1e-6, residual).require()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1e4, 1e15], ids=str)
def test_extreme_magnitudes(device: torch.device, magnitude: float) -> None:
    x = inputs.normal(inputs.generator(3), (2, 130), torch.bfloat16, device, std=magnitude)
    weight = torch.ones(130, dtype=torch.bfloat16, device=device)
    judge_rms_norm(rms_norm(x, weight, eps=1e-6, backend="triton"), x, weight, 1e-6).require()


def test_nan_stays_in_its_row(device: torch.device) -> None:
    x = inputs.normal(inputs.generator(4), (3, 40), torch.float16, device)
    weight = torch.ones(40, dtype=torch.float16, device=device)
    clean = rms_norm(x, weight, eps=1e-6, backend="triton")
    x[1, 7] = torch.nan
    y = rms_norm(x, weight, eps=1e-6, backend="triton")
    assert y[1].isnan().all() and torch.equal(y[::2], clean[::2])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan_and_infinity(device: torch.device) -> None:
    """The residual sum is a bare rounding: ties, carries into the exponent, overflow, NaN."""
    # In units of 2**-7: 1 + 1/2 and 3 + 1/2 are ties, 127.5 carries into the exponent.
    sums = [(1.0, 2**-8), (1.0 + 2**-7, 2**-8), (2.0 - 2**-7, 2**-8), (-1.0, -(2**-8) - 2**-14)]
    sums += [(3.38e38, 3.38e38), (torch.inf, -torch.inf), (torch.nan, 1.0), (1e-40, 1e-40), (-0.0, -0.0)]
    x, residual = torch.tensor(sums, dtype=torch.bfloat16, device=device).T.contiguous()
    _, r = rms_norm(x[None], torch.ones_like(x), eps=1e-6, residual=residual[None], backend="triton")
    expected = (x.double() + residual.double()).to(torch.bfloat16)
    assert torch.equal(r[0].isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(r[0][kept].view(torch.int16), expected[kept].view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [4096, 5120, 14336])
def test_model_widths(device: torch.device, width: int) -> None:
    source = inputs.generator(width)
    x, residual = (inputs.normal(source, (300, width), torch.bfloat16, device) for _ in range(2))
    weight = inputs.normal(source, (width,), torch.bfloat16, device)
    got = rms_norm(x, weight, eps=1e-6, residual=residual, backend="triton")
    judge_rms_norm(got, x, weight, 1e-6, residual).require()
