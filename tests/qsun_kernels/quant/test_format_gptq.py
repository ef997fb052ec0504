"""GPTQ checkpoints written by hand, as AutoGPTQ and GPTQModel write them."""

# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun_kernels.quant import QuantSpec
from qsun_kernels.quant.formats import from_gptq


def to_int32(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_words(values: list[int], bits: int) -> list[int]:
    """Pack numbers as AutoGPTQ does: 2, 4 and 8 bits by shifting, 3 bits by its rule for 32 numbers in three words."""
    words = []
    if bits == 3:
        for i in range(0, len(values), 32):
            v = values[i : i + 32]
            first = second = third = 0
            for j in range(10):
                first |= v[j] << (3 * j)
            # Number 10: two bits end the first word, one starts the second.
            first |= (v[10] & 3) << 30
            second |= v[10] >> 2
            for j in range(11, 21):
                second |= v[j] << (3 * (j - 11) + 1)
            # Number 21: one bit ends the second word, two start the third.
            second |= (v[21] & 1) << 31
            third |= v[21] >> 1
            for j in range(22, 32):
                third |= v[j] << (3 * (j - 22) + 2)
            words += [first, second, third]
    else:
        per_word = 32 // bits
        for i in range(0, len(values), per_word):
            words.append(sum(value << (bits * j) for j, value in enumerate(values[i : i + per_word])))
    return [to_int32(word) for word in words]


def pack_down(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(K, N) numbers to int32 (K*bits/32, N)."""
    columns = [pack_words(values[:, n].tolist(), bits) for n in range(values.shape[1])]
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def pack_along(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(G, N) numbers to int32 (G, N*bits/32)."""
    return torch.tensor([pack_words(row.tolist(), bits) for row in values], dtype=torch.int32)


def checkpoint(
    bits: int, N: int, K: int, group: int, *, zeros: torch.Tensor | None = None, version: str = "v1", act_order: bool = False, seed: int = 0
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """Tensors of a GPTQ layer and the float64 weight (N, K) they stand for. zeros default to 1 and more."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-K // group)
    codes = torch.randint(0, 1 << bits, (K, N), generator=generator)
    if zeros is None:
        zeros = torch.randint(1, 1 << bits, (groups, N), generator=generator)
    scales = (torch.rand(groups, N, generator=generator) + 0.1).half()
    g_idx = torch.arange(K) // group
    if act_order:
        g_idx = g_idx[torch.randperm(K, generator=generator)]
    weight = (codes.double() - zeros.double()[g_idx]) * scales.double()[g_idx]
    tensors = {
        "qweight": pack_down(codes, bits),
        "qzeros": pack_along(zeros - 1 if version == "v1" else zeros, bits),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return tensors, weight.t().contiguous()


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["v1", "v2"]),
    st.booleans(),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([32, 64]),
    st.integers(0, 2**32 - 1),
)
def test_a_hand_packed_layer_is_read_exactly(bits, version, act_order, n, k, group, seed):
    N, K = 32 * n, 32 * k
    tensors, weight = checkpoint(bits, N, K, group, version=version, act_order=act_order, seed=seed)
    packed = from_gptq(tensors, QuantSpec(bits, group, False), zeros=version, act_order=act_order)
    assert (packed.N, packed.K) == (N, K)
    codes, g = packed.codes().double(), packed.column_groups()
    assert torch.equal((codes - packed.qzeros.double()[:, g]) * packed.scales.double()[:, g], weight)
    assert torch.equal(g, tensors["g_idx"].long())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_symmetric_layers_keep_no_zero_points(bits, version, float_weight):
    zeros = torch.full((2, 32), 1 << (bits - 1))
    tensors, weight = checkpoint(bits, 32, 64, 32, zeros=zeros, version=version)
    packed = from_gptq(tensors, QuantSpec(bits, 32, True), zeros=version)
    assert packed.qzeros is None and packed.g_idx is None
    assert torch.equal(float_weight(packed), weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_version_1_with_zero_points_of_zero(bits):
    """GPTQModel subtracts one from whole words: a zero point of 0 borrows from its neighbour, and comes back."""
    zeros = torch.randint(0, 1 << bits, (2, 64), generator=torch.Generator().manual_seed(bits))
    zeros[:, ::3] = 0
    tensors, _ = checkpoint(bits, 64, 64, 32, zeros=zeros, version="v2")
    ones = sum(1 << shift for shift in range(0, 32, bits))
    borrowed = [[to_int32((word & 0xFFFFFFFF) - ones) for word in row] for row in tensors["qzeros"].tolist()]
    tensors["qzeros"] = torch.tensor(borrowed, dtype=torch.int32)
    packed = from_gptq(tensors, QuantSpec(bits, 32, False), zeros="v1")
    assert torch.equal(packed.qzeros.long(), zeros.t())


def test_version_1_with_zero_points_of_zero_in_3_bits():
    zeros = torch.randint(0, 8, (2, 32), generator=torch.Generator().manual_seed(3))
    tensors, _ = checkpoint(3, 32, 64, 32, zeros=zeros, version="v2")
    tensors["qzeros"] = pack_along((zeros - 1) & 7, 3)
    assert torch.equal(from_gptq(tensors, QuantSpec(3, 32, False), zeros="v1").qzeros.long(), zeros.t())


def test_channel_groups(float_weight):
    tensors, weight = checkpoint(4, 32, 96, 96)
    packed = from_gptq(tensors, QuantSpec(4, "channel", False), act_order=True)
    assert packed.g_idx is None
    assert torch.equal(float_weight(packed), weight)


def test_without_g_idx_columns_are_grouped_in_order(float_weight):
    tensors, weight = checkpoint(3, 32, 64, 32)
    del tensors["g_idx"]
    assert torch.equal(float_weight(from_gptq(tensors, QuantSpec(3, 32, False))), weight)


def test_k_that_fills_no_whole_group(float_weight):
    tensors, weight = checkpoint(4, 32, 72, 32)
    assert torch.equal(float_weight(from_gptq(tensors, QuantSpec(4, 32, False))), weight)


def test_negative_scales_are_read(float_weight):
    """AutoRound writes them for symmetric weights."""
    zeros = torch.full((2, 32), 8)
    tensors, weight = checkpoint(4, 32, 64, 32, zeros=zeros)
    tensors["scales"].neg_()
    assert torch.equal(float_weight(from_gptq(tensors, QuantSpec(4, 32, True))), -weight)


SPEC = QuantSpec(4, 32, False)


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint(4, 32, 64, 32, act_order=True)
    tensors.update({name: value for name, value in changes.items() if value is not None})
    return {name: value for name, value in tensors.items() if changes.get(name, value) is not None}


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    tensors = broken()
    tensors[name][index] = value
    return tensors


DAMAGED = {
    "qweight missing": (broken(qweight=None), SPEC, {}, ValueError, "expected qweight too"),
    "qzeros missing": (broken(qzeros=None), SPEC, {}, ValueError, "expected qzeros too"),
    "scales missing": (broken(scales=None), SPEC, {}, ValueError, "expected scales too"),
    "g_idx missing": (broken(g_idx=None), SPEC, {"act_order": True}, ValueError, "m has no g_idx, expected one: the configuration says desc_act"),
    "g_idx negative": (changed("g_idx", (5,), -1), SPEC, {}, ValueError, r"m: g_idx\[5\] is -1, expected a group in 0..1"),
    "g_idx too large": (changed("g_idx", (9,), 2), SPEC, {}, ValueError, r"m: g_idx\[9\] is 2, expected a group in 0..1"),
    "g_idx int64": (broken(g_idx=torch.zeros(64, dtype=torch.int64)), SPEC, {}, TypeError, "m.g_idx has dtype torch.int64, expected torch.int32"),
    "g_idx short": (broken(g_idx=torch.zeros(40, dtype=torch.int32)), SPEC, {}, ValueError, r"m.qweight has shape \(8, 32\), expected \(5, 32\) for K = 40"),
    "qweight truncated": (broken(qweight=torch.zeros(7, 32, dtype=torch.int32)), SPEC, {}, ValueError, r"m.qweight has shape \(7, 32\), expected \(8, 32\) for K = 64"),
    "qweight float": (broken(qweight=torch.zeros(8, 32)), SPEC, {}, TypeError, "m.qweight has dtype torch.float32, expected torch.int32"),
    "config says 3 bits": (broken(), QuantSpec(3, 32, False), {}, ValueError, r"m.qweight has shape \(8, 32\), expected \(6, 32\) for K = 64 and 3 bits"),
    "config says 8 bits, no g_idx": (broken(g_idx=None), QuantSpec(8, 32, False), {}, ValueError, r"m.scales has shape \(2, 32\), expected \(1, 32\) for K = 32"),
    "config says group 64": (broken(), QuantSpec(4, 64, False), {}, ValueError, r"m.scales has shape \(2, 32\), expected \(1, 32\)"),
    "config says sym": (broken(), QuantSpec(4, 32, True), {}, ValueError, r"m.qzeros holds the zero point \d+ for row \d+, group \d+, expected 8: the configuration says sym"),
    "sym of the other version": (checkpoint(4, 32, 64, 32, zeros=torch.full((2, 32), 8), version="v2")[0], QuantSpec(4, 32, True), {"zeros": "v1"}, ValueError, "holds the zero point 9 .* expected 8: .*is the format v1"),
    "version 3": (broken(), SPEC, {"zeros": "v3"}, ValueError, "zeros is 'v3', expected 'v1' or 'v2'"),
    "qzeros truncated": (broken(qzeros=torch.zeros(2, 3, dtype=torch.int32)), SPEC, {}, ValueError, r"m.qzeros has shape \(2, 3\), expected \(2, 4\)"),
    "scales of another N": (broken(scales=torch.ones(2, 31)), SPEC, {}, ValueError, r"m.scales has shape \(2, 31\), expected \(2, 32\)"),
    "scale NaN": (changed("scales", (1, 7), float("nan")), SPEC, {}, ValueError, r"m: scales\[7, 1\] is nan, expected a finite number"),
    "scale inf": (changed("scales", (0, 7), float("-inf")), SPEC, {}, ValueError, r"m: scales\[7, 0\] is -inf, expected"),
    "scale zero": (changed("scales", (0, 0), 0.0), SPEC, {}, ValueError, r"m: scales\[0, 0\] is 0.0, expected"),
    "an unknown tensor": (broken(weight=torch.zeros(2)), SPEC, {}, ValueError, "m.weight is no tensor of GPTQ checkpoints"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_gptq_layers(case):
    tensors, spec, options, error, message = DAMAGED[case]
    with pytest.raises(error, match=message):
        from_gptq(tensors, spec, "m", **options)
