"""The end of a residual block: to whom the norm behind it is left, and that it is the same norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsun.layers import residual
from qsun.layers.linear import DenseLinear, Linear, QuantLinear, SplitLinear
from qsun.layers.mlp import GatedMLP, GateUpSilu
from qsun.layers.norm import RMSNorm
from qsun.layers.residual import end_block
from qsun_kernels import PendingNorm, QuantSpec, prepare_gate_up, prepare_weight
from qsun_kernels.quant import quantize_rtn

SPEC = QuantSpec(4, 32, True)
H, F = 64, 96


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(N: int, K: int, seed: int, bias: torch.Tensor | None = None) -> QuantLinear:
    return QuantLinear(prepare_weight(quantize_rtn(random(N, K, seed=seed), SPEC), dtype=torch.float32), bias)


def gate_up_silu() -> GateUpSilu:
    return GateUpSilu(prepare_gate_up(quantize_rtn(random(2 * F, H, seed=4), SPEC), dtype=torch.float32))


@pytest.fixture
def asked(monkeypatch) -> list[tuple[Any, ...]]:
    """What the library would be asked; it says yes up to three rows."""
    calls: list[tuple[Any, ...]] = []

    def may_pend(rows, weight, reader) -> bool:
        calls.append((rows, weight, reader))
        return rows <= 3

    monkeypatch.setattr(residual, "norm_may_pend", may_pend)
    return calls


@pytest.mark.parametrize("bias", [None, random(H, seed=9)], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_norm_that_is_left_comes_to_the_same(asked, rows, bias) -> None:
    last, norm = quantised(H, F, 1, bias), RMSNorm(random(H, seed=2), 1e-5)
    x, stream = random(rows, F, seed=3), random(rows, H, seed=5)
    for reader in (quantised(40, H, 6, random(40)), gate_up_silu()):
        asked.clear()
        normed, after = end_block(last, x, stream, norm, reader)
        assert asked == [(rows, last.weight, reader.weight)]
        assert isinstance(normed, PendingNorm) is (rows <= 3)
        whole, expected = last.end_block(x, stream, norm)
        assert torch.equal(after, expected)
        torch.testing.assert_close(reader(normed), reader(whole), rtol=1e-5, atol=1e-5)


def test_only_one_low_bit_product_is_left_a_norm(asked) -> None:
    """Others are not even asked about, and refuse what was not meant for them."""
    norm, x, stream = RMSNorm(random(H), 1e-5), random(1, F), random(1, H)
    dense = DenseLinear(random(40, H))
    readers: list[Linear | None] = [dense, SplitLinear([dense, quantised(8, H, 1)]), None]
    last = quantised(H, F, 1)
    for reader in readers:
        normed, _ = end_block(last, x, stream, norm, reader)
        assert isinstance(normed, torch.Tensor)
    low_bit = quantised(40, H, 2)
    for front in (DenseLinear(random(H, F)), SplitLinear([quantised(32, F, 1), quantised(32, F, 2)])):
        normed, _ = end_block(front, x, stream, norm, low_bit)
        assert isinstance(normed, torch.Tensor)
    assert asked == []
    pending, _ = end_block(last, x, stream, norm, low_bit)
    for reader in readers[:2]:
        assert reader is not None
        with pytest.raises(TypeError, match="x is a PendingNorm, expected a Tensor"):
            reader(pending)


def test_a_gated_layer_reads_a_pending_norm_either_way(asked) -> None:
    """Through gate and up with silu behind them, and through a layer of their own with a bias."""
    norm, x, stream = RMSNorm(random(H, seed=2), 1e-5), random(2, F, seed=3), random(2, H, seed=5)
    last = quantised(H, F, 1)
    for gate_up in (gate_up_silu(), quantised(2 * F, H, 7, random(2 * F))):
        mlp = GatedMLP(gate_up, quantised(H, F, 8))
        pending, _ = end_block(last, x, stream, norm, mlp.gate_up)
        whole, _ = last.end_block(x, stream, norm)
        assert isinstance(pending, PendingNorm)
        torch.testing.assert_close(mlp.gated(pending), mlp.gated(whole), rtol=1e-4, atol=1e-4)


def test_without_the_double_this_machine_leaves_no_norm() -> None:
    """The torch backend would gain nothing."""
    last, reader = quantised(H, F, 1), quantised(40, H, 2)
    normed, _ = end_block(last, random(1, F), random(1, H), RMSNorm(random(H), 1e-5), reader)
    assert isinstance(normed, torch.Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 8, 17])
def test_a_gpu_is_left_the_norms_of_few_rows(rows) -> None:
    """What the library says, to the layers that read it; 17 rows have their norm made."""
    dtype, device = torch.bfloat16, torch.device("cuda")

    def weight(N: int, K: int, seed: int):
        return quantize_rtn(random(N, K, seed=seed).to(device), QuantSpec(4, 128, True))

    def rows_of(width: int, seed: int) -> torch.Tensor:
        return random(rows, width, seed=seed).to(device, dtype)

    last = QuantLinear(prepare_weight(weight(512, 1024, 1), dtype=dtype, backend="cuda"))
    norm = RMSNorm(random(512, seed=2).to(device, dtype), 1e-5)
    x, stream = rows_of(1024, 3), rows_of(512, 4)
    for reader in (
        QuantLinear(prepare_weight(weight(768, 512, 5), dtype=dtype, backend="cuda")),
        GateUpSilu(prepare_gate_up(weight(2048, 512, 6), dtype=dtype, backend="cuda")),
    ):
        normed, after = end_block(last, x, stream, norm, reader)
        assert isinstance(normed, PendingNorm) is (rows <= 16)
        whole, expected = last.end_block(x, stream, norm)
        assert torch.equal(after, expected)
        apart = (reader(normed).float() - reader(whole).float()).norm()
        assert apart <= 0.02 * reader(whole).float().norm()
