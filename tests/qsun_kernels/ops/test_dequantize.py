"""dequantize: bit for bit the product that PackedWeight means."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels import PackedWeight, QuantSpec, dequantize
from qsun_kernels.backends.reference import dequantize as reference
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 128), (4, 64), (8, "channel")])
def test_is_the_product_bit_for_bit(
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    spec = QuantSpec(bits, group_size, symmetric)  # type: ignore[arg-type]
    for N, K in [(1, 1), (5, 31), (16, 64), (7, 300)]:
        for act_order in (False, True):
            source = inputs.generator(N * 1000 + K)
            packed = inputs.packed_weight(
                source, N, K, spec, scale_dtype=scale_dtype, act_order=act_order, device=device
            )
            with inputs.poisoned_outputs():
                weight = dequantize(packed, dtype, backend="torch")
            judge.judge_dequantize(weight, packed, dtype).require()


def test_by_hand() -> None:
    codes = torch.tensor([[0, 15, 8, 1]], dtype=torch.uint8)
    spec = QuantSpec(4, "channel", False)
    packed = PackedWeight.from_codes(
        codes, torch.tensor([[0.5]]), spec, torch.tensor([[3]], dtype=torch.uint8)
    )
    assert dequantize(packed, torch.float32).tolist() == [[-1.5, 6.0, 2.5, -1.0]]
    symmetric = PackedWeight.from_codes(codes, torch.tensor([[0.5]]), QuantSpec(4, "channel", True))
    assert dequantize(symmetric, torch.float32).tolist() == [[-4.0, 3.5, 0.0, -3.5]]


def test_groups_by_hand() -> None:
    """Columns 0..31 take scale 1, the short rest scale 10; by g_idx, the odd ones take 10."""
    codes = torch.full((1, 40), 9, dtype=torch.uint8)
    scales, spec = torch.tensor([[1.0, 10.0]]), QuantSpec(4, 32, True)
    in_order = PackedWeight.from_codes(codes, scales, spec)
    assert dequantize(in_order, torch.float32).tolist() == [[1.0] * 32 + [10.0] * 8]
    g_idx = torch.arange(40, dtype=torch.int32) % 2
    act_order = PackedWeight.from_codes(codes, scales, spec, None, g_idx)
    assert dequantize(act_order, torch.float32).tolist() == [[1.0, 10.0] * 20]


def test_rows_are_done_in_chunks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = inputs.packed_weight(inputs.generator(1), 23, 50, QuantSpec(3, 32, False))
    whole = dequantize(packed, torch.float32)
    monkeypatch.setattr(reference, "_CHUNK", 120)
    assert torch.equal(dequantize(packed, torch.float32), whole)
