"""rms_norm: against float64, at odd sizes and extremes, alone and with a residual."""

from __future__ import annotations

import math

import pytest
import torch

from qsun_kernels import rms_norm
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", inputs.ODD_WIDTHS)
def test_agrees_with_float64(width: int, dtype: torch.dtype, device: torch.device) -> None:
    source = inputs.generator(width)
    for rows in inputs.ODD_ROWS:
        x = inputs.normal(source, (rows, width), dtype, device)
        weight = inputs.normal(source, (width,), dtype, device)
        residual = inputs.normal(source, (rows, width), dtype, device)
        with inputs.poisoned_outputs():
            alone = rms_norm(x, weight, eps=1e-6, backend="torch")
            added = rms_norm(x, weight, eps=1e-6, residual=residual, backend="torch")
        judge.judge_rms_norm(alone, x, weight, 1e-6).require()
        judge.judge_rms_norm(added, x, weight, 1e-6, residual).require()


def test_by_hand() -> None:
    # mean of squares (9 + 16 + 0 + 0) / 4 = 6.25, plus 0 -> divided by 2.5
    y = rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]), eps=0.0)
    assert y.tolist() == pytest.approx([1.2, 3.2, 0.0, 0.0], abs=1e-6)


def test_eps_is_added_under_the_root() -> None:
    y = rms_norm(torch.zeros(2, 8), torch.ones(8), eps=1e-5)
    assert y.tolist() == torch.zeros(2, 8).tolist()
    y = rms_norm(torch.full((1, 8), 1e-3), torch.ones(8), eps=3e-6)
    assert y[0, 0].item() == pytest.approx(1e-3 / math.sqrt(1e-6 + 3e-6), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_stream_is_the_rounded_sum_and_a_new_tensor(dtype: torch.dtype) -> None:
    source = inputs.generator(1)
    x, residual = (inputs.normal(source, (5, 33), dtype) for _ in range(2))
    before = x.clone(), residual.clone()
    _, r = rms_norm(x, torch.ones(33, dtype=dtype), eps=1e-6, residual=residual)
    assert torch.equal(r, x + residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_magnitudes_that_float16_cannot_square() -> None:
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)
    x[:, ::2] = -60000.0
    weight = torch.ones(64, dtype=torch.float16)
    y = rms_norm(x, weight, eps=1e-6)
    assert torch.equal(y, x.sign())
    tiny = torch.full((2, 64), 6e-8, dtype=torch.float16)
    judge.judge_rms_norm(rms_norm(tiny, weight, eps=1e-6), tiny, weight, 1e-6).require()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_spoils_its_row_only(bad: float) -> None:
    source = inputs.generator(2)
    x, weight = inputs.normal(source, (4, 65), torch.float32), torch.ones(65)
    expected = rms_norm(x, weight, eps=1e-6)
    x[2, 7] = bad
    y = rms_norm(x, weight, eps=1e-6)
    rest = [0, 1, 3]
    assert torch.equal(y[rest], expected[rest])
    assert y[2, 7].isnan()


def test_leading_dimensions_and_views() -> None:
    source = inputs.generator(3)
    wide, weight = (
        inputs.normal(source, (2, 3, 100), torch.float32),
        inputs.normal(source, (40,), torch.float32),
    )
    view = wide[..., 20:60]
    assert not view.is_contiguous()
    y = rms_norm(view, weight, eps=1e-6)
    assert y.shape == (2, 3, 40)
    judge.judge_rms_norm(y, view, weight, 1e-6).require()
    one_row = rms_norm(view[0, 0], weight, eps=1e-6)
    assert torch.equal(one_row, y[0, 0])
