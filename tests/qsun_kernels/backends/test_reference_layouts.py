"""Which layout the torch backend keeps a weight in, and that it says so."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels import PackedWeight, QuantSpec, explain, prepare_weight
from qsun_kernels.backends.problems import Wna16Problem
from qsun_kernels.backends.reference.wna16_linear import describe
from qsun_kernels.testing import inputs

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("spec", "N", "K", "layout", "reason"),
    [
        (QuantSpec(4, 128, True), 32, 256, "torch.int4pack", ""),
        (
            QuantSpec(4, 128, True),
            32,
            192,
            "torch.int4pack",
            "",
        ),  # a short last group: two groups of 64 a scale
        (QuantSpec(4, "channel", True), 32, 96, "torch.int4pack", ""),
        (QuantSpec(2, 32, False), 16, 64, "torch.int4pack", ""),
        (QuantSpec(3, 64, False), 16, 64, "torch.int4pack", ""),
        (QuantSpec(4, 64, False), 16, 64, "torch.dense", "code - zero must lie in -8..7"),
        (QuantSpec(8, 64, True), 16, 64, "torch.dense", "code - zero must lie in -8..7"),
        (QuantSpec(4, 64, True), 17, 64, "torch.dense", "N=17 is not a multiple of 16"),
        (QuantSpec(4, 64, True), 16, 100, "torch.dense", "divides K=100"),
    ],
    ids=str,
)
def test_describe_names_the_layout_that_prepare_makes(
    spec: QuantSpec, N: int, K: int, layout: str, reason: str
) -> None:
    packed = inputs.packed_weight(inputs.generator(0), N, K, spec)
    assert prepare_weight(packed, dtype=BF16).layout == layout
    said = describe(Wna16Problem(N, K, spec.bits, spec.group_size, spec.symmetric, False, BF16, CPU))
    assert said.startswith(layout)
    assert reason in said
    assert said in explain(
        Wna16Problem(N, K, spec.bits, spec.group_size, spec.symmetric, False, BF16, CPU), backend="torch"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_activations_are_multiplied_dense(dtype: torch.dtype) -> None:
    packed = inputs.packed_weight(inputs.generator(0), 16, 64, QuantSpec(4, 64, True))
    prepared = prepare_weight(packed, dtype=dtype)
    assert prepared.layout == "torch.dense"
    assert prepared.tensors[0].dtype == dtype
    assert str(dtype) in describe(Wna16Problem(16, 64, 4, 64, True, False, dtype, CPU))


def test_int4pack_takes_a_quarter_of_the_memory() -> None:
    packed = inputs.packed_weight(inputs.generator(0), 128, 1024, QuantSpec(4, 128, True))
    assert prepare_weight(packed, dtype=BF16).nbytes == 128 * 1024 // 2 + 128 * 8 * 2 * 2


def test_uneven_act_order_groups_are_multiplied_dense() -> None:
    spec = QuantSpec(4, 32, True)
    even = inputs.packed_weight(inputs.generator(0), 16, 64, spec, act_order=True)
    assert prepare_weight(even, dtype=BF16).layout == "torch.int4pack"
    g_idx = torch.zeros(64, dtype=torch.int32)
    g_idx[:20] = 1
    uneven = PackedWeight(spec, 16, 64, even.qweight, even.scales, None, g_idx)
    assert prepare_weight(uneven, dtype=BF16).layout == "torch.dense"
    said = describe(Wna16Problem(16, 64, 4, 32, True, True, BF16, CPU))
    assert "torch.int4pack" in said
    assert "torch.dense where" in said


@pytest.mark.damaged
def test_a_weight_that_overflows_its_dtype_is_refused() -> None:
    spec = QuantSpec(8, "channel", True)
    codes = torch.full((3, 8), 128, dtype=torch.uint8)
    codes[1, 2] = 255
    packed = PackedWeight.from_codes(codes, torch.full((3, 1), 1000.0), spec)
    with pytest.raises(
        ValueError, match=r"weight\[1, 2\] is inf once dequantised to torch.float16, expected values"
    ):
        prepare_weight(packed, dtype=torch.float16)
