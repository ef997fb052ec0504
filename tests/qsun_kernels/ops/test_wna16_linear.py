"""wna16_linear and prepare_weight: one-hot exactness, against float64, extremes, views, odd sizes."""

from __future__ import annotations

import math

import pytest
import torch

from qsun_kernels import PackedWeight, QuantSpec, dequantize, prepare_weight, use_backend, wna16_linear
from qsun_kernels.backends.dispatch import passed_over
from qsun_kernels.backends.problems import BackendName, Wna16Problem
from qsun_kernels.testing import inputs, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [
    QuantSpec(bits, group_size, symmetric)
    for bits, group_size in [(2, 64), (3, 32), (4, 32), (4, 64), (4, 128), (4, "channel"), (8, 128)]
    for symmetric in (True, False)
]
# N and K that the int4 kernel of torch takes, and that nothing divides.
SIZES = [(1, 1), (16, 64), (33, 130), (48, 192), (64, 1024), (17, 64), (16, 200)]


def weight_of(
    spec: QuantSpec, N: int, K: int, dtype: torch.dtype, act_order: bool = False, seed: int = 0
) -> PackedWeight:
    """A random weight with its scales in the dtype of the activations."""
    source = inputs.generator(N * 10_000 + K + seed)
    return inputs.packed_weight(source, N, K, spec, act_order=act_order).with_scales(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_a_one_hot_input_gives_its_column_bit_for_bit(
    act_order: bool, spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> None:
    """Every k and every n: the codes, the groups and the rounding are all right, or one of these differs."""
    for N, K in [(16, 192), (19, 130)]:
        packed = weight_of(spec, N, K, dtype, act_order).to(device)
        prepared = prepare_weight(packed, dtype=dtype, backend="torch")
        identity = torch.eye(K, dtype=dtype, device=device)
        expected = dequantize(packed, dtype, backend="torch").T
        assert torch.equal(wna16_linear(identity, prepared), expected)
        for k in (0, 31, K // 2, K - 1):
            assert torch.equal(wna16_linear(identity[k], prepared), expected[k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_agrees_with_float64(spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> None:
    source = inputs.generator(1)
    for (N, K), rows in zip(SIZES, (3, 17, 1, 3, 2, 0, 33), strict=True):
        packed = weight_of(spec, N, K, dtype).to(device)
        prepared = prepare_weight(packed, dtype=dtype, backend="torch")
        x = inputs.normal(source, (rows, K), dtype, device)
        bias = inputs.normal(source, (N,), dtype, device)
        residual = inputs.normal(source, (rows, N), dtype, device)
        for b, r in [(None, None), (bias, None), (None, residual), (bias, residual)]:
            with inputs.poisoned_outputs():
                y = wna16_linear(x, prepared, b, r)
            judge.judge_wna16_linear(y, x, packed, b, r).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 128, "channel"])
def test_act_order_agrees_with_float64(group_size: int, dtype: torch.dtype, device: torch.device) -> None:
    packed = weight_of(QuantSpec(4, group_size, True), 48, 300, dtype, act_order=True).to(device)
    prepared = prepare_weight(packed, dtype=dtype, backend="torch")
    x = inputs.normal(inputs.generator(2), (5, 300), dtype, device)
    judge.judge_wna16_linear(wna16_linear(x, prepared), x, packed).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_with_a_mean_add_up(dtype: torch.dtype, device: torch.device) -> None:
    """Activations of one sign, with which a wrong offset of a group adds up instead of cancelling."""
    packed = weight_of(QuantSpec(4, 64, False), 32, 512, dtype).to(device)
    prepared = prepare_weight(packed, dtype=dtype, backend="torch")
    x = inputs.normal(inputs.generator(3), (4, 512), dtype, device).abs() + 1
    judge.judge_wna16_linear(wna16_linear(x, prepared), x, packed).require()


def test_float16_sums_past_its_range_on_the_way() -> None:
    """Partial sums reach 2e6 and the result fits: accumulation has to be wider than float16."""
    spec = QuantSpec(4, 32, True)
    codes = torch.full((16, 64), 9, dtype=torch.uint8)
    codes[:, 32:] = 7
    packed = PackedWeight.from_codes(codes, torch.ones(16, 2, dtype=torch.float16), spec)
    prepared = prepare_weight(packed, dtype=torch.float16)
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    x[0, 0] = 60032.0
    assert wna16_linear(x, prepared).tolist() == [[32.0] * 16]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 4), (torch.bfloat16, 4), (torch.bfloat16, 8)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_spoils_its_row_only(bad: float, dtype: torch.dtype, bits: int) -> None:
    packed = weight_of(QuantSpec(bits, 32, True), 32, 64, dtype)  # type: ignore[arg-type]
    prepared = prepare_weight(packed, dtype=dtype)
    x = inputs.normal(inputs.generator(4), (6, 64), dtype)
    expected = wna16_linear(x, prepared)
    x[3, 5] = bad
    y = wna16_linear(x, prepared)
    rest = [0, 1, 2, 4, 5]
    assert torch.equal(y[rest], expected[rest])
    assert not y[3].isfinite().any()


@pytest.mark.parametrize("bits", [4, 8])
def test_leading_dimensions_views_and_out(bits: int) -> None:
    packed = weight_of(QuantSpec(bits, 32, True), 32, 64, torch.bfloat16)  # type: ignore[arg-type]
    prepared = prepare_weight(packed, dtype=torch.bfloat16)
    source = inputs.generator(5)
    wide = inputs.normal(source, (2, 3, 100), torch.bfloat16)
    view = wide[..., 20:84]
    residual = inputs.normal(source, (2, 3, 40), torch.bfloat16)[..., :32]
    expected = wna16_linear(view.reshape(6, 64).contiguous(), prepared, None, residual.reshape(6, 32))
    y = wna16_linear(view, prepared, None, residual)
    assert y.shape == (2, 3, 32)
    assert torch.equal(y.view(6, 32), expected)
    out = torch.full((2, 3, 32), torch.nan, dtype=torch.bfloat16)
    assert wna16_linear(view, prepared, None, residual, out=out) is out
    assert torch.equal(out, y)
    assert torch.equal(wna16_linear(view[0, 0], prepared), wna16_linear(view, prepared)[0, 0])
    assert wna16_linear(view[:0], prepared).shape == (0, 3, 32)


def test_repeats_bit_for_bit() -> None:
    for spec in (QuantSpec(4, 64, True), QuantSpec(4, 64, False)):
        prepared = prepare_weight(weight_of(spec, 128, 512, torch.bfloat16), dtype=torch.bfloat16)
        x = inputs.normal(inputs.generator(6), (5, 512), torch.bfloat16)
        assert torch.equal(wna16_linear(x, prepared), wna16_linear(x, prepared))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4, 64, True), QuantSpec(8, "channel", False)], ids=str)
def test_a_batch_invariant_row_is_the_same_in_every_batch(
    spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> None:
    M, N, K = 33, 128, 512
    packed = weight_of(spec, N, K, dtype).to(device)
    source = inputs.generator(7)
    # Rows 3 apart from a multiple of 16 bytes: no two begin at the same alignment.
    x = inputs.normal(source, (M, K + 3), dtype, device)[:, :K]
    bias = inputs.normal(source, (N,), dtype, device)
    residual = inputs.normal(source, (M, N), dtype, device)
    prepared = prepare_weight(packed, dtype=dtype, backend="torch")
    for b, r in [(None, None), (bias, None), (None, residual), (bias, residual)]:
        whole = wna16_linear(x, prepared, b, r, batch_invariant=True)
        judge.judge_wna16_linear(whole, x, packed, b, r).require()
        for first, rows in [(0, 1), (32, 1), (0, 2), (3, 7), (1, 32)]:
            part = slice(first, first + rows)
            got = wna16_linear(x[part], prepared, b, None if r is None else r[part], batch_invariant=True)
            assert torch.equal(got, whole[part])
        one = wna16_linear(x[5], prepared, b, None if r is None else r[5], batch_invariant=True)
        assert torch.equal(one, whole[5])
        out = torch.full_like(whole, torch.nan)
        assert wna16_linear(x, prepared, b, r, out=out, batch_invariant=True) is out
        assert torch.equal(out, whole)
    others = torch.full((9, K), torch.nan, dtype=dtype, device=device)
    others[8] = x[5]
    alone = wna16_linear(others, prepared, batch_invariant=True)
    assert torch.equal(alone[8], wna16_linear(x[5], prepared, batch_invariant=True))
    assert wna16_linear(x[:0], prepared, bias, batch_invariant=True).shape == (0, N)


def test_batch_invariance_does_not_rest_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that rounds by the number of its rows, as some library on some machine will."""
    exact = torch.mm

    def by_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return exact(x, weight) + x.shape[0]

    packed = weight_of(QuantSpec(8, 64, True), 16, 64, torch.bfloat16)
    prepared = prepare_weight(packed, dtype=torch.bfloat16, backend="torch")
    x = inputs.normal(inputs.generator(8), (5, 64), torch.bfloat16)
    monkeypatch.setattr(torch, "mm", by_rows)
    assert not torch.equal(wna16_linear(x, prepared)[:1], wna16_linear(x[:1], prepared))
    whole = wna16_linear(x, prepared, batch_invariant=True)
    assert torch.equal(whole[:1], wna16_linear(x[:1], prepared, batch_invariant=True))
    assert torch.equal(whole[1:4], wna16_linear(x[1:4], prepared, batch_invariant=True))


def test_scales_are_rounded_to_the_activations() -> None:
    """A float32 scale that bfloat16 cannot hold: every backend multiplies by the rounded one."""
    spec = QuantSpec(4, "channel", True)
    packed = PackedWeight.from_codes(
        torch.full((16, 32), 9, dtype=torch.uint8), torch.full((16, 1), 1.001), spec
    )
    x = torch.eye(32, dtype=torch.bfloat16)
    y = wna16_linear(x, prepare_weight(packed, dtype=torch.bfloat16))
    assert (y == 1.0).all()
    y = wna16_linear(x.float(), prepare_weight(packed, dtype=torch.float32))
    assert (y == torch.tensor(1.001)).all()


def test_a_weight_stays_with_its_backend() -> None:
    packed = weight_of(QuantSpec(4, 32, True), 16, 32, torch.float32)
    prepared = prepare_weight(packed, dtype=torch.float32, backend="torch")
    assert prepared.backend == "torch"
    x = torch.ones(1, 32)
    with use_backend("cuda"):
        y = wna16_linear(x, prepared)
    assert torch.equal(y, wna16_linear(x, prepared, backend="torch"))


def test_prepared_weight_counts_its_bytes() -> None:
    packed = weight_of(QuantSpec(4, 64, True), 64, 128, torch.bfloat16)
    assert prepare_weight(packed, dtype=torch.float32, backend="torch").nbytes == 64 * 128 * 4


@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
def test_a_weight_that_is_written_in_the_stream(backend: BackendName, device: torch.device) -> None:
    """Same values, same tensors; the operator, traced or not, and new values in place of the old ones."""
    source = inputs.generator(5)
    spec = QuantSpec(4, 64, True)
    packed, other = (inputs.packed_weight(source, 96, 128, spec, device=device) for _ in range(2))
    x = inputs.normal(source, (3, 128), torch.float16, device)
    if reason := passed_over(backend, Wna16Problem(96, 128, 4, 64, True, False, x.dtype, x.device)):
        pytest.skip(reason)
    weight, expected = (prepare_weight(p, dtype=x.dtype, backend=backend) for p in (packed, other))
    ordered = weight.in_stream_order()
    assert weight.is_prefetched and not ordered.is_prefetched and not ordered.in_stream_order().is_prefetched
    assert ordered.in_stream_order().layout == ordered.layout != weight.layout == ordered.stored_layout
    assert torch.equal(wna16_linear(x, ordered), wna16_linear(x, weight))
    compiled = torch.compile(lambda x: wna16_linear(x, ordered), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), wna16_linear(x, weight))
    for tensor, new in zip(ordered.tensors, expected.tensors, strict=True):
        tensor.copy_(new)
    assert torch.equal(wna16_linear(x, ordered), wna16_linear(x, expected))
