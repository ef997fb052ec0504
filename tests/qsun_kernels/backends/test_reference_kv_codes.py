"""Codes and scales of the torch backend, and its Hadamard transform, against definitions written out."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels.backends.reference.hadamard import hadamard
from qsun_kernels.backends.reference.kv_codes import dequantize_kv, quantize_kv
from qsun_kernels.testing import inputs
from qsun_kernels.testing.kv_codes import KV_KINDS, KvKind, dequantised, kv_dtype_of, quantised_rows
from qsun_kernels.testing.kv_writes import hadamard_matrix


def vectors() -> torch.Tensor:
    """Rows of all magnitudes, with ties, an outlier, zeros, numbers near the ends of float32."""
    source = inputs.generator(0)
    rows = inputs.normal(source, (40, 64), torch.float32)
    rows[1] *= 1e30
    rows[2] *= 1e-30
    rows[3, 7] = 1e4
    rows[4] = torch.arange(64) - 31.5
    rows[5] = (torch.arange(64) % 15 - 7.0) * 0.5
    rows[6] = 0.0
    rows[7] = -0.0
    rows[8] *= 1e-40
    rows[9] = torch.finfo(torch.float32).max
    return rows


@pytest.mark.parametrize("kind", KV_KINDS)
def test_codes_and_scales_are_the_definition(kind: KvKind) -> None:
    rows = vectors()
    rows[10, 3], rows[11, 0], rows[12, 63] = torch.nan, torch.inf, -torch.inf
    given = torch.tensor([0.004]) if kind == "fp8-tensor" else None
    codes, scales = quantize_kv(rows, kv_dtype_of(kind), given)
    expected_codes, expected_scales = quantised_rows(rows, kind, given)
    assert codes.dtype == kv_dtype_of(kind)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scales.view(torch.int32).isnan(), expected_scales.view(torch.int32).isnan())
    assert torch.equal(scales.nan_to_num(-1.0), expected_scales.nan_to_num(-1.0))
    values = dequantize_kv(codes, scales)
    assert torch.equal(values.isnan(), dequantised(codes, scales).isnan())
    assert torch.allclose(values.nan_to_num(), dequantised(codes, scales).float().nan_to_num())


@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 254), ("int4", 1 / 14), ("fp8", 1 / 16)])
def test_values_come_back_within_half_a_step(kind: KvKind, step: float) -> None:
    """Half a step of the largest magnitude; of float8, whose steps shrink with the number, of itself."""
    rows = vectors()[:6]
    values = dequantize_kv(*quantize_kv(rows, kv_dtype_of(kind)))
    largest = rows.abs().amax(-1, keepdim=True)
    reach = rows.abs().maximum(largest * 2.0**-14) if kind == "fp8" else largest
    assert ((values - rows).abs() <= reach * (step * 1.001)).all()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_what_is_not_finite_reads_as_nan(kind: KvKind) -> None:
    rows = vectors()[:3]
    rows[0, 5], rows[1, 5] = torch.nan, torch.inf
    given = torch.tensor([0.02]) if kind == "fp8-tensor" else None
    values = dequantize_kv(*quantize_kv(rows, kv_dtype_of(kind), given))
    if kind == "fp8-tensor":
        assert values[:2, 5].isnan().all() and int(values.isnan().sum()) == 2
        codes, _ = quantize_kv(rows, kv_dtype_of(kind), given)
        assert (codes.view(torch.uint8)[:2, 5] == 0x7F).all()
    else:
        assert values[:2].isnan().all() and not values[2].isnan().any()


def test_float8_saturates_and_agrees_with_torch() -> None:
    x = torch.cat((torch.linspace(-460, 460, 4001), 2.0 ** torch.arange(-14.0, 9.0, 0.03125)))
    codes, _ = quantize_kv(x, torch.float8_e4m3fn, torch.ones(1))
    assert torch.equal(codes.view(torch.uint8), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert codes.float().abs().max() == 448.0


def test_a_byte_holds_neighbours_in_order() -> None:
    """So that a little-endian word holds eight neighbours."""
    codes, scales = quantize_kv(torch.tensor([[1.0, -7.0, 0.0, 7.0, -3.0, 2.0, 5.0, -1.0]]), torch.uint8)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [[9 | 1 << 4, 8 | 15 << 4, 5 | 10 << 4, 13 | 7 << 4]]
    word = codes.view(torch.int32).item() & 0xFFFFFFFF
    assert [(word >> 4 * i & 15) - 8 for i in range(8)] == [1, -7, 0, 7, -3, 2, 5, -1]


@pytest.mark.parametrize("size", [1, 2, 64, 128, 256])
def test_hadamard_is_the_matrix_in_natural_order_and_its_own_inverse(size: int) -> None:
    x = inputs.normal(inputs.generator(size), (5, 3, size), torch.float32)
    expected = x.double() @ hadamard_matrix(size)
    assert torch.allclose(hadamard(x).double(), expected, rtol=0, atol=2e-6)
    assert torch.allclose(hadamard(hadamard(x)), x, rtol=0, atol=2e-6)
    i, j = torch.arange(size)[:, None], torch.arange(size)
    ones = sum((i & j) >> bit & 1 for bit in range(9))
    assert torch.equal(hadamard_matrix(size).sign(), torch.where(ones % 2 == 0, 1.0, -1.0).double())
