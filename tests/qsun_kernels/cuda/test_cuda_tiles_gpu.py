"""The tiles of GPUs before sm_90, configuration by configuration, on a GPU and through the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.problems import PreparedWeight
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.quant import PackedWeight, QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_gate_up_silu, judge_wna16_linear

DTYPES = (torch.float16, torch.bfloat16)
BITS = (4, 8)
TOKEN_TILES = (2, 4, 6, 8)
# Row groups, column groups, splits, stages.
WAYS = ((1, 2, 1, 2), (2, 2, 2, 3), (1, 8, 1, 2), (4, 2, 2, 4), (2, 4, 1, 3), (1, 4, 2, 2))
FORMATS = ((128, True), (64, False), (32, False), (32, True), ("channel", False))


def tiles(x: Tensor, weight: PreparedWeight, bias=None, residual=None, **config: Any) -> Tensor:
    """The product, or with a gate_up weight the activation, by the kernel with this configuration."""
    columns = weight.N // 2 if weight.operator == "wna16_gate_up_silu" else weight.N
    settings = {"overlaps_producer": False, **config}
    with inputs.poisoned_outputs():
        out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
        linear.launch_panels(x, weight, bias, residual, out, False, library.binding.TilesConfig(**settings))
    return out


def way(token_tiles: int, row_groups: int, column_groups: int, split_k: int, stages: int) -> dict[str, int]:
    return {
        "token_tiles": token_tiles,
        "row_groups": row_groups,
        "column_groups": column_groups,
        "split_k": split_k,
        "stages": stages,
    }


def with_poison(x: Tensor) -> Tensor:
    """The same rows with NaN between them, and aligned to 16 bytes."""
    stride = -(-x.shape[1] // 8) * 8 + 8
    wide = torch.full((x.shape[0], stride), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("token_tiles", TOKEN_TILES)
def test_every_instance(kernels, bits, dtype, token_tiles) -> None:
    """Exact for a single 1 in x; within the rule for random x; group sizes, zeros and odd sizes in turn.

    Columns end in the middle of a block of 128 and of 16 bytes of x, rows in the middle of a block of 64.
    """
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    for (group_size, symmetric), shape in zip(FORMATS, WAYS, strict=False):
        row_groups, column_groups, split_k, _ = shape
        K = (64 * column_groups) * split_k + 45
        N = 64 * row_groups + 13
        source = inputs.generator(bits)
        spec = QuantSpec(bits, group_size, symmetric)
        packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=kernels.device)
        weight = prepare(packed, dtype)
        config = way(token_tiles, *shape)
        # An eye has a row for each column of the weight.
        eye = with_poison(torch.eye(K, dtype=dtype, device=kernels.device))
        picked = tiles(eye if kernels.is_gpu else eye[-token_tiles * 8 - 5 :], weight, **config)
        dense = kernels.run("dequantize", packed, dtype)
        assert torch.equal(picked, dense.T[-len(picked) :])
        for M in (1, token_tiles * 8 - 3, token_tiles * 8 + 1):
            x = with_poison(inputs.normal(source, (M, K), dtype, kernels.device))
            bias = inputs.normal(source, (N,), dtype, kernels.device)
            residual = inputs.normal(source, (M, N), dtype, kernels.device)
            got = tiles(x, weight, bias, residual, **config)
            judge_wna16_linear(got, x, packed, bias=bias, residual=residual).require()


@pytest.mark.parametrize("stages", (2, 3, 4, 5, 6))
@pytest.mark.parametrize("way_of", WAYS, ids=str)
def test_ways_to_cut_the_work(kernels, way_of, stages) -> None:
    """Fewer chunks of columns than stages and many more, whole and split: every element once, repeatably.

    Rows of x that 16 bytes divide, and a number of columns that they do not.
    """
    dtype = torch.bfloat16
    row_groups, column_groups, _, _ = way_of
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    for K in (128, 1024, 1500):
        N = 72
        source = inputs.generator(K)
        packed = inputs.packed_weight(
            source, N, K, QuantSpec(4, 128, True), scale_dtype=dtype, device=kernels.device
        )
        weight = prepare(packed, dtype)
        x = with_poison(inputs.normal(source, (11, K), dtype, kernels.device))
        chunks = -(-K // (column_groups * 64))
        for split_k in {1, min(3, chunks)}:
            config = way(2, row_groups, column_groups, split_k, stages)
            got = tiles(x, weight, **config)
            judge_wna16_linear(got, x, packed).require()
            for _ in range(kernels.pick(100, 1)):
                assert torch.equal(tiles(x, weight, **config), got)
            if kernels.is_gpu and torch.cuda.get_device_capability(kernels.device)[0] >= 9:
                assert torch.equal(tiles(x, weight, **{**config, "overlaps_producer": True}), got)


def all_ones(K: int, device: torch.device) -> PackedWeight:
    """(16, K): every weight is 1."""
    codes = torch.full((16, K), 9, dtype=torch.uint8)
    scales = torch.ones(16, -(-K // 128), dtype=torch.float32)
    return PackedWeight.from_codes(codes, scales, QuantSpec(4, 128, True)).to(device)


@pytest.mark.parametrize(("column_groups", "split_k"), ((2, 3), (2, 4), (4, 3), (8, 1), (4, 1)))
def test_sums_are_added_in_order(kernels, column_groups, split_k) -> None:
    """2^25, 1 and -2^25 in three parts of the columns: 0 in their order, 1 in an order that keeps the 1.

    The parts are splits, or the columns of three warps.
    """
    dtype = torch.bfloat16
    chunk = 64 * column_groups
    K = chunk * split_k
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(all_ones(K, kernels.device), dtype)
    config = way(2, 1, column_groups, split_k, 2)
    part = chunk if split_k > 1 else 64
    large, one = 2.0**25, 1.0
    x = torch.zeros(3, K, dtype=dtype, device=kernels.device)
    for m, values in enumerate(((large, one, -large), (large, -large, one), (one, large, -large))):
        for i, value in enumerate(values):
            x[m, i * part + 7] = value
    expected = torch.tensor([0.0, 1.0, 0.0], dtype=dtype, device=kernels.device)
    assert torch.equal(tiles(x, weight, **config), expected[:, None].expand(3, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_k", (1, 2))
def test_gate_up_silu(kernels, dtype, split_k) -> None:
    prepare = cuda.IMPLEMENTATIONS["wna16_gate_up_silu"].prepare
    for half, K, group_size, symmetric in ((40, 304, 128, True), (21, 512, 32, False)):
        source = inputs.generator(half)
        spec = QuantSpec(4, group_size, symmetric)
        packed = inputs.packed_weight(
            source, 2 * half, K, spec, scale_dtype=dtype, act_order=half == 21, device=kernels.device
        )
        weight = prepare(packed, dtype)
        for M in (9, 33):
            x = inputs.normal(source, (M, K), dtype, kernels.device, std=0.3)
            got = tiles(x, weight, **way(4, 1, 2, split_k, 3))
            judge_wna16_gate_up_silu(got, x, packed).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_far_from_zero(kernels, dtype) -> None:
    """One column dominates in the second row, as a massive activation does."""
    K, N = 2048, 40
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    for group_size, symmetric in ((128, True), (128, False), (32, False)):
        source = inputs.generator(group_size)
        spec = QuantSpec(4, group_size, symmetric)
        packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=kernels.device)
        x = inputs.normal(source, (3, K), dtype, kernels.device)
        x[0] += 30
        x[1, 77] = 2000
        x[2] = 1 / 3
        got = tiles(x, prepare(packed, dtype), **way(2, 1, 4, 2, 3))
        judge_wna16_linear(got, x, packed).require()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "5"])
@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("emulated_kernels", (0, 1), indirect=True, ids=("sm_90", "sm_80"))
def test_what_is_chosen_on_a_gpu_without_wgmma(emulated_kernels, monkeypatch, order, copies) -> None:
    """Whatever order threads run in and copies arrive in; with the norm behind split columns, too."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    monkeypatch.setenv("QSUN_EMULATOR_COPIES", copies)
    dtype, M, N, K = torch.bfloat16, 17, 40, 4096
    source = inputs.generator(1)
    packed = inputs.packed_weight(source, N, K, QuantSpec(4, 128, False), scale_dtype=dtype)
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, dtype)
    text = library.binding.describe_wna16_panels(
        M, N, K, 4, 1, True, False, library.device_props(emulated_kernels.device.index or 0)
    )
    assert text.startswith("tiles_sm80 ") and "split_k=1 " not in text
    x = inputs.normal(source, (M, K), dtype)
    residual, norm_weight = inputs.normal(source, (M, N), dtype), inputs.normal(source, (N,), dtype)
    with inputs.poisoned_outputs():
        got = emulated_kernels.run("wna16_linear", x, weight, None, residual, None)
        norm, stream = emulated_kernels.run(
            "wna16_linear_rms_norm", x, weight, residual, norm_weight, 1e-5, None, False
        )
    judge_wna16_linear(got, x, packed, residual=residual).require()
    assert torch.equal(stream, got)
    assert torch.equal(norm, emulated_kernels.run("rms_norm", got, norm_weight, 1e-5, None))


@pytest.mark.slow
def test_only_the_weight_is_read_early(emulated_kernels, guard) -> None:
    """x is what the launch in front writes; with prefetch_weights off, so may the weight be."""
    dtype, M, N, K = torch.bfloat16, 9, 64, 512
    source = inputs.generator(2)
    packed = inputs.packed_weight(source, N, K, QuantSpec(4, 64, True), scale_dtype=dtype)
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, dtype)
    x = inputs.normal(source, (M, K), dtype)
    config = {**way(2, 1, 2, 2, 3), "overlaps_producer": True}
    expected = tiles(x, weight, **config)
    guard(x)
    assert torch.equal(tiles(x, weight, **config), expected)
    guard(weight.tensors[0])
    assert torch.equal(tiles(x, weight.in_stream_order(), **config), expected)
    with pytest.raises(KernelLaunchError, match="before wait_for_producers"):
        tiles(x, weight, **config)


def test_a_configuration_that_cannot_run_is_refused(kernels) -> None:
    source = inputs.generator(0)
    packed = {
        bits: inputs.packed_weight(
            source, 64, 256, QuantSpec(bits, 128, True), scale_dtype=torch.float16, device=kernels.device
        )
        for bits in (3, 4)
    }
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    weight = prepare(packed[4], torch.float16)
    x = torch.ones(64, 256, dtype=torch.float16, device=kernels.device)
    right = way(8, 1, 2, 1, 2)
    for wrong, message in (
        ({"token_tiles": 3}, "token_tiles is 3"),
        ({"row_groups": 3}, "row_groups is 3"),
        ({"column_groups": 1}, "column_groups is 1"),
        ({"row_groups": 4, "column_groups": 4}, r"row_groups \* column_groups is 16; expected at most 8"),
        ({"split_k": 3}, "split_k is 3; expected at most 2"),
        ({"split_k": 0}, "split_k is 0"),
        ({"stages": 1}, "stages is 1"),
        ({"stages": 7}, "stages is 7"),
        ({"column_groups": 8, "stages": 6}, "shared memory is"),
    ):
        with pytest.raises(KernelLaunchError, match=message):
            tiles(x, weight, **{**right, **wrong})
    with pytest.raises(KernelLaunchError, match="bits is 3; expected one of 4 8"):
        tiles(x, prepare(packed[3], torch.float16), **right)
    wide = torch.ones(64, 260, dtype=torch.float16, device=kernels.device)
    with pytest.raises(KernelLaunchError, match="x is misaligned"):
        tiles(wide[:, 1:257], weight, **right)
