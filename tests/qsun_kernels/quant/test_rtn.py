"""Rounding to nearest against brute force over scales, zero points and codes."""
# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun_kernels.quant import QuantSpec, quantize_rtn, rtn

BITS = (2, 3, 4, 8)


def smallest_guaranteed_scale(low: float, high: float, spec: QuantSpec) -> float:
    """The least |s| for which some allowed zero point and sign put every w in [low, high] within |s| / 2 of a code."""
    below, above = max(-low, 0.0), max(high, 0.0)
    if spec.symmetric:
        choices = [(below, above, spec.zero_point), (above, below, spec.zero_point)]
    else:
        choices = [(below, above, zero) for zero in range(spec.max_code + 1)]
    return min(max(a / (zero + 0.5), b / (spec.max_code - zero + 0.5)) for a, b, zero in choices)


def random_weight(N: int, K: int, seed: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    if kind == "shifted":
        weight += 2.0
    elif kind == "outliers":
        weight[torch.rand(N, K, generator=generator) < 0.02] *= 30
    elif kind == "sparse":
        weight[torch.rand(N, K, generator=generator) < 0.97] = 0
    elif kind == "positive":
        weight.abs_()
    elif kind == "tiny":
        weight *= 1e-30
    return weight


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from([32, 64, "channel"]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 130),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "shifted", "outliers", "sparse", "positive", "tiny"]),
)
def test_scale_is_the_smallest_that_keeps_every_error_within_half_a_step(
    bits, group_size, symmetric, N, K, seed, kind
):
    spec = QuantSpec(bits, group_size, symmetric)
    weight = random_weight(N, K, seed, kind)
    rounded = rtn.round_to_nearest(weight, spec)
    columns = K if group_size == "channel" else group_size
    for n in range(N):
        for g in range(spec.num_groups(K)):
            part = weight[n, g * columns : (g + 1) * columns].double()
            codes = rounded.codes[n, g * columns : (g + 1) * columns].double()
            scale = float(rounded.scales[n, g])
            zero = spec.zero_point if symmetric else int(rounded.qzeros[n, g])
            assert 0 <= zero <= spec.max_code
            if not part.any():
                assert scale == 1.0 and bool((codes == zero).all())
                continue
            expected = smallest_guaranteed_scale(float(part.min()), float(part.max()), spec)
            assert math.isclose(abs(scale), expected, rel_tol=1e-6)
            error = (part - (codes - zero) * scale).abs()
            # weight / scale is rounded in float32: a few units in the last place of the largest quotient.
            assert float(error.max()) <= abs(scale) * (0.5 + (spec.max_code + 1) * 2**-22)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_nearest_for_the_stored_scale(bits, symmetric, scale_dtype, float_weight):
    """No other code is closer, with the scale as it was stored (not as it was before rounding it)."""
    spec = QuantSpec(bits, 32, symmetric)
    weight = random_weight(6, 70, bits, "outliers")
    packed = quantize_rtn(weight, spec, scale_dtype=scale_dtype).validate()
    assert packed.scales.dtype == scale_dtype
    scale = packed.scales.double()[:, packed.column_groups()]
    zero = (
        torch.full_like(scale, 1 << (bits - 1))
        if symmetric
        else packed.qzeros.double()[:, packed.column_groups()]
    )
    candidates = (torch.arange(1 << bits).view(-1, 1, 1) - zero) * scale
    nearest = (candidates - weight.double()).abs().amin(dim=0)
    error = (float_weight(packed) - weight.double()).abs()
    assert torch.all(error <= nearest + scale.abs() * 1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantize_is_the_packed_weight(symmetric, float_weight):
    spec = QuantSpec(3, 32, symmetric)
    weight = torch.randn(5, 75)
    ratio = torch.rand(5, 3) * 0.5 + 0.5
    packed = quantize_rtn(weight, spec, scale_dtype=torch.bfloat16, range_ratio=ratio)
    fake = rtn.fake_quantize(weight, spec, scale_dtype=torch.bfloat16, range_ratio=ratio)
    assert fake.dtype == torch.float32
    assert torch.equal(fake, float_weight(packed).float())


@pytest.mark.parametrize(("bits", "offsets"), [(2, (1, 0.5)), (3, (1, 0.5, 0)), (4, (1, 0.5, 0))])
def test_beats_the_usual_scales_on_normal_weights(bits, offsets):
    """Squared error against unsigned scales absmax / (2**(bits-1) - offset), groups of 64."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    groups = weight.view(256, -1, 64)
    ours = (rtn.fake_quantize(weight, QuantSpec(bits, 64, True)) - weight).square().mean()
    half = 1 << (bits - 1)
    for offset in offsets:
        scale = groups.abs().amax(dim=-1, keepdim=True) / (half - offset)
        usual = (groups / scale).round().clamp(-half, half - 1) * scale
        assert ours < (usual - groups).square().mean()
    asymmetric = (rtn.fake_quantize(weight, QuantSpec(bits, 64, False)) - weight).square().mean()
    assert asymmetric <= ours * 1.001


def test_range_ratio_narrows_the_range():
    weight = torch.tensor([[8.5, -1.0, 1.0, 0.5] + [0.0] * 28])
    whole = quantize_rtn(weight, QuantSpec(4, 32, True))
    narrow = quantize_rtn(weight, QuantSpec(4, 32, True), range_ratio=torch.tensor([[0.5]]))
    assert whole.scales.item() == -1.0 and narrow.scales.item() == -0.5
    assert narrow.codes()[0, :4].tolist() == [0, 10, 6, 7]


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_handled_in_chunks(monkeypatch, symmetric):
    spec = QuantSpec(4, 32, symmetric)
    weight = torch.randn(23, 70)
    ratio = torch.rand(23, 3) * 0.5 + 0.5
    whole = quantize_rtn(weight, spec, range_ratio=ratio)
    fake = rtn.fake_quantize(weight, spec, range_ratio=ratio)
    monkeypatch.setattr(rtn, "CHUNK_ELEMENTS", 140)
    chunked = quantize_rtn(weight, spec, range_ratio=ratio)
    for a, b in zip(whole.tensors, chunked.tensors, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fake, rtn.fake_quantize(weight, spec, range_ratio=ratio))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scales_default_to_the_dtype_of_the_weight(dtype):
    packed = quantize_rtn(torch.randn(2, 64, dtype=torch.float64).to(dtype), QuantSpec(4, 32, True))
    assert packed.scales.dtype == (torch.float32 if dtype == torch.float64 else dtype)


def test_the_weight_is_not_touched_and_may_be_strided():
    weight = torch.randn(64, 8)
    copy = weight.clone()
    packed = quantize_rtn(weight.t(), QuantSpec(4, 32, False))
    assert torch.equal(weight, copy)
    assert torch.equal(packed.codes(), quantize_rtn(weight.t().contiguous(), QuantSpec(4, 32, False)).codes())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("magnitude", [1e-3, 1e-5, 2e-6, 3e-7, 6e-8, 1e-9])
def test_subnormal_and_vanishing_scales_in_float16(symmetric, magnitude, float_weight):
    """The error stays within half a stored step, or half the smallest step that float16 has; nothing is clipped."""
    weight = magnitude * torch.linspace(-1, 1, 32).repeat(2, 1)
    packed = quantize_rtn(weight, QuantSpec(4, 32, symmetric), scale_dtype=torch.float16).validate()
    error = (float_weight(packed) - weight.double()).abs().max()
    step = packed.scales.double().abs().max()
    assert error <= 0.5 * step * 1.01
    assert step <= max(2**-24, 1.01 * smallest_guaranteed_scale(-magnitude, magnitude, packed.spec) + 2**-24)


def test_numbers_below_any_float32_scale_become_zero(float_weight):
    for symmetric in (True, False):
        packed = quantize_rtn(torch.full((1, 32), 1e-45), QuantSpec(4, 32, symmetric)).validate()
        assert float_weight(packed).abs().max() == 0


def test_largest_float32_weights(float_weight):
    weight = torch.tensor([[3e38, -3e38] + [0.0] * 30])
    for symmetric in (True, False):
        packed = quantize_rtn(weight, QuantSpec(4, 32, symmetric)).validate()
        assert (float_weight(packed) - weight.double()).abs().max() <= 2.1e37


def nan_at(row: int, column: int, value: float) -> torch.Tensor:
    weight = torch.randn(40, 70)
    weight[row, column] = value
    return weight


SPEC = QuantSpec(4, 32, True)
DAMAGED = {
    "NaN": (lambda: quantize_rtn(nan_at(33, 69, math.nan), SPEC), ValueError, r"weight\[33, 69\] is nan, expected finite float32"),
    "inf": (lambda: quantize_rtn(nan_at(0, 0, math.inf), SPEC), ValueError, r"weight\[0, 0\] is inf, expected finite"),
    "-inf": (lambda: quantize_rtn(nan_at(1, 64, -math.inf), SPEC), ValueError, r"weight\[1, 64\] is -inf, expected finite"),
    "beyond float32": (lambda: quantize_rtn(torch.full((1, 32), 1e300, dtype=torch.float64), SPEC), ValueError, r"weight\[0, 0\] is 1e\+300, expected finite float32"),
    "int weight": (lambda: quantize_rtn(torch.ones(2, 32, dtype=torch.int8), SPEC), TypeError, "weight has dtype torch.int8, expected one of"),
    "vector": (lambda: quantize_rtn(torch.ones(32), SPEC), ValueError, r"weight has shape \(32,\), expected \(N, K\)"),
    "empty": (lambda: quantize_rtn(torch.ones(0, 32), SPEC), ValueError, r"weight has shape \(0, 32\), expected \(N, K\)"),
    "scale dtype": (lambda: quantize_rtn(torch.ones(1, 32), SPEC, scale_dtype=torch.float64), TypeError, "scale_dtype is torch.float64, expected one of"),
    "overflow": (lambda: quantize_rtn(torch.full((2, 32), 1e6), SPEC, scale_dtype=torch.float16), ValueError, r"weight\[0\] needs the scale .* in group 0, expected at most 65504"),
    "ratio shape": (lambda: quantize_rtn(torch.ones(2, 32), SPEC, range_ratio=torch.ones(2, 2)), ValueError, r"range_ratio has shape \(2, 2\), expected \(2, 1\)"),
    "ratio zero": (lambda: quantize_rtn(torch.ones(2, 32), SPEC, range_ratio=torch.zeros(2, 1)), ValueError, r"range_ratio spans 0.0 to 0.0, expected values in \(0, 1\]"),
    "ratio NaN": (lambda: quantize_rtn(torch.ones(2, 32), SPEC, range_ratio=torch.full((2, 1), math.nan)), ValueError, "range_ratio spans nan"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights(case):
    build, error, message = DAMAGED[case]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.damaged
def test_damaged_row_is_named_in_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(rtn, "CHUNK_ELEMENTS", 700)
    with pytest.raises(ValueError, match=r"weight\[33, 69\] is nan"):
        quantize_rtn(nan_at(33, 69, math.nan), SPEC)
