"""wna16_linear through Triton against float64, at the precision of torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import QuantSpec, dequantize, prepare_weight, wna16_linear
from qsun_kernels.backends.triton import wna16_linear as implementation
from qsun_kernels.backends.triton.wna16_linear import MAX_SPLITS, RowsConfig, choose
from qsun_kernels.quant import PackedWeight
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_linear

pytestmark = [
    pytest.mark.triton,
    # numpy, of sums with infinities and NaN.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, "channel")


def problem(
    device: torch.device,
    M: int,
    N: int,
    K: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    *,
    act_order: bool = False,
    seed: int = 0,
) -> tuple[Tensor, PackedWeight, Tensor, Tensor]:
    """x, the weight, a bias and a residual."""
    source = inputs.generator(seed)
    packed = inputs.packed_weight(source, N, K, spec, act_order=act_order, device=device).with_scales(dtype)
    x = inputs.normal(source, (M, K), dtype, device)
    return x, packed, inputs.normal(source, (N,), dtype, device), inputs.normal(source, (M, N), dtype, device)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_every_format(device: torch.device, bits: int, group_size: int | str, symmetric: bool) -> None:
    # K ends in the middle of a group and of a word, N in the middle of a tile.
    spec = QuantSpec(bits, group_size, symmetric)
    dtype = DTYPES[(BITS.index(bits) + GROUP_SIZES.index(group_size)) % 3]
    x, packed, bias, residual = problem(device, 3, 37, 173, spec, dtype, seed=bits)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    assert prepared.layout == "triton.rows" and prepared.tensors == packed.tensors
    with inputs.poisoned_outputs():
        got = wna16_linear(x, prepared, bias, residual)
    judge_wna16_linear(got, x, packed, bias, residual).require()


@pytest.mark.parametrize("given", ["bias", "residual", "neither"])
def test_bias_and_residual_each_alone(device: torch.device, given: str) -> None:
    spec, dtype = QuantSpec(4, 64, False), torch.bfloat16
    x, packed, bias, residual = problem(device, 3, 37, 173, spec, dtype)
    terms = (bias if given == "bias" else None, residual if given == "residual" else None)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    judge_wna16_linear(wna16_linear(x, prepared, *terms), x, packed, *terms).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 128), (4, 64), (8, 32), (4, "channel")])
def test_act_order(device: torch.device, bits: int, group_size: int | str, dtype: torch.dtype) -> None:
    spec = QuantSpec(bits, group_size, symmetric=bits == 4)
    x, packed, bias, residual = problem(device, 5, 35, 173, spec, dtype, act_order=True, seed=bits)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    judge_wna16_linear(wna16_linear(x, prepared, bias, residual), x, packed, bias, residual).require()


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 33), (65, 31), (64, 128), (130, 5)])
@pytest.mark.parametrize("M", [0, 1, 2, 16, 17, 33, 65])
def test_shapes(device: torch.device, M: int, N: int, K: int) -> None:
    spec = QuantSpec(4, 32, False)
    x, packed, bias, residual = problem(device, M, N, K, spec, torch.bfloat16, seed=M + K)
    prepared = prepare_weight(packed, dtype=torch.bfloat16, backend="triton")
    got = wna16_linear(x, prepared, bias, residual)
    judge_wna16_linear(got, x, packed, bias, residual).require()


SPLIT_FORMATS = [(4, 64, False), (3, 32, False), (8, "channel", False), (4, 32, True)]


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize(("bits", "group_size", "act_order"), SPLIT_FORMATS)
def test_splits_of_K(
    device: torch.device, bits: int, group_size: int | str, act_order: bool, splits: int
) -> None:
    # 6 chunks: 8 splits leave two without any, 4 share them unevenly.
    spec = QuantSpec(bits, group_size, False)
    dtype = torch.float16
    x, packed, bias, residual = problem(device, 3, 37, 173, spec, dtype, act_order=act_order)
    config = RowsConfig(block_m=16, block_n=32, block_k=32, splits=splits, num_warps=4, num_stages=2)
    prepared = implementation.prepare(packed, dtype)
    with inputs.poisoned_outputs():
        got, again = (
            implementation.wna16_linear(x, prepared, bias, residual, config=config) for _ in range(2)
        )
    judge_wna16_linear(got, x, packed, bias, residual).require()
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("bits", BITS)
def test_one_hot_gives_every_weight_exactly(
    device: torch.device, bits: int, act_order: bool, dtype: torch.dtype
) -> None:
    K = 70
    _, packed, _, _ = problem(device, 1, 40, K, QuantSpec(bits, 32, False), dtype, act_order=act_order)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    got = wna16_linear(torch.eye(K, dtype=dtype, device=device), prepared)
    assert torch.equal(got.T, dequantize(packed, dtype, backend="torch"))


def test_leading_dimensions_strides_and_out(device: torch.device) -> None:
    spec, dtype = QuantSpec(4, 32, True), torch.bfloat16
    x, packed, _, residual = problem(device, 6, 20, 64, spec, dtype)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    expected = wna16_linear(x, prepared, None, residual)
    assert wna16_linear(x.new_empty(2, 0, 64), prepared).shape == (2, 0, 20)
    assert torch.equal(
        wna16_linear(x.view(2, 3, 64), prepared, None, residual.view(2, 3, 20)), expected.view(2, 3, 20)
    )
    # Rows of x and of the residual with other data between them.
    wide_x, wide_residual = (torch.full((6, 100), torch.nan, dtype=dtype, device=device) for _ in range(2))
    wide_x[:, :64], wide_residual[:, :20] = x, residual
    out = torch.full((6, 20), torch.nan, dtype=dtype, device=device)
    assert wna16_linear(wide_x[:, :64], prepared, None, wide_residual[:, :20], out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-7, 3e4], ids=str)
def test_extreme_magnitudes(device: torch.device, dtype: torch.dtype, magnitude: float) -> None:
    spec = QuantSpec(8, 32, False)
    x, packed, _, _ = problem(device, 3, 33, 96, spec, torch.float32)
    x = (x * magnitude).to(dtype)
    packed = packed.with_scales(dtype)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    judge_wna16_linear(wna16_linear(x, prepared), x, packed).require()


def test_nan_and_infinity_stay_in_their_row(device: torch.device) -> None:
    spec, dtype = QuantSpec(4, 32, False), torch.float16
    x, packed, _, _ = problem(device, 4, 33, 50, spec, dtype)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    clean = wna16_linear(x, prepared)
    x[1, 49], x[2, 0] = torch.nan, torch.inf
    got = wna16_linear(x, prepared)
    assert got[1].isnan().all() and not got[2].isfinite().any()
    assert torch.equal(got[::3], clean[::3])


def test_a_configuration_fits_every_problem() -> None:
    sizes = itertools.product((1, 8, 17, 64, 500), (1, 64, 4096, 57344), (1, 100, 4096, 28672))
    for (M, N, K), group_size, act_order, dtype in itertools.product(
        sizes, GROUP_SIZES, (False, True), DTYPES
    ):
        config = choose(M, N, K, group_size, act_order, dtype, 132)
        assert config.block_k % 32 == 0 and 1 <= config.splits <= MAX_SPLITS
        if group_size != "channel":
            assert group_size % config.block_k == 0, "a chunk of columns would be of two groups"
        tiles = -(-M // config.block_m) * -(-N // config.block_n)
        if config.splits > 1:
            assert tiles < 3 * 132 // 2, "split although the device is full"
            assert -(-K // config.block_k) >= 4 * config.splits, "parts of under 4 chunks"


MODEL_SIZES = [(4096, 4096), (28672, 4096), (4096, 14336), (1000, 576)]


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 7, 31, 200])
@pytest.mark.parametrize(("N", "K"), MODEL_SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_sizes(device: torch.device, dtype: torch.dtype, N: int, K: int, M: int) -> None:
    bits = BITS[M % 4]
    group_size = GROUP_SIZES[(M + N) % 4]
    x, packed, bias, residual = problem(device, M, N, K, QuantSpec(bits, group_size, M % 2 == 0), dtype)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    got = wna16_linear(x, prepared, bias, residual)
    columns = torch.randperm(N, generator=inputs.generator(M))[:512].to(device)
    judge_wna16_linear(got, x, packed, bias, residual, columns=columns).require()
    assert torch.equal(got, wna16_linear(x, prepared, bias, residual))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 16, 100])
def test_act_order_at_model_size(device: torch.device, M: int, dtype: torch.dtype) -> None:
    x, packed, bias, residual = problem(
        device, M, 4096, 4096, QuantSpec(4, 128, False), dtype, act_order=True
    )
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    judge_wna16_linear(wna16_linear(x, prepared, bias, residual), x, packed, bias, residual).require()


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_values(device: torch.device) -> None:
    x, packed, bias, residual = problem(device, 4, 512, 4096, QuantSpec(4, 128, True), torch.bfloat16)
    prepared = prepare_weight(packed, dtype=torch.bfloat16, backend="triton")
    wna16_linear(x, prepared, bias, residual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = wna16_linear(x, prepared, bias, residual)
    for seed in (1, 2):
        x.copy_(inputs.normal(inputs.generator(seed), x.shape, x.dtype))
        got.fill_(torch.nan)
        graph.replay()
        judge_wna16_linear(got, x, packed, bias, residual).require()


@pytest.mark.gpu
@pytest.mark.slow
def test_activations_past_2_to_the_31_values(device: torch.device) -> None:
    M, K = 70_000, 32_768
    _, packed, _, _ = problem(device, 1, 16, K, QuantSpec(4, 128, True), torch.bfloat16)
    prepared = prepare_weight(packed, dtype=torch.bfloat16, backend="triton")
    x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
    got = wna16_linear(x, prepared)
    rows = torch.tensor([0, 1, 65_535, 65_536, M - 1], device=device)
    judge_wna16_linear(got[rows], x[rows], packed).require()
