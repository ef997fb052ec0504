"""silu_and_mul: against float64, at odd sizes and extremes."""

from __future__ import annotations

import math

import pytest
import torch

from qsun_kernels import silu_and_mul
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", inputs.ODD_WIDTHS)
def test_agrees_with_float64(width: int, dtype: torch.dtype, device: torch.device) -> None:
    source = inputs.generator(width)
    for rows in inputs.ODD_ROWS:
        x = inputs.normal(source, (rows, 2 * width), dtype, device, std=2.0)
        with inputs.poisoned_outputs():
            y = silu_and_mul(x, backend="torch")
        judge.judge_silu_and_mul(y, x).require()


def test_by_hand() -> None:
    gate, up = [0.0, 1.0, -1.0], [5.0, 2.0, 10.0]
    y = silu_and_mul(torch.tensor([gate + up]))
    expected = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    assert y[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, -largest, 30.0, -30.0, 0.25, 1.0, 1.0, 1.0]], dtype=dtype)
    y = silu_and_mul(x)
    assert y[0, 0].item() == largest * 0.25
    assert y[0, 1].item() == 0.0
    assert y[0, 2].item() == 30.0
    assert y.isfinite().all()


def test_one_rounding_only() -> None:
    # With silu(gate) rounded before the product, a good part of the elements would differ.
    source = inputs.generator(5)
    x = inputs.normal(source, (64, 128), torch.float16, std=3.0)
    gate, up = x.double().chunk(2, dim=-1)
    correct = (gate / (1 + torch.exp(-gate)) * up).to(torch.float16)
    differs = (silu_and_mul(x) != correct).float().mean().item()
    assert differs < 1e-3  # float32 arithmetic may tip a tie over, no more


def test_nan_spoils_its_own_element_only() -> None:
    x = torch.ones(3, 8)
    x[1, 2] = math.nan
    y = silu_and_mul(x)
    assert y.isnan().nonzero().tolist() == [[1, 2]]


def test_views_and_leading_dimensions() -> None:
    wide = inputs.normal(inputs.generator(6), (2, 3, 50), torch.float32)
    view = wide[:, :, 10:44]
    y = silu_and_mul(view)
    assert y.shape == (2, 3, 17)
    assert torch.equal(y, silu_and_mul(view.contiguous()))
