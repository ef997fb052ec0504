"""Linear layers, and how several projections become one."""

from __future__ import annotations

import pytest
import torch

from qsun.layers.linear import DenseLinear, QuantLinear, SplitLinear, are_one_matrix
from qsun.layers.norm import RMSNorm
from qsun.models.build import Placement, build_linear
from qsun.models.weights import Projection
from qsun_kernels import PackedWeight, QuantSpec, dequantize, prepare_weight
from qsun_kernels.quant import pack_codes, quantize_rtn

PLACEMENT = Placement(torch.float32, torch.device("cpu"))
SPEC = QuantSpec(4, 32, True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(N: int, seed: int = 0, spec: QuantSpec = SPEC) -> PackedWeight:
    return quantize_rtn(random(N, 64, seed=seed), spec)


def with_order(weight: PackedWeight, seed: int) -> PackedWeight:
    """The weight with its columns' groups shuffled."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed)) // 32
    return PackedWeight(weight.spec, weight.N, 64, weight.qweight, weight.scales, weight.qzeros, order.int())


@pytest.mark.parametrize("bias", [None, random(24, seed=3)], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["dense", "quantised", "split"])
def test_a_layer_is_its_formula(kind, bias):
    weight = packed(24)
    exact = dequantize(weight, torch.float32)
    if kind == "dense":
        layer = DenseLinear(exact, bias)
    elif kind == "quantised":
        layer = QuantLinear(prepare_weight(weight, dtype=torch.float32), bias)
    else:
        parts = (None, None) if bias is None else (bias[:8], bias[8:])
        layer = SplitLinear([DenseLinear(exact[:8], parts[0]), DenseLinear(exact[8:], parts[1])])
    assert (layer.N, layer.K) == (24, 64)
    x, residual = random(2, 5, 64, seed=1), random(2, 5, 24, seed=2)
    expected = x.double() @ exact.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    norm = RMSNorm(random(24, seed=4), 1e-5)
    normed, stream = layer.end_block(x, residual, norm)
    torch.testing.assert_close(stream.double(), expected + residual, rtol=1e-5, atol=1e-5)
    assert torch.equal(normed, norm(stream))


def test_bytes_are_those_that_are_kept():
    bias = random(24)
    assert DenseLinear(random(24, 64), bias).nbytes == 24 * 64 * 4 + 24 * 4
    prepared = prepare_weight(packed(24), dtype=torch.float32)
    assert QuantLinear(prepared).nbytes == prepared.nbytes
    assert (
        SplitLinear([DenseLinear(random(24, 64)), QuantLinear(prepared)]).nbytes
        == 24 * 64 * 4 + prepared.nbytes
    )


def test_dense_parts_become_one_matrix():
    parts = [Projection(random(8, 64, seed=i), random(8, seed=i + 9)) for i in range(3)]
    layer = build_linear(parts, PLACEMENT)
    assert isinstance(layer, DenseLinear)
    assert torch.equal(layer.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(layer.bias, torch.cat([part.bias for part in parts]))


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(3, 64, False), QuantSpec(2, "channel", False)], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_packed_parts_become_one_matrix_bit_for_bit(spec, ordered):
    parts = [packed(N, seed=N, spec=spec) for N in (8, 16, 8)]
    if ordered and spec.group_size == 32:
        parts = [with_order(part, seed=1) for part in parts]
    layer = build_linear([Projection(part) for part in parts], PLACEMENT)
    assert isinstance(layer, QuantLinear) and layer.N == 32
    one_hot = torch.eye(64)
    expected = torch.cat([dequantize(part, torch.float32) for part in parts])
    assert torch.equal(layer(one_hot), expected.T)


def other_parts() -> dict[str, list[Projection]]:
    return {
        "other bits": [Projection(packed(8)), Projection(packed(8, spec=QuantSpec(8, 32, True)))],
        "other group": [Projection(packed(8)), Projection(packed(8, spec=QuantSpec(4, 64, True)))],
        "other symmetry": [Projection(packed(8)), Projection(packed(8, spec=QuantSpec(4, 32, False)))],
        "other order": [Projection(with_order(packed(8), 1)), Projection(with_order(packed(8), 2))],
        "one ordered": [Projection(packed(8)), Projection(with_order(packed(8), 2))],
        "other scales": [Projection(packed(8)), Projection(packed(8).with_scales(torch.float16))],
        "dense beside packed": [Projection(random(8, 64)), Projection(packed(8))],
        "one bias": [Projection(packed(8), random(8)), Projection(packed(8))],
    }


@pytest.mark.parametrize("case", other_parts())
def test_parts_that_are_no_one_matrix_stay_apart(case):
    parts = other_parts()[case]
    layer = build_linear(parts, PLACEMENT)
    assert isinstance(layer, SplitLinear)
    x = random(3, 64, seed=5)
    for part, columns in zip(parts, layer(x).split(8, dim=-1), strict=True):
        weight = (
            part.weight if isinstance(part.weight, torch.Tensor) else dequantize(part.weight, torch.float32)
        )
        expected = x @ weight.T if part.bias is None else x @ weight.T + part.bias
        torch.testing.assert_close(columns, expected, rtol=1e-5, atol=1e-5)


def test_a_trivial_order_is_no_order():
    weight = packed(8)
    trivial = PackedWeight(SPEC, 8, 64, weight.qweight, weight.scales, None, torch.arange(64).int() // 32)
    assert are_one_matrix([weight, trivial]) and are_one_matrix([trivial, weight])


@pytest.mark.damaged
def test_bad_parts_are_named():
    with pytest.raises(ValueError, match=r"weight has shape \(8,\), expected \(N, K\)"):
        DenseLinear(random(8))
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(7,\), expected torch.float32 \(8,\)"):
        DenseLinear(random(8, 64), random(7))
    with pytest.raises(ValueError, match=r"bias is torch.float16 \(8,\), expected torch.float32 \(8,\)"):
        QuantLinear(prepare_weight(packed(8), dtype=torch.float32), random(8).half())
    with pytest.raises(ValueError, match=r"parts have K of \[64, 32\], expected one K for all"):
        SplitLinear([DenseLinear(random(8, 64)), DenseLinear(random(8, 32))])
    assert pack_codes(torch.zeros(1, 64, dtype=torch.uint8), 4).shape == (1, 8)
