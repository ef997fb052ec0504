"""wna16_gate_up_silu and prepare_gate_up: by hand, one-hot, against float64, views, odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from qsun_kernels import (
    BackendUnavailable,
    PackedWeight,
    QuantSpec,
    dequantize,
    prepare_gate_up,
    prepare_weight,
    silu_and_mul,
    use_backend,
    wna16_gate_up_silu,
    wna16_linear,
)
from qsun_kernels.quant import concatenate_rows
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [
    QuantSpec(bits, group_size, symmetric)
    for bits, group_size in [(2, 64), (3, 32), (4, 32), (4, 128), (4, "channel"), (8, 64)]
    for symmetric in (True, False)
]
# 2I and K: what the int4 kernel of torch takes, and what nothing divides.
SIZES = [(2, 1), (64, 64), (66, 130), (48, 192), (64, 1024), (30, 200)]


def weight_of(
    spec: QuantSpec, N: int, K: int, dtype: torch.dtype, *, act_order: bool = False
) -> PackedWeight:
    """A random [gate; up] with its scales in the dtype of the activations."""
    source = inputs.generator(N * 10_000 + K)
    return inputs.packed_weight(source, N, K, spec, act_order=act_order).with_scales(dtype)


def test_by_hand() -> None:
    """gate = 2 and -1, up = 3 and 5: which half is which, and which of the two gets the silu."""
    codes = torch.tensor([[10], [7], [11], [13]], dtype=torch.uint8)  # gate 2, -1; up 3, 5
    packed = PackedWeight.from_codes(codes, torch.ones(4, 1), QuantSpec(4, 32, True))
    y = wna16_gate_up_silu(torch.ones(1, 1), prepare_gate_up(packed, dtype=torch.float32))
    expected = [2 / (1 + math.exp(-2)) * 3, -1 / (1 + math.exp(1)) * 5]
    assert y[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_a_one_hot_input_gives_its_column_bit_for_bit(
    act_order: bool, spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> None:
    """The product is exact then, so what is left is one rounding of silu(gate) * up."""
    for N, K in [(32, 192), (38, 130)]:
        packed = weight_of(spec, N, K, dtype, act_order=act_order).to(device)
        prepared = prepare_gate_up(packed, dtype=dtype, backend="torch")
        columns = dequantize(packed, dtype, backend="torch").T.contiguous()
        gate, up = columns.float().chunk(2, dim=-1)
        got = wna16_gate_up_silu(torch.eye(K, dtype=dtype, device=device), prepared)
        assert torch.equal(got, (functional.silu(gate) * up).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_agrees_with_float64(spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> None:
    source = inputs.generator(1)
    for (N, K), rows in zip(SIZES, (3, 17, 1, 0, 2, 33), strict=True):
        packed = weight_of(spec, N, K, dtype).to(device)
        prepared = prepare_gate_up(packed, dtype=dtype, backend="torch")
        x = inputs.normal(source, (rows, K), dtype, device, std=2.0)
        with inputs.poisoned_outputs():
            y = wna16_gate_up_silu(x, prepared)
        judge.judge_wna16_gate_up_silu(y, x, packed).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_its_two_halves(dtype: torch.dtype) -> None:
    """What rounds where: the product as wna16_linear rounds it, then one rounding more."""
    packed = weight_of(QuantSpec(4, 64, True), 96, 256, dtype)
    x = inputs.normal(inputs.generator(2), (9, 256), dtype, std=2.0)
    y = wna16_gate_up_silu(x, prepare_gate_up(packed, dtype=dtype, backend="torch"))
    product = wna16_linear(x, prepare_weight(packed, dtype=dtype, backend="torch"))
    gate, up = product.double().chunk(2, dim=-1)
    correct = (gate * torch.sigmoid(gate) * up).to(dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(y, correct, rtol=4e-7, atol=0)
    else:
        assert (y != correct).float().mean() < 1e-3  # float32 arithmetic may tip a tie over, no more
    assert torch.equal(y, silu_and_mul(product, backend="torch"))


def test_two_weights_stacked() -> None:
    gate, up = (weight_of(QuantSpec(4, 32, False), N, 96, torch.float32) for N in (24, 24))
    up = PackedWeight(up.spec, 24, 96, up.qweight.roll(1, 0), up.scales, up.qzeros)
    x = inputs.normal(inputs.generator(3), (4, 96), torch.float32)
    halves = [wna16_linear(x, prepare_weight(half, dtype=torch.float32)) for half in (gate, up)]
    y = wna16_gate_up_silu(x, prepare_gate_up(concatenate_rows([gate, up]), dtype=torch.float32))
    torch.testing.assert_close(y, functional.silu(halves[0]) * halves[1])


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 4), (torch.bfloat16, 4), (torch.bfloat16, 8)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_spoils_its_row_only(bad: float, dtype: torch.dtype, bits: int) -> None:
    packed = weight_of(QuantSpec(bits, 32, True), 32, 64, dtype)  # type: ignore[arg-type]
    prepared = prepare_gate_up(packed, dtype=dtype)
    x = inputs.normal(inputs.generator(4), (6, 64), dtype)
    expected = wna16_gate_up_silu(x, prepared)
    x[3, 5] = bad
    y = wna16_gate_up_silu(x, prepared)
    rest = [0, 1, 2, 4, 5]
    assert torch.equal(y[rest], expected[rest])
    assert not y[3].isfinite().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_views_and_out(bits: int) -> None:
    packed = weight_of(QuantSpec(bits, 32, True), 64, 64, torch.bfloat16)  # type: ignore[arg-type]
    prepared = prepare_gate_up(packed, dtype=torch.bfloat16)
    view = inputs.normal(inputs.generator(5), (2, 3, 100), torch.bfloat16)[..., 20:84]
    expected = wna16_gate_up_silu(view.reshape(6, 64).contiguous(), prepared)
    y = wna16_gate_up_silu(view, prepared)
    assert y.shape == (2, 3, 32)
    assert torch.equal(y.view(6, 32), expected)
    out = torch.full((2, 3, 32), torch.nan, dtype=torch.bfloat16)
    assert wna16_gate_up_silu(view, prepared, out=out) is out
    assert torch.equal(out, y)
    assert torch.equal(wna16_gate_up_silu(view[0, 0], prepared), y[0, 0])
    assert wna16_gate_up_silu(view[:0], prepared).shape == (0, 3, 32)


def test_a_weight_stays_with_its_backend_and_its_operator() -> None:
    packed = weight_of(QuantSpec(4, 32, True), 16, 32, torch.float32)
    prepared = prepare_gate_up(packed, dtype=torch.float32, backend="torch")
    assert (prepared.backend, prepared.operator, prepared.N) == ("torch", "wna16_gate_up_silu", 16)
    x = torch.ones(1, 32)
    with use_backend("cuda"):
        y = wna16_gate_up_silu(x, prepared)
    assert torch.equal(y, wna16_gate_up_silu(x, prepared, backend="torch"))
    assert prepare_weight(packed, dtype=torch.float32).operator == "wna16_linear"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_named_backend_that_cannot_says_why() -> None:
    packed = weight_of(QuantSpec(4, 32, True), 16, 32, torch.float32)
    with pytest.raises(BackendUnavailable, match=r"backend 'cuda' cannot run wna16_gate_up_silu: \w"):
        prepare_gate_up(packed, dtype=torch.float32, backend="cuda")
