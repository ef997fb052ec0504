"""QuantSpec, the bit stream and PackedWeight against Python integers."""
# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import dataclasses
from decimal import Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun_kernels.quant import (
    PackedWeight,
    QuantSpec,
    concatenate_rows,
    pack_codes,
    quantize_rtn,
    unpack_codes,
)

BITS = (2, 3, 4, 8)


def stream_words(row: list[int], bits: int) -> list[int]:
    """The bit stream of one row as one Python integer, cut into words."""
    stream = 0
    for k, code in enumerate(row):
        stream |= code << (k * bits)
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 140), st.integers(0, 2**32 - 1))
def test_pack_is_a_little_endian_bit_stream_and_unpack_its_inverse(bits, N, K, seed):
    codes = torch.randint(
        0, 1 << bits, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    expected = [stream_words(row, bits) for row in codes.tolist()]
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == expected
    unpacked = unpack_codes(packed, bits, K)
    assert unpacked.dtype == torch.uint8 and unpacked.is_contiguous()
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_column_alone(bits):
    """One-hot: the largest code in column k and zeros elsewhere sets exactly its own bits."""
    K = 67
    codes = torch.zeros(K, K, dtype=torch.uint8)
    codes.fill_diagonal_((1 << bits) - 1)
    for k, row in enumerate(pack_codes(codes, bits).tolist()):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        assert stream == ((1 << bits) - 1) << (k * bits)


def test_pack_reads_any_strides():
    codes = torch.arange(64, dtype=torch.uint8).reshape(8, 8) % 16
    assert torch.equal(pack_codes(codes.t(), 4), pack_codes(codes.t().contiguous(), 4))


def test_unpack_reads_any_strides():
    packed = pack_codes(torch.randint(0, 8, (6, 64), dtype=torch.uint8), 3)
    strided = torch.stack((packed, packed), dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(unpack_codes(strided, 3, 64), unpack_codes(packed, 3, 64))


def test_spec_counts():
    assert QuantSpec(4, 64, True).num_groups(576) == 9
    assert QuantSpec(4, 128, True).num_groups(576) == 5
    assert QuantSpec(4, "channel", True).num_groups(576) == 1
    assert QuantSpec(3, 32, True).num_words(32) == 3
    assert QuantSpec(3, 32, True).num_words(33) == 4
    assert [QuantSpec(bits, 32, True).zero_point for bits in BITS] == [2, 4, 8, 128]
    assert [QuantSpec(bits, 32, False).max_code for bits in BITS] == [3, 7, 15, 255]
    assert str(QuantSpec(4, "channel", False)) == "W4 channel asymmetric"
    assert len({QuantSpec(4, 64, True), QuantSpec(4, 64, True)}) == 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("K", [64, 75])
def test_from_codes_means_what_it_says(bits, symmetric, K, float_weight):
    torch.manual_seed(bits)
    spec = QuantSpec(bits, 32, symmetric)
    codes = torch.randint(0, 1 << bits, (3, K), dtype=torch.uint8)
    scales = torch.rand(3, spec.num_groups(K)) + 0.5
    qzeros = None if symmetric else torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8)
    g_idx = torch.randint(0, spec.num_groups(K), (K,), dtype=torch.int32)
    packed = PackedWeight.from_codes(codes, scales, spec, qzeros, g_idx).validate()
    assert torch.equal(packed.codes(), codes)
    assert torch.equal(packed.column_groups(), g_idx.long())
    zeros = torch.full(scales.shape, spec.zero_point) if symmetric else qzeros
    expected = (codes.double() - zeros[:, g_idx.long()]) * scales[:, g_idx.long()].double()
    assert torch.equal(float_weight(packed), expected)
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors)
    assert packed.device == torch.device("cpu") and packed.to("cpu") is packed


def test_implied_groups_include_a_short_last_one():
    packed = quantize_rtn(torch.randn(2, 70), QuantSpec(4, 32, True))
    assert packed.column_groups().tolist() == [0] * 32 + [1] * 32 + [2] * 6


def test_moving_and_rounding_scales():
    packed = quantize_rtn(torch.randn(4, 96), QuantSpec(3, 32, False))
    assert packed.to("meta").qweight.device.type == "meta"
    half = packed.with_scales(torch.float16)
    assert half.scales.dtype == torch.float16 and torch.equal(half.scales, packed.scales.half())
    assert half.qweight is packed.qweight
    assert packed.with_scales(torch.float32) is packed


def test_negative_scales_are_valid():
    packed = quantize_rtn(torch.randn(4, 64), QuantSpec(4, 32, True))
    flipped = dataclasses.replace(packed, scales=-packed.scales)
    assert flipped.validate() is flipped


@pytest.mark.parametrize("symmetric", [True, False])
def test_concatenated_rows(symmetric, float_weight):
    spec = QuantSpec(3, 32, symmetric)
    parts = [quantize_rtn(torch.randn(n, 50), spec) for n in (3, 1, 4)]
    together = concatenate_rows(parts).validate()
    assert (together.N, together.K) == (8, 50)
    assert torch.equal(float_weight(together), torch.cat([float_weight(part) for part in parts]))
    assert concatenate_rows(parts[:1]) is parts[0]


def test_concatenated_rows_keep_a_shared_g_idx(float_weight):
    spec = QuantSpec(4, 32, True)
    g_idx = torch.randperm(64).int() // 32
    parts = [
        dataclasses.replace(quantize_rtn(torch.randn(2, 64), spec), g_idx=g_idx.clone()) for _ in range(2)
    ]
    together = concatenate_rows(parts)
    assert torch.equal(float_weight(together), torch.cat([float_weight(part) for part in parts]))


def good() -> PackedWeight:
    return quantize_rtn(torch.randn(4, 70), QuantSpec(3, 32, False))


def spoiled(**changes: object) -> object:
    return lambda: dataclasses.replace(good(), **changes).validate()


def one_bad_scale(value: float) -> object:
    def build() -> PackedWeight:
        packed = good()
        packed.scales[2, 1] = value
        return packed.validate()

    return build


def tail_bits() -> PackedWeight:
    packed = good()
    packed.qweight[3, -1] |= 1 << 31
    return packed.validate()


DAMAGED = {
    "qweight truncated": (spoiled(qweight=torch.zeros(4, 6, dtype=torch.int32)), ValueError, r"qweight has shape \(4, 6\), expected \(4, 7\)"),
    "qweight int64": (spoiled(qweight=torch.zeros(4, 7, dtype=torch.int64)), TypeError, "qweight has dtype torch.int64, expected torch.int32"),
    "qweight strided": (spoiled(qweight=torch.zeros(7, 4, dtype=torch.int32).t()), ValueError, "qweight has strides"),
    "qweight no tensor": (spoiled(qweight=[1, 2]), TypeError, "qweight is list, expected a torch.Tensor"),
    "scales of another K": (spoiled(scales=torch.ones(4, 2)), ValueError, r"scales has shape \(4, 2\), expected \(4, 3\)"),
    "scales float64": (spoiled(scales=torch.ones(4, 3, dtype=torch.float64)), TypeError, "scales has dtype torch.float64"),
    "qzeros missing": (spoiled(qzeros=None), ValueError, "qzeros is None, expected uint8"),
    "qzeros int32": (spoiled(qzeros=torch.zeros(4, 3, dtype=torch.int32)), TypeError, "qzeros has dtype torch.int32, expected torch.uint8"),
    "qzeros too large": (spoiled(qzeros=torch.full((4, 3), 8, dtype=torch.uint8)), ValueError, r"qzeros\[0, 0\] is 8, expected at most 7"),
    "qzeros with a symmetric spec": (spoiled(spec=QuantSpec(3, 32, True)), ValueError, "qzeros has shape .* expected None"),
    "another device": (spoiled(scales=torch.ones(4, 3, device="meta")), ValueError, "scales is on meta, expected cpu"),
    "g_idx short": (spoiled(g_idx=torch.zeros(69, dtype=torch.int32)), ValueError, r"g_idx has shape \(69,\), expected \(70,\)"),
    "g_idx out of range": (spoiled(g_idx=torch.full((70,), 3, dtype=torch.int32)), ValueError, r"g_idx\[0\] is 3, expected a group in 0..2"),
    "g_idx negative": (spoiled(g_idx=torch.full((70,), -1, dtype=torch.int32)), ValueError, r"g_idx\[0\] is -1, expected"),
    "NaN scale": (one_bad_scale(float("nan")), ValueError, r"scales\[2, 1\] is nan, expected a finite number"),
    "infinite scale": (one_bad_scale(float("inf")), ValueError, r"scales\[2, 1\] is inf, expected a finite number"),
    "zero scale": (one_bad_scale(0.0), ValueError, r"scales\[2, 1\] is 0.0, expected a finite number other than 0"),
    "bits in the tail": (tail_bits, ValueError, r"qweight\[3, 6\] has bits set .* expected zeros"),
    "N zero": (spoiled(N=0), ValueError, "N is 0, expected at least 1"),
    "K no int": (spoiled(K=70.0), TypeError, "K is 70.0, expected an int"),
    "spec no spec": (spoiled(spec=(3, 32, False)), TypeError, "spec is tuple, expected a QuantSpec"),
    "spec of other bits": (spoiled(spec=QuantSpec(4, 32, False)), ValueError, r"qweight has shape \(4, 7\), expected \(4, 9\)"),
    "scale overflow": (lambda: dataclasses.replace(good(), scales=torch.full((4, 3), 1e5)).with_scales(torch.float16), ValueError, "would become inf in torch.float16"),
    "scale underflow": (lambda: dataclasses.replace(good(), scales=torch.full((4, 3), 1e-9)).with_scales(torch.float16), ValueError, "would become 0.0 in torch.float16"),
    "scale dtype": (lambda: good().with_scales(torch.int8), TypeError, "dtype is torch.int8, expected one of"),
    "code too large": (lambda: pack_codes(torch.full((1, 8), 4, dtype=torch.uint8), 2), ValueError, "codes reach 4, expected at most 3"),
    "codes int32": (lambda: pack_codes(torch.zeros(1, 8, dtype=torch.int32), 4), TypeError, "codes has dtype torch.int32, expected torch.uint8"),
    "codes flat": (lambda: pack_codes(torch.zeros(8, dtype=torch.uint8), 4), ValueError, r"codes has shape \(8,\), expected \(N, K\)"),
    "bits 5": (lambda: pack_codes(torch.zeros(1, 8, dtype=torch.uint8), 5), ValueError, r"bits is 5, expected one of \(2, 3, 4, 8\)"),
    "unpack too many": (lambda: unpack_codes(torch.zeros(1, 1, dtype=torch.int32), 4, 9), ValueError, r"qweight has shape \(1, 1\), expected \(N, 2\)"),
    "unpack int64": (lambda: unpack_codes(torch.zeros(1, 1, dtype=torch.int64), 4, 8), TypeError, "qweight has dtype torch.int64"),
    "spec bits 5": (lambda: QuantSpec(5, 64, True), ValueError, "bits is 5, expected one of"),
    "spec bits True": (lambda: QuantSpec(True, 64, True), ValueError, "bits is True, expected one of"),
    "spec bits 4.0": (lambda: QuantSpec(4.0, 64, True), ValueError, "bits is 4.0, expected one of"),
    "spec bits Decimal": (lambda: QuantSpec(Decimal(4), 64, True), ValueError, "bits is Decimal"),
    "spec group 48": (lambda: QuantSpec(4, 48, True), ValueError, "group_size is 48, expected one of"),
    "spec group -1": (lambda: QuantSpec(4, -1, True), ValueError, "group_size is -1, expected one of"),
    "spec symmetric 1": (lambda: QuantSpec(4, 64, 1), TypeError, "symmetric is 1, expected True or False"),
    "spec no common zero": (lambda: QuantSpec(4, 64, False).zero_point, ValueError, "no common zero point"),
    "concatenate nothing": (lambda: concatenate_rows([]), ValueError, "weights is empty"),
    "concatenate other K": (lambda: concatenate_rows([good(), quantize_rtn(torch.randn(2, 71), QuantSpec(3, 32, False))]), ValueError, r"weights\[1\] has K 71, expected 70"),
    "concatenate other spec": (lambda: concatenate_rows([good(), quantize_rtn(torch.randn(2, 70), QuantSpec(3, 64, False))]), ValueError, r"weights\[1\] has spec W3 g64 .* expected W3 g32"),
    "concatenate other g_idx": (lambda: concatenate_rows([good(), dataclasses.replace(good(), g_idx=torch.zeros(70, dtype=torch.int32))]), ValueError, r"weights\[1\] has another g_idx"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_packed_weight(case):
    build, error, message = DAMAGED[case]
    with pytest.raises(error, match=message):
        build()
