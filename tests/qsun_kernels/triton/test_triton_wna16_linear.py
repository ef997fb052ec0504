"""wna16_linear through Triton against float64, at the precision of torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import QuantSpec, dequantize, prepare_weight, wna16_linear
from qsun_kernels.backends.problems import PreparedWeight, Wna16Problem
from qsun_kernels.backends.triton import wna16_layout
from qsun_kernels.backends.triton import wna16_linear as implementation
from qsun_kernels.backends.triton.wna16_configs import TilesConfig, choose_tiles, tuned
from qsun_kernels.backends.triton.wna16_rows import MAX_SPLITS, RowsConfig, choose
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


def in_rows(packed: PackedWeight, dtype: torch.dtype) -> PreparedWeight:
    """The weight for the kernel that runs every format, where `prepare` would take the other."""
    return PreparedWeight(packed.spec, packed.N, packed.K, dtype, "triton", "triton.rows", packed.tensors)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_every_format(device: torch.device, bits: int, group_size: int | str, symmetric: bool) -> None:
    # K ends in the middle of a group and of a word, N in the middle of a tile.
    spec = QuantSpec(bits, group_size, symmetric)
    dtype = DTYPES[(BITS.index(bits) + GROUP_SIZES.index(group_size)) % 3]
    x, packed, bias, residual = problem(device, 3, 37, 173, spec, dtype, seed=bits)
    prepared = prepare_weight(packed, dtype=dtype, backend="triton")
    if dtype == torch.float32 or bits == 3:
        assert prepared.layout == "triton.rows" and prepared.tensors == packed.tensors
    else:
        assert prepared.layout == "triton.tiles"
    with inputs.poisoned_outputs():
        got, by_rows = (wna16_linear(x, w, bias, residual) for w in (prepared, in_rows(packed, dtype)))
    judge_wna16_linear(got, x, packed, bias, residual).require()
    judge_wna16_linear(by_rows, x, packed, bias, residual).require()


TILES_CONFIGS = [
    TilesConfig(8, 16, 128, 2, 1, 2, 1, ahead=False, prefetch=64),
    TilesConfig(16, 32, 256, 4, 2, 4, 1, ahead=True, prefetch=256),
    TilesConfig(16, 64, 128, 1, 3, 4, 3, ahead=False, prefetch=0),
    TilesConfig(32, 128, 128, 1, 1, 4, 2, ahead=True, prefetch=0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", wna16_layout.TILED_BITS)
def test_tiles_of_every_format(
    device: torch.device, bits: int, group_size: int | str, symmetric: bool, dtype: torch.dtype
) -> None:
    # One cut for each format, another for the next: every pair of neighbours in either list meets.
    which = wna16_layout.TILED_BITS.index(bits) + GROUP_SIZES.index(group_size) + symmetric
    config = TILES_CONFIGS[which % len(TILES_CONFIGS)]
    spec = QuantSpec(bits, group_size, symmetric)
    x, packed, bias, residual = problem(device, 9, 37, 300, spec, dtype, seed=which)
    prepared = implementation.prepare(packed, dtype)
    with inputs.poisoned_outputs():
        got, again = (
            implementation.wna16_linear(x, prepared, bias, residual, config=config) for _ in range(2)
        )
    judge_wna16_linear(got, x, packed, bias, residual).require()
    assert torch.equal(got, again)


@pytest.mark.parametrize("config", TILES_CONFIGS, ids=str)
@pytest.mark.parametrize("K", [1, 128, 512, 600])
def test_tiles_of_whole_and_broken_steps(device: torch.device, K: int, config: TilesConfig) -> None:
    # 512 and 600 columns are one to four steps: splits of two, of one, and of none.
    x, packed, bias, residual = problem(device, 3, 50, K, QuantSpec(4, 64, False), torch.bfloat16, seed=K)
    prepared = implementation.prepare(packed, torch.bfloat16)
    with inputs.poisoned_outputs():
        got = implementation.wna16_linear(x, prepared, bias, residual, config=config)
    judge_wna16_linear(got, x, packed, bias, residual).require()


@pytest.mark.parametrize("bits", wna16_layout.TILED_BITS)
def test_a_code_lies_where_the_layout_says(device: torch.device, bits: int) -> None:
    N, K = 40, 300
    spec = QuantSpec(bits, 128, True)
    chunk = wna16_layout.chunk_columns(bits)
    for n, k in [(0, 0), (7, 1), (8, 2), (31, 9), (39, 299), (17, 255), (22, 77)]:
        codes = torch.zeros(N, K, dtype=torch.uint8, device=device)
        codes[n, k] = spec.max_code
        scales = torch.ones(N, 3, dtype=torch.float16, device=device)
        words, *_ = wna16_layout.tile(PackedWeight.from_codes(codes, scales, spec))
        assert words.shape == (3, 384 // chunk, 128)
        place = [int(i) for i in words.nonzero()[0]]
        s, h_k, t, e = k % chunk // 16, k // 8 % 2, k // 2 % 4, k % 2
        h_n, lane = n % 16 // 8, 4 * (n % 8) + t
        word, bit = {
            2: (s // 2, 16 * e + 2 * (h_n + 2 * h_k + 4 * (s % 2))),
            4: (s, 16 * e + 4 * (h_n + 2 * h_k)),
            8: (2 * s + h_k, 8 * e + 16 * h_n),
        }[bits]
        assert place == [n // 16, k // chunk, 4 * lane + word]
        assert int(words[tuple(place)]) & 0xFFFFFFFF == spec.max_code << bit
        assert words.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_act_order_of_uneven_groups_stays_in_rows(device: torch.device, dtype: torch.dtype) -> None:
    K, spec = 128, QuantSpec(4, 32, False)
    x, packed, _, _ = problem(device, 3, 20, K, spec, dtype, act_order=True)
    assert packed.g_idx is not None
    even = prepare_weight(packed, dtype=dtype, backend="triton")
    assert even.layout == "triton.tiles" and len(even.tensors) == 4
    packed.g_idx[packed.g_idx == 2] = 1
    uneven = prepare_weight(packed, dtype=dtype, backend="triton")
    assert uneven.layout == "triton.rows"
    judge_wna16_linear(wna16_linear(x, uneven), x, packed).require()


def test_a_large_weight_is_laid_out_in_slabs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed, _, _ = problem(device, 1, 100, 200, QuantSpec(4, 32, False), torch.float16, act_order=True)
    whole = wna16_layout.tile(packed)
    monkeypatch.setattr(wna16_layout, "_SLAB", 3 * 16 * 256)
    parts = wna16_layout.tile(packed)
    assert whole is not None and parts is not None
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("bits", "dtype", "named"),
    [
        (4, torch.bfloat16, "wna16_linear_kernel: W4 g128 in the layout triton.tiles"),
        (3, torch.bfloat16, "wna16_rows_kernel: W3 g128 in the layout triton.rows, the one for 3 bits"),
        (8, torch.float32, "wna16_rows_kernel: W8 g128 in the layout triton.rows, the one for float32"),
    ],
)
def test_the_kernel_of_a_problem_is_named(
    device: torch.device, bits: int, dtype: torch.dtype, named: str
) -> None:
    line = implementation.describe(Wna16Problem(4096, 4096, bits, 128, True, False, dtype, device))
    assert line.startswith(named)


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
    # 6 chunks of rows: 8 splits leave two without any, 4 share them unevenly.
    spec = QuantSpec(bits, group_size, False)
    dtype = torch.float16
    x, packed, bias, residual = problem(device, 3, 37, 173, spec, dtype, act_order=act_order)
    config = RowsConfig(block_m=16, block_n=32, block_k=32, splits=splits, num_warps=4, num_stages=2)
    prepared = in_rows(packed, dtype)
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


def powers_of_two(*sizes: int) -> bool:
    return all(size > 0 and size & (size - 1) == 0 for size in sizes)


def test_the_table_holds_what_the_kernel_takes() -> None:
    seen = set()
    for bits, N, K, tokens, config in tuned():
        assert (bits, N, K, tokens) not in seen
        seen.add((bits, N, K, tokens))
        assert bits in wna16_layout.TILED_BITS
        assert powers_of_two(config.block_m, config.block_n, config.step_k, config.slices, config.num_warps)
        assert config.block_m >= 8 and config.block_n >= 16 and config.step_k >= 32
        assert config.slices in (1, config.num_warps), "a slice is a warp's"
        # A warp has a row of tiles of its own, or Triton moves weights from one to another.
        assert config.slices > 1 or config.block_n >= 16 * config.num_warps
        assert config.slices == 1 or config.block_m * config.step_k >= 256, "a warp's load of x"
        assert config.splits * config.slices * config.step_k <= -(-K // 128) * 128
        assert config.prefetch == 0 or powers_of_two(config.prefetch)
        assert choose_tiles(tokens, N, K, bits) == config
    assert {bits for bits, *_ in seen} == set(wna16_layout.TILED_BITS)


def test_a_configuration_is_found_for_every_problem() -> None:
    sizes = itertools.product((1, 3, 16, 17, 100, 5000), (1, 64, 4096, 200_000), (1, 100, 4096, 28672))
    for (M, N, K), bits in itertools.product(sizes, wna16_layout.TILED_BITS):
        config = choose_tiles(M, N, K, bits)
        assert config.step_k >= wna16_layout.chunk_columns(bits)
        assert 1 <= config.splits <= -(-K // (config.slices * config.step_k))
        assert config.block_m >= min(M, 16) or config.block_m >= 8
    # Twice as many rows as anything measured: still the nearest measured one, here that of the same K.
    largest = max(N for bits, N, K, *_ in tuned() if (bits, K) == (4, 8192))
    assert choose_tiles(1, 2 * largest, 8192, 4) == choose_tiles(1, largest, 8192, 4)


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
