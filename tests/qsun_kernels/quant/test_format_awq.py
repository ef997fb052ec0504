"""AWQ "gemm" checkpoints written by hand, word by word."""

# One damaged case a line reads best, however long.
# ruff: noqa: E501

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsun_kernels.quant import QuantSpec
from qsun_kernels.quant.formats import from_awq

SPEC = QuantSpec(4, 32, False)


def to_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_awq(values: list[list[int]]) -> torch.Tensor:
    """(R, N) numbers below 16 to int32 (R, N/8): nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i] of eight."""
    packed = []
    for row in values:
        words = []
        for j in range(len(row) // 8):
            word = 0
            for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                word |= row[8 * j + column] << (4 * nibble)
            words.append(to_int32(word))
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def checkpoint(N: int, K: int, group: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of an AWQ layer and the float64 weight (N, K) they stand for."""
    generator = torch.Generator().manual_seed(seed)
    groups = K // group
    codes = torch.randint(0, 16, (K, N), generator=generator)
    zeros = torch.randint(0, 16, (groups, N), generator=generator)
    scales = (torch.rand(groups, N, generator=generator) + 0.1).half()
    weight = torch.empty(N, K, dtype=torch.float64)
    for k in range(K):
        for n in range(N):
            g = k // group
            weight[n, k] = (int(codes[k, n]) - int(zeros[g, n])) * float(scales[g, n])
    tensors = {"qweight": pack_awq(codes.tolist()), "qzeros": pack_awq(zeros.tolist()), "scales": scales}
    return tensors, weight


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(0, 2**32 - 1))
def test_a_hand_packed_layer_is_read_exactly(words, groups, group, seed):
    tensors, weight = checkpoint(8 * words, group * groups, group, seed)
    packed = from_awq(tensors, QuantSpec(4, group, False), "model.layers.0.mlp.up_proj")
    assert list(packed.codes().shape) == [8 * words, group * groups]
    assert packed.scales.dtype == torch.float16 and packed.g_idx is None
    codes = packed.codes().double()
    g = packed.column_groups()
    assert torch.equal((codes - packed.qzeros.double()[:, g]) * packed.scales.double()[:, g], weight)


def test_it_means_the_same_as_the_bit_stream(float_weight):
    tensors, weight = checkpoint(16, 64, 32)
    assert torch.equal(float_weight(from_awq(tensors, SPEC)), weight)


def test_channel_groups_and_a_bias_beside(float_weight):
    tensors, weight = checkpoint(8, 40, 40)
    tensors["bias"] = torch.zeros(8)
    assert torch.equal(float_weight(from_awq(tensors, QuantSpec(4, "channel", False))), weight)


def test_each_output_row_alone():
    """One-hot: every nibble position of the order, and no other row, is hit."""
    for n in range(16):
        codes = torch.zeros(32, 16, dtype=torch.int64)
        codes[:, n] = 15
        tensors = {
            "qweight": pack_awq(codes.tolist()),
            "qzeros": torch.zeros(1, 2, dtype=torch.int32),
            "scales": torch.ones(1, 16),
        }
        expected = torch.zeros(16, 32, dtype=torch.uint8)
        expected[n] = 15
        assert torch.equal(from_awq(tensors, SPEC).codes(), expected)


def broken(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint(16, 64, 32)
    tensors.update({name: value for name, value in changes.items() if value is not None})
    return {name: value for name, value in tensors.items() if changes.get(name, value) is not None}


def bad_scale(value: float) -> dict[str, torch.Tensor]:
    tensors = broken()
    tensors["scales"][1, 3] = value
    return tensors


DAMAGED = {
    "qweight missing": (broken(qweight=None), SPEC, ValueError, "m has the tensors qzeros, scales, expected qweight too"),
    "qzeros missing": (broken(qzeros=None), SPEC, ValueError, "m has the tensors qweight, scales, expected qzeros too"),
    "scales missing": (broken(scales=None), SPEC, ValueError, "expected scales too"),
    "qweight int64": (broken(qweight=torch.zeros(64, 2, dtype=torch.int64)), SPEC, TypeError, "m.qweight has dtype torch.int64, expected torch.int32"),
    "qweight flat": (broken(qweight=torch.zeros(128, dtype=torch.int32)), SPEC, ValueError, r"m.qweight has shape \(128,\), expected \(any, any\) = \(K, N/8\)"),
    "qweight empty": (broken(qweight=torch.zeros(64, 0, dtype=torch.int32)), SPEC, ValueError, r"m.qweight has shape \(64, 0\), expected"),
    "qweight truncated": (broken(qweight=torch.zeros(63, 1, dtype=torch.int32)), SPEC, ValueError, r"m.qzeros has shape \(2, 2\), expected \(2, 1\)"),
    "config says another group": (broken(), QuantSpec(4, 64, False), ValueError, r"m.qzeros has shape \(2, 2\), expected \(1, 2\)"),
    "config says symmetric": (broken(), QuantSpec(4, 32, True), ValueError, "spec is W4 g32 symmetric, expected 4 bits, asymmetric"),
    "config says 8 bits": (broken(), QuantSpec(8, 32, False), ValueError, "spec is W8 g32 asymmetric, expected 4 bits"),
    "scales of another N": (broken(scales=torch.ones(2, 15)), SPEC, ValueError, r"m.scales has shape \(2, 15\), expected \(2, 16\)"),
    "scales int": (broken(scales=torch.ones(2, 16, dtype=torch.int32)), SPEC, TypeError, "m.scales has dtype torch.int32, expected torch.float16 or"),
    "scale NaN": (bad_scale(float("nan")), SPEC, ValueError, r"m: scales\[3, 1\] is nan, expected a finite number"),
    "scale inf": (bad_scale(float("inf")), SPEC, ValueError, r"m: scales\[3, 1\] is inf, expected a finite number"),
    "scale zero": (bad_scale(0.0), SPEC, ValueError, r"m: scales\[3, 1\] is 0.0, expected a finite number other than 0"),
    "a GPTQ layer": (broken(g_idx=torch.zeros(64, dtype=torch.int32)), SPEC, ValueError, "m.g_idx is no tensor of AWQ checkpoints, expected qweight, qzeros, scales"),
    "no tensor": (broken() | {"scales": [1.0]}, SPEC, TypeError, "m.scales is list, expected a torch.Tensor"),
    "nothing": ({}, SPEC, ValueError, "m has the tensors none, expected qweight too"),
}  # fmt: skip


@pytest.mark.damaged
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_awq_layers(case):
    tensors, spec, error, message = DAMAGED[case]
    with pytest.raises(error, match=message):
        from_awq(tensors, spec, "m")
