"""The kernels on panel weights, configuration by configuration, on a GPU and through the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.problems import PreparedWeight
from qsun_kernels.quant import QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_gate_up_silu, judge_wna16_linear

DTYPES = (torch.float16, torch.bfloat16)
BITS = (2, 3, 4, 8)
# (token tiles, row tiles) that the streaming kernel is compiled for.
INSTANCES = ((1, 2), (1, 4), (2, 2), (2, 4), (4, 4))
H100 = {
    "compute_major": 9,
    "compute_minor": 0,
    "sm_count": 132,
    "shared_memory_per_block": 232448,
    "l2_bytes": 50 << 20,
}
A100 = {**H100, "compute_major": 8, "sm_count": 108, "shared_memory_per_block": 166912}


def prepared(kernels, packed, dtype, operator="wna16_linear") -> PreparedWeight:
    return cuda.IMPLEMENTATIONS[operator].prepare(packed, dtype)


def stream(kernels, x: Tensor, weight: PreparedWeight, bias=None, residual=None, **config: Any) -> Tensor:
    """wna16_linear by the streaming kernel, with this configuration."""
    settings = {"warps": 4, "stages": 2, "copy_engine": False, "overlaps_producer": False, **config}
    with inputs.poisoned_outputs():
        out = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    linear.launch_panels(x, weight, bias, residual, out, False, library.binding.StreamConfig(**settings))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("copy_engine", (False, True), ids=("lanes", "engine"))
@pytest.mark.parametrize(("token_tiles", "row_tiles"), INSTANCES)
def test_every_instance_of_the_streaming_kernel(
    kernels, bits, dtype, token_tiles, row_tiles, copy_engine
) -> None:
    """Exact for a single 1 in x; within the rule for random x; group sizes, zeros and odd sizes in turn."""
    K, N = 300, 77
    for group_size, symmetric in ((128, True), (64, False), (32, False)):
        source = inputs.generator(bits)
        spec = QuantSpec(bits, group_size, symmetric)
        packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=kernels.device)
        weight = prepared(kernels, packed, dtype)
        config = {"token_tiles": token_tiles, "row_tiles": row_tiles, "copy_engine": copy_engine}
        dense = kernels.run("dequantize", packed, dtype)
        picked = stream(
            kernels, torch.eye(K, dtype=dtype, device=kernels.device), weight, row_blocks=2, **config
        )
        assert torch.equal(picked, dense.T)
        for M in (1, token_tiles * 8 - 3, token_tiles * 8 + 1):
            x = inputs.normal(source, (M, K), dtype, kernels.device)
            residual = inputs.normal(source, (M, N), dtype, kernels.device)
            got = stream(kernels, x, weight, residual=residual, row_blocks=3, **config)
            judge_wna16_linear(got, x, packed, residual=residual).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "symmetric"), ((128, True), (128, False), (32, True), (32, False)))
def test_x_far_from_zero(kernels, bits, dtype, group_size, symmetric) -> None:
    """Codes may enter the product with a base, which is taken off sums of x: they cancel, and are large here.

    One column dominates in the second row, as a massive activation does.
    """
    K, N = 2048, 40
    source = inputs.generator(bits)
    spec = QuantSpec(bits, group_size, symmetric)
    packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=kernels.device)
    weight = prepared(kernels, packed, dtype)
    x = inputs.normal(source, (3, K), dtype, kernels.device)
    x[0] += 30
    x[1, 77] = 2000
    x[2] = 1 / 3
    for token_tiles, row_tiles in INSTANCES[:4]:
        got = stream(kernels, x, weight, token_tiles=token_tiles, row_tiles=row_tiles, row_blocks=1)
        judge_wna16_linear(got, x, packed).require()
        if not kernels.is_gpu:
            break


@pytest.mark.parametrize("warps", (1, 3, 8))
@pytest.mark.parametrize(
    ("stages", "copy_engine"),
    [
        *(pytest.param(stages, False, id=f"{stages}-lanes") for stages in (2, 3, 4)),
        *(pytest.param(stages, True, id=f"{stages}-engine") for stages in (2, 3, 4, 5, 8)),
    ],
)
@pytest.mark.parametrize("K", (1000, 1024))
def test_ways_to_cut_the_work(kernels, warps, stages, copy_engine, K) -> None:
    """More warps than column blocks, several turns a block, row tiles across row blocks: every element once.

    A multiple of 128 columns, and columns that the copy engine cannot bring.
    """
    dtype = torch.bfloat16
    for N, row_blocks in ((64, 1), (64, 4), (200, 5)):
        source = inputs.generator(N)
        packed = inputs.packed_weight(
            source, N, K, QuantSpec(4, 128, True), scale_dtype=dtype, device=kernels.device
        )
        weight = prepared(kernels, packed, dtype)
        x = inputs.normal(source, (5, K), dtype, kernels.device)
        config = {
            "token_tiles": 1,
            "row_tiles": 2,
            "warps": warps,
            "stages": stages,
            "copy_engine": copy_engine,
        }
        got = stream(kernels, x, weight, row_blocks=row_blocks, **config)
        judge_wna16_linear(got, x, packed).require()
        for _ in range(kernels.pick(100, 2)):
            assert torch.equal(stream(kernels, x, weight, row_blocks=row_blocks, **config), got)
        if kernels.is_gpu:
            overlapped = stream(
                kernels, x, weight, row_blocks=row_blocks, **{**config, "overlaps_producer": True}
            )
            assert torch.equal(overlapped, got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_gate_up_silu(kernels, bits, dtype) -> None:
    for half, K, group_size, symmetric in (
        (40, 300, 128, True),
        (21, 129, 32, False),
        (64, 256, "channel", False),
    ):
        source = inputs.generator(half)
        spec = QuantSpec(bits, group_size, symmetric)
        packed = inputs.packed_weight(
            source, 2 * half, K, spec, scale_dtype=dtype, act_order=half == 21, device=kernels.device
        )
        weight = prepared(kernels, packed, dtype, "wna16_gate_up_silu")
        for M in (1, 7, 16, 33, kernels.pick(300, 40)):
            x = inputs.normal(source, (M, K), dtype, kernels.device, std=0.3)
            with inputs.poisoned_outputs():
                got = kernels.run("wna16_gate_up_silu", x, weight, None)
            judge_wna16_gate_up_silu(got, x, packed).require()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariance(kernels, dtype) -> None:
    """A row among 40 is bit for bit what it is alone; without the flag it is not, so this test can fail."""
    M, N, K = 40, 130, kernels.pick(4096, 512)
    source = inputs.generator(3)
    packed = inputs.packed_weight(
        source, N, K, QuantSpec(4, 64, False), scale_dtype=dtype, device=kernels.device
    )
    weight = prepared(kernels, packed, dtype)
    x = inputs.normal(source, (M, K), dtype, kernels.device)
    together = kernels.run("wna16_linear", x, weight, None, None, None, True)
    judge_wna16_linear(together, x, packed).require()
    for m in (0, 7, 8, 39):
        alone = kernels.run("wna16_linear", x[m : m + 1], weight, None, None, None, True)
        assert torch.equal(alone[0], together[m])
    free = kernels.run("wna16_linear", x, weight, None, None, None, False)
    assert not all(
        torch.equal(kernels.run("wna16_linear", x[m : m + 1], weight, None, None, None, False)[0], free[m])
        for m in range(M)
    )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("M", (1, 3))
def test_columns_are_gathered(kernels, M, dtype) -> None:
    """Bits as they are, zero for -1; rows of x may lie apart, and columns take more than one block."""
    K, columns = 301, 1280
    source = inputs.generator(M)
    wide = inputs.normal(source, (M, K + 7), dtype, kernels.device)
    wide[0, 5] = float("nan")
    x = wide[:, :K]
    perm = torch.randint(-1, K, (columns,), generator=source).to(torch.int32).to(kernels.device)
    perm[:3] = torch.tensor([-1, 5, K - 1], dtype=torch.int32)
    got = linear._gathered(x, perm, True)
    expected = torch.where(perm < 0, 0, x[:, perm.long().clamp(min=0)].view(torch.int16)).to(torch.int16)
    assert torch.equal(got.view(torch.int16), expected)


@pytest.mark.parametrize("M", (1, 5, 16, 17, 40))
def test_act_order_gathers_x(kernels, M) -> None:
    for group_size, N, K in ((32, 40, 200), (128, 65, 384)):
        source = inputs.generator(M)
        packed = inputs.packed_weight(
            source,
            N,
            K,
            QuantSpec(4, group_size, False),
            scale_dtype=torch.bfloat16,
            act_order=True,
            device=kernels.device,
        )
        x = inputs.normal(source, (M, K), torch.bfloat16, kernels.device)
        got = kernels.run("wna16_linear", x, prepared(kernels, packed, torch.bfloat16), None, None, None)
        judge_wna16_linear(got, x, packed).require()


@pytest.mark.parametrize("gpu", (H100, A100), ids=("h100", "a100"))
def test_what_is_chosen_can_be_launched(extension, gpu) -> None:
    props = extension.DeviceProps(**gpu)
    for N, K in (
        (4096, 4096),
        (6144, 4096),
        (28672, 4096),
        (57344, 8192),
        (8192, 28672),
        (16, 128),
        (77, 100),
        (5128, 576),
    ):
        for M in (1, 2, 8, 9, 16, 17, 33, 64, 65, 256, 4096):
            for bits in BITS:
                for groups in (1, 2, 4):
                    for invariant in (False, True):
                        c = extension.choose_wna16_stream(M, N, K, bits, groups, True, invariant, props)
                        tiles = -(-N // 16)
                        assert (c.token_tiles, c.row_tiles) in INSTANCES
                        assert 1 <= c.row_blocks <= tiles
                        assert 2 <= c.stages <= (8 if c.copy_engine else 4) and c.warps * c.stages <= 64
                        assert 1 <= c.warps <= (16 if c.token_tiles == 1 and c.row_tiles <= 2 else 8)
                        assert c.overlaps_producer == (gpu is H100) and c.copy_engine <= (gpu is H100)
                        if invariant:
                            # What the order of a sum depends on, and that codes are multiplied as integers
                            one = extension.choose_wna16_stream(1, N, K, bits, groups, True, True, props)
                            assert (c.warps, c.row_blocks, c.row_tiles) == (
                                one.warps,
                                one.row_blocks,
                                one.row_tiles,
                            )
                            assert c.token_tiles <= 2
                        text = extension.describe_wna16_panels(M, N, K, bits, groups, True, invariant, props)
                        assert text.startswith(("stream ", "gemm_sm90 ", "tiles_sm80 "))
                        assert not invariant or text.startswith("stream ")
                        assert gpu is H100 or not text.startswith("gemm_sm90 ")


def test_a_configuration_that_is_not_compiled_is_refused(kernels) -> None:
    from qsun_kernels.errors import KernelLaunchError

    packed = inputs.packed_weight(
        inputs.generator(0),
        32,
        128,
        QuantSpec(4, 128, True),
        scale_dtype=torch.float16,
        device=kernels.device,
    )
    weight = prepared(kernels, packed, torch.float16)
    x = torch.ones(1, 128, dtype=torch.float16, device=kernels.device)
    for wrong, message in (
        ({"token_tiles": 5, "row_tiles": 4, "row_blocks": 1}, "token_tiles is 5"),
        ({"token_tiles": 4, "row_tiles": 2, "row_blocks": 1}, "row_tiles is 2"),
        ({"token_tiles": 1, "row_tiles": 2, "row_blocks": 3}, "row_blocks is 3"),
        ({"token_tiles": 1, "row_tiles": 2, "row_blocks": 1, "stages": 5}, "stages is 5; expected at most 4"),
        ({"token_tiles": 1, "row_tiles": 2, "row_blocks": 1, "warps": 17}, "warps is 17"),
        (
            {"token_tiles": 1, "row_tiles": 2, "row_blocks": 1, "warps": 9, "stages": 8, "copy_engine": True},
            r"warps \* stages is 72; expected at most 64",
        ),
    ):
        with pytest.raises(KernelLaunchError, match=message):
            stream(kernels, x, weight, **wrong)


# Splits of the columns, stages, and whether the splits add as a cluster.
SPLITS = ((1, 2, False), (2, 2, False), (3, 2, False), (2, 2, True), (3, 2, True))


def gemm(x: Tensor, weight: PreparedWeight, bias=None, residual=None, **config: Any) -> Tensor:
    """wna16_linear by the kernel for many tokens, with this configuration."""
    with inputs.poisoned_outputs():
        out = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    linear.launch_panels(x, weight, bias, residual, out, False, library.binding.GemmConfig(**config))
    return out


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_every_tile_of_the_kernel_for_many_tokens(device, bits, dtype) -> None:
    """Every tile, whole and with its columns split, however what is split is added: exact and repeatable.

    Rows of the weight end in the middle of a block of every number of warp groups, columns in that of a block
    of the weight.
    """
    prepare = cuda.IMPLEMENTATIONS["wna16_linear"].prepare
    for token_tile, warp_groups in library.binding.wna16_gemm_tiles():
        # An eye has a row for each column of the weight.
        for N, K, M, group_size in ((77, 304, 304, 128), (64 * warp_groups + 8, 712, token_tile + 3, 32)):
            source = inputs.generator(bits)
            spec = QuantSpec(bits, group_size, group_size == 128)
            packed = inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=device)
            weight = prepare(packed, dtype)
            x = inputs.normal(source, (M, K), dtype, device)
            bias = inputs.normal(source, (N,), dtype, device)
            residual = inputs.normal(source, (M, N), dtype, device)
            for split_k, stages, in_cluster in SPLITS:
                if in_cluster and token_tile < 64:
                    continue
                config = {
                    "token_tile": token_tile,
                    "warp_groups": warp_groups,
                    "split_k": split_k,
                    "stages": stages,
                    "adds_in_cluster": in_cluster,
                }
                got = gemm(x, weight, bias, residual, **config)
                judge_wna16_linear(got, x, packed, bias=bias, residual=residual).require()
                assert torch.equal(gemm(x, weight, bias, residual, **config), got)
                if M == K:
                    eye = torch.eye(K, dtype=dtype, device=device)
                    dense = cuda.IMPLEMENTATIONS["dequantize"].run(packed, dtype)
                    assert torch.equal(gemm(eye, weight, **config), dense.T)


@pytest.mark.gpu
@pytest.mark.sm90
def test_a_tile_configuration_that_cannot_run_is_refused(device) -> None:
    from qsun_kernels.errors import KernelLaunchError

    packed = inputs.packed_weight(
        inputs.generator(0), 64, 256, QuantSpec(4, 128, True), scale_dtype=torch.float16, device=device
    )
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, torch.float16)
    right = {"token_tile": 64, "warp_groups": 2, "split_k": 1, "stages": 2, "adds_in_cluster": False}
    for wrong, message in (
        ({"token_tile": 72}, r"\(token_tile, warp_groups\) is 72, 2"),
        ({"split_k": 3}, "split_k is 3; expected at most 2"),
        ({"split_k": 0}, "split_k is 0"),
        ({"stages": 9}, "stages is 9"),
        ({"stages": 1}, "stages is 1; expected at least 2"),
        ({"adds_in_cluster": True}, "split_k is 1; expected at least 2"),
        ({"adds_in_cluster": True, "split_k": 2, "token_tile": 32}, "token_tile is 32; expected at least 64"),
        ({"token_tile": 256, "stages": 4}, "shared memory is"),
    ):
        x = torch.ones(64, 256, dtype=torch.float16, device=device)
        with pytest.raises(KernelLaunchError, match=message):
            gemm(x, weight, **{**right, **wrong})
    with pytest.raises(KernelLaunchError, match="x is misaligned"):
        gemm(torch.ones(64, 260, dtype=torch.float16, device=device)[:, 1:257], weight, **right)


@pytest.mark.gpu
@pytest.mark.sm90
def test_more_bytes_in_a_row_of_blocks_than_32_bits_count(device) -> None:
    """The second row of blocks begins at its second block, and comes back to the first past 2 GB."""
    dtype, spec, columns = torch.bfloat16, QuantSpec(8, 128, True), 2**25
    packed = inputs.packed_weight(inputs.generator(3), 128, 256, spec, scale_dtype=dtype, device=device)
    weight = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(packed, dtype)
    (panels,) = weight.tensors
    first, other = panels[:, :1], panels[:, 1:]
    long = torch.cat((first, other.expand(-1, columns // 128 - 1, -1)), dim=1)
    assert long[0].nbytes > 2**31
    weight = replace(weight, K=columns, tensors=(long,))
    x = torch.zeros(2, columns, dtype=dtype, device=device)
    x[0, 5], x[1, -1] = 1.0, 1.0
    dense = cuda.IMPLEMENTATIONS["dequantize"].run(packed, dtype)
    config = {"token_tile": 16, "warp_groups": 1, "split_k": 1, "stages": 4, "adds_in_cluster": False}
    assert torch.equal(gemm(x, weight, **config), torch.stack((dense[:, 5], dense[:, -1])))


@pytest.mark.parametrize("act_order", (False, True))
def test_prefetching_is_passed_on(kernels, monkeypatch, act_order) -> None:
    """To the product, and to the launch that reads an act-order weight's perm."""
    packed = inputs.packed_weight(
        inputs.generator(0),
        32,
        128,
        QuantSpec(4, 32, True),
        scale_dtype=torch.float16,
        act_order=act_order,
        device=kernels.device,
    )
    weight = prepared(kernels, packed, torch.float16)
    assert len(weight.tensors) == 1 + act_order
    x = torch.ones(1, 128, dtype=torch.float16, device=kernels.device)
    passed, gathered = [], []
    binding = library.binding

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return getattr(binding, name)

        def wna16_panels(self, *arguments: Any) -> None:
            passed.append(arguments[-4])
            binding.wna16_panels(*arguments)

        def gather_columns(self, *arguments: Any) -> None:
            gathered.append(arguments[-4])
            binding.gather_columns(*arguments)

    monkeypatch.setattr(library, "binding", Recording())
    results = [
        kernels.run("wna16_linear", x, w, None, None, None) for w in (weight, weight.in_stream_order())
    ]
    assert passed == [True, False] and torch.equal(*results)
    assert gathered == ([True, False] if act_order else [])


@pytest.mark.gpu
def test_a_weight_written_by_the_kernel_in_front(device) -> None:
    """A copy into the weight, then the product, many times in one graph: the new values count."""
    dtype, N, K = torch.bfloat16, 4096, 4096
    source = inputs.generator(1)
    spec = QuantSpec(4, 128, True)
    weights = [
        cuda.IMPLEMENTATIONS["wna16_linear"].prepare(
            inputs.packed_weight(source, N, K, spec, scale_dtype=dtype, device=device), dtype
        )
        for _ in range(2)
    ]
    target = weights[0].in_stream_order()
    originals = [w.tensors[0].clone() for w in weights]
    x = inputs.normal(source, (1, K), dtype, device)
    run = cuda.IMPLEMENTATIONS["wna16_linear"].run
    expected = [run(x, w, None, None, None) for w in weights]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results = []
    with torch.cuda.graph(graph):
        for i in range(20):
            target.tensors[0].copy_(originals[i % 2])
            results.append(run(x, target, None, None, None))
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected[i % 2]) for i, result in enumerate(results))
