"""wna16_linear and dequantize: the CUDA kernels against float64, on a GPU and through the emulator."""

from __future__ import annotations

import pytest
import torch

from qsun_kernels.backends import cuda
from qsun_kernels.quant import PackedWeight, QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_dequantize, judge_wna16_linear
from qsun_kernels.testing.oracles import take_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, "channel")


def linear(kernels, x, packed, bias=None, residual=None, out=None):
    prepared = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, x.dtype)
    with inputs.poisoned_outputs():
        return kernels.run("wna16_linear", x, prepared, bias, residual, out)


@pytest.mark.parametrize("part", range(8))
def test_random_problems(kernels, part) -> None:
    """Bits, groups, zeros, act-order, dtype, bias and residual mixed, at sizes of every kind."""
    for seed in range(kernels.pick(250, 25)):
        source = inputs.generator(1000 * part + seed)

        def draw(*choices, source=source):
            return choices[int(torch.randint(len(choices), (1,), generator=source))]

        def between(low, high, source=source):
            return int(torch.randint(low, high + 1, (1,), generator=source))

        dtype = draw(*DTYPES)
        spec = QuantSpec(draw(*BITS), draw(*GROUPS), draw(True, False))
        M = draw(1, 2, 3, 4, 5, 8, 9, between(1, kernels.pick(200, 20)))
        N = between(1, kernels.pick(700, 90))
        K = draw(between(1, kernels.pick(3000, 400)), 32 * between(1, kernels.pick(100, 40)))
        packed = inputs.packed_weight(
            source, N, K, spec, scale_dtype=dtype, act_order=draw(True, False, False), device=kernels.device
        )
        x = inputs.normal(source, (M, K), dtype, kernels.device)
        bias = inputs.normal(source, (N,), dtype, kernels.device) if draw(True, False) else None
        residual = inputs.normal(source, (M, N), dtype, kernels.device) if draw(True, False) else None
        result = judge_wna16_linear(linear(kernels, x, packed, bias, residual), x, packed, bias, residual)
        assert result.ok, f"seed {1000 * part + seed}: M={M} N={N} K={K} {spec} {dtype}: {result.report}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_k_and_n_by_one_hot(kernels, bits, group_size, dtype) -> None:
    """A row of x with a single 1 picks one column of the weight, exactly: every code and lane in turn."""
    K, N = kernels.pick((1100, 70), (229, 9))
    for symmetric, act_order in ((True, False), (False, False), (False, True)):
        packed = inputs.packed_weight(
            inputs.generator(bits),
            N,
            K,
            QuantSpec(bits, group_size, symmetric),
            scale_dtype=dtype,
            act_order=act_order,
            device=kernels.device,
        )
        picked = linear(kernels, torch.eye(K, dtype=dtype, device=kernels.device), packed)
        weight = kernels.run("dequantize", packed, dtype)
        judge_dequantize(weight, packed, dtype).require()
        assert torch.equal(picked, weight.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_bit_for_bit(kernels, bits, scale_dtype, dtype) -> None:
    for K in (1, 7, 8, 31, 32, 65, 576):
        for group_size in GROUPS:
            packed = inputs.packed_weight(
                inputs.generator(K),
                5,
                K,
                QuantSpec(bits, group_size, K % 2 == 0),
                scale_dtype=scale_dtype,
                act_order=K == 65,
                device=kernels.device,
            )
            with inputs.poisoned_outputs():
                dense = kernels.run("dequantize", packed, dtype)
            judge_dequantize(dense, packed, dtype).require()


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element past an aligned address."""
    space = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    space[1:] = tensor.flatten()
    return space[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_misaligned_and_strided_arguments(kernels, bits, dtype) -> None:
    """No load is wider than its address allows; the space between rows is left alone."""
    M, N, K = 5, 34, 160
    source = inputs.generator(7)
    aligned = inputs.packed_weight(
        source, N, K, QuantSpec(bits, 32, False), scale_dtype=dtype, device=kernels.device
    )
    packed = PackedWeight(
        aligned.spec, N, K, *(shifted(t) for t in (aligned.qweight, aligned.scales, aligned.qzeros))
    )
    for x_stride, residual_stride, out_stride in ((K + 8, N + 2, N + 6), (K + 1, N + 1, N + 3)):
        x, residual, out = (
            torch.full((M, stride), torch.nan, dtype=dtype, device=kernels.device)
            for stride in (x_stride, residual_stride, out_stride)
        )
        x[:, :K] = inputs.normal(source, (M, K), dtype)
        residual[:, :N] = inputs.normal(source, (M, N), dtype)
        got = linear(kernels, x[:, :K], packed, residual=residual[:, :N], out=out[:, :N])
        assert got.data_ptr() == out.data_ptr()
        assert out[:, N:].isnan().all()
        judge_wna16_linear(got, x[:, :K], packed, residual=residual[:, :N]).require()
        other = linear(kernels, shifted(x[:, :K].contiguous()), packed, residual=residual[:, :N])
        assert torch.equal(got, other)


@pytest.mark.parametrize(
    ("dtype", "x_std", "scale"),
    [
        (torch.float16, 2.0**14, 2.0**-20),
        (torch.float16, 2.0**-20, 1.0),
        (torch.bfloat16, 2.0**120, 2.0**-110),
        (torch.bfloat16, 2.0**-120, 2.0**100),
        (torch.float32, 2.0**122, 2.0**-120),
        (torch.float32, 2.0**-120, 2.0**-10),
        (torch.float16, 2.0**12, 2.0**8),  # overflows where the exact result does
    ],
)
def test_extreme_magnitudes(kernels, dtype, x_std, scale) -> None:
    M, N, K = 3, 16, 256
    source = inputs.generator(3)
    packed = inputs.packed_weight(source, N, K, QuantSpec(8, 64, False), device=kernels.device)
    scales = torch.full_like(packed.scales, scale).to(dtype)
    packed = PackedWeight(packed.spec, N, K, packed.qweight, scales, packed.qzeros)
    x = (torch.randn(M, K, generator=source, dtype=torch.float64).clamp(-3, 3) * x_std).to(dtype)
    x = x.to(kernels.device)
    judge_wna16_linear(linear(kernels, x, packed), x, packed).require()


def test_a_nan_stays_in_its_row(kernels) -> None:
    M, N, K = 9, 20, 96
    source = inputs.generator(5)
    packed = inputs.packed_weight(
        source, N, K, QuantSpec(4, 32, True), scale_dtype=torch.float16, device=kernels.device
    )
    x = inputs.normal(source, (M, K), torch.float16, kernels.device)
    clean = linear(kernels, x, packed)
    x[4, 33] = torch.nan
    spoiled = linear(kernels, x, packed)
    assert spoiled[4].isnan().all()
    others = [m for m in range(M) if m != 4]
    assert torch.equal(spoiled[others], clean[others])


def test_no_rows(kernels) -> None:
    packed = inputs.packed_weight(
        inputs.generator(0), 3, 40, QuantSpec(4, 32, True), scale_dtype=torch.float16, device=kernels.device
    )
    x = torch.empty((0, 40), dtype=torch.float16, device=kernels.device)
    assert linear(kernels, x, packed).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("M", (1, 3, 16, 257))
def test_sizes_of_a_model(device, dtype, M) -> None:
    """Rows of many slabs, grids of many blocks."""
    for N, K in ((4096, 14336), (28672, 4096)):
        source = inputs.generator(M)
        spec = QuantSpec(4, 128, False)
        packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=device)
        x = inputs.normal(source, (M, K), dtype, device)
        prepared = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, dtype)
        with inputs.poisoned_outputs():
            got = cuda.IMPLEMENTATIONS["wna16_linear"].run(x, prepared, None, None, None)
        columns = torch.randint(N, (300,), generator=source).to(device)
        judge_wna16_linear(got, x, packed, columns=columns).require()


@pytest.mark.gpu
def test_more_rows_than_a_grid_has(device) -> None:
    """The second grid dimension holds 65,535 blocks of 8 rows; rows past them are taken in a second turn."""
    M, N, K = 65_535 * 8 + 11, 2, 32
    source = inputs.generator(1)
    packed = inputs.packed_weight(
        source, N, K, QuantSpec(4, 32, True), scale_dtype=torch.float16, device=device
    )
    x = inputs.normal(source, (M, K), torch.float16, device)
    prepared = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, torch.float16)
    with inputs.poisoned_outputs():
        got = cuda.IMPLEMENTATIONS["wna16_linear"].run(x, prepared, None, None, None)
    judge_wna16_linear(got, x, packed).require()


@pytest.mark.gpu
def test_more_weights_than_32_bits_count(device) -> None:
    """2.6 billion weights: the last rows lie past 2**31 elements."""
    N, K = 40_000, 65_536
    spec = QuantSpec(4, "channel", True)
    qweight = torch.randint(-(2**31), 2**31, (N, K // 8), dtype=torch.int32, device=device)
    scales = torch.rand(N, 1, device=device).add_(0.5).to(torch.float16)
    packed = PackedWeight(spec, N, K, qweight, scales)
    dense = cuda.IMPLEMENTATIONS["dequantize"].run(packed, torch.float16)
    x = inputs.normal(inputs.generator(1), (2, K), torch.float16, device, std=0.01)
    prepared = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, torch.float16)
    y = cuda.IMPLEMENTATIONS["wna16_linear"].run(x, prepared, None, None, None)
    rows = torch.tensor([0, 1, 32_767, 32_768, 39_998, 39_999], device=device)
    sample = take_rows(packed, rows)
    judge_dequantize(dense[rows], sample, torch.float16).require()
    judge_wna16_linear(y[:, rows], x, sample).require()
