"""A norm that one product leaves to the next: what the first writes, what the second makes of it, both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qsun_kernels import (
    norm_may_pend,
    prepare_gate_up,
    prepare_weight,
    wna16_gate_up_silu,
    wna16_linear,
    wna16_linear_pending_norm,
    wna16_linear_rms_norm,
)
from qsun_kernels.backends import cuda
from qsun_kernels.backends.cuda import library, linear, pending_norm
from qsun_kernels.backends.problems import PendingNorm, PreparedWeight
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.quant import PackedWeight, QuantSpec
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_gate_up_silu, judge_wna16_linear

DTYPE = torch.bfloat16
EPS = 1e-5
# (token tiles, row tiles) that up to 16 tokens are streamed with.
INSTANCES = ((1, 2), (1, 4), (2, 2), (2, 4))
SPECS = (QuantSpec(4, 128, True), QuantSpec(2, 32, False), QuantSpec(8, 64, True), QuantSpec(3, 128, False))


def config_of(**settings: Any) -> Any:
    defaults = {"warps": 4, "stages": 2, "row_blocks": 2, "copy_engine": False, "overlaps_producer": False}
    return library.binding.StreamConfig(**{**defaults, **settings})


def prepared(packed: PackedWeight, operator: str = "wna16_linear") -> PreparedWeight:
    return cuda.IMPLEMENTATIONS[operator].prepare(packed, DTYPE)


def random_weight(source, N: int, K: int, spec: QuantSpec, device) -> PackedWeight:
    return inputs.packed_weight(source, N, K, spec, scale_dtype=DTYPE, device=device)


def poisoned(device, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def left(
    x: Tensor, weight: PreparedWeight, residual: Tensor, norm_weight: Tensor, bias: Tensor | None, config: Any
) -> tuple[PendingNorm, Tensor]:
    """The product in front by the streaming kernel, with this configuration."""
    M, N = x.shape[0], weight.N
    stream, weighted = poisoned(x.device, M, N), poisoned(x.device, M, N)
    squares = poisoned(x.device, M, -(-N // 16), dtype=torch.float32)
    norm = linear.Norm(norm_weight, EPS, weighted, squares)
    linear.launch_panels(x, weight, bias, residual, stream, False, config, norm)
    return PendingNorm(weighted, squares, EPS), stream


def taken(
    x: Tensor | PendingNorm,
    weight: PreparedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    config: Any = None,
) -> Tensor:
    """The product behind, with this configuration; of whole rows, too."""
    rows = x if isinstance(x, Tensor) else x.weighted
    halves = 2 if weight.operator == "wna16_gate_up_silu" else 1
    out = poisoned(rows.device, len(rows), weight.N // halves)
    linear.launch_panels(x, weight, bias, residual, out, False, config)
    return out


def sums_of_squares(stream: Tensor) -> Tensor:
    """In the order of the kernel: columns eight apart first, then four, two and one."""
    padded = torch.nn.functional.pad(stream.float(), (0, -stream.shape[1] % 16))
    sums = padded.square().view(len(stream), -1, 16)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


@pytest.mark.parametrize("copy_engine", (False, True), ids=("lanes", "engine"))
@pytest.mark.parametrize(("token_tiles", "row_tiles"), INSTANCES)
def test_what_the_product_in_front_leaves(kernels, token_tiles, row_tiles, copy_engine) -> None:
    """The stream with its own bits, and from it to the bit: rows times weight, and the sums of squares.

    Rows of the weight that 16 and 8 do not divide, blocks of one group of row tiles and of several, one warp,
    several blocks of tokens, columns of x that the copy engine cannot bring.
    """
    K = 300
    for index, (N, row_blocks, warps) in enumerate(((77, 1, 4), (64, 4, 1), (200, 3, 3), (9, 1, 8))):
        source = inputs.generator(index)
        packed = random_weight(source, N, K, SPECS[index], kernels.device)
        weight = prepared(packed)
        config = config_of(
            token_tiles=token_tiles,
            row_tiles=row_tiles,
            row_blocks=row_blocks,
            warps=warps,
            copy_engine=copy_engine,
        )
        norm_weight, bias = (inputs.normal(source, (N,), DTYPE, kernels.device) for _ in range(2))
        for M in (1, 2, 5, 8, 9, 16):
            x = inputs.normal(source, (M, K), DTYPE, kernels.device)
            residual = inputs.normal(source, (M, N), DTYPE, kernels.device, std=30)
            added = bias if M % 2 else None
            norm, stream = left(x, weight, residual, norm_weight, added, config)
            assert torch.equal(stream, taken(x, weight, added, residual, config))
            judge_wna16_linear(stream, x, packed, bias=added, residual=residual).require()
            assert torch.equal(norm.weighted, (stream.float() * norm_weight.float()).to(DTYPE))
            assert torch.equal(norm.squares, sums_of_squares(stream))
            again, _ = left(x, weight, residual, norm_weight, added, config)
            assert torch.equal(again.weighted, norm.weighted) and torch.equal(again.squares, norm.squares)


def pending_rows(source, M: int, K: int, device) -> PendingNorm:
    """Rows and squares as a product might leave them; of rows that differ in size."""
    rows = inputs.normal(source, (M, K), DTYPE, device) * torch.logspace(-2, 2, M, device=device)[:, None]
    rows = rows.to(DTYPE)
    norm_weight = inputs.normal(source, (K,), DTYPE, device)
    return PendingNorm((rows.float() * norm_weight.float()).to(DTYPE), sums_of_squares(rows), EPS)


@pytest.mark.parametrize("copy_engine", (False, True), ids=("lanes", "engine"))
@pytest.mark.parametrize(("token_tiles", "row_tiles"), INSTANCES)
def test_what_the_product_behind_makes_of_it(kernels, token_tiles, row_tiles, copy_engine) -> None:
    """Judged against the norm and the product in float64; more tokens than warps, more warps than tokens."""
    for index, (N, K, warps) in enumerate(((77, 192, 3), (40, 64, 4), (64, 576, 6), (33, 4224, 2))):
        source = inputs.generator(index)
        packed = random_weight(source, N, K, SPECS[index], kernels.device)
        weight = prepared(packed)
        config = config_of(token_tiles=token_tiles, row_tiles=row_tiles, warps=warps, copy_engine=copy_engine)
        bias = inputs.normal(source, (N,), DTYPE, kernels.device)
        for M in (1, 2, 5, 8, 9, 16) if K < 4096 else (3,):
            x = pending_rows(source, M, K, kernels.device)
            residual = inputs.normal(source, (M, N), DTYPE, kernels.device)
            added = {"bias": bias, "residual": residual} if M % 2 else {"bias": None, "residual": None}
            got = taken(x, weight, **added, config=config)
            judge_wna16_linear(got, x, packed, **added).require()
            assert torch.equal(taken(x, weight, **added, config=config), got)


def test_a_root_that_is_a_power_of_two_scales_the_product_exactly(kernels) -> None:
    """Mean squares of 4, 1 and 1 / 16: the bits of a product of rows that were halved, kept, quadrupled."""
    N, K = 50, 320
    source = inputs.generator(3)
    weight = prepared(random_weight(source, N, K, SPECS[0], kernels.device))
    rows = inputs.normal(source, (3, K), DTYPE, kernels.device)
    means = torch.tensor([[4.0], [1.0], [1 / 16]], device=kernels.device)
    x = PendingNorm(rows, (16 * means).expand(3, K // 16).contiguous(), 0.0)
    whole = rows / means.sqrt().to(DTYPE)
    for token_tiles, row_tiles in INSTANCES:
        config = config_of(token_tiles=token_tiles, row_tiles=row_tiles)
        assert torch.equal(taken(x, weight, config=config), taken(whole, weight, config=config))
    # eps is added to the mean
    shifted = PendingNorm(rows, x.squares / 2, 2.0)
    expected = rows[:1] / torch.tensor([[2.0]], device=kernels.device).to(DTYPE)
    assert torch.equal(taken(shifted, weight, config=config)[:1], taken(expected, weight, config=config))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gate_and_up_are_both_scaled(kernels, spec) -> None:
    for half, K in ((40, 320), (21, 192)):
        source = inputs.generator(half)
        packed = random_weight(source, 2 * half, K, spec, kernels.device)
        weight = prepared(packed, "wna16_gate_up_silu")
        for M in (1, 8, 16):
            x = pending_rows(source, M, K, kernels.device)
            judge_wna16_gate_up_silu(taken(x, weight), x, packed).require()
            for token_tiles, row_tiles in INSTANCES:
                config = config_of(token_tiles=token_tiles, row_tiles=row_tiles)
                judge_wna16_gate_up_silu(taken(x, weight, config=config), x, packed).require()


@pytest.mark.parametrize("M", (1, 4, 8, 16))
def test_two_products_and_the_norm_between_them(kernels, M) -> None:
    """By the launchers, in the library's own configurations, for sizes of a decoder's layer on a GPU."""
    H, F = kernels.pick((4096, 14336), (576, 256))
    source = inputs.generator(M)
    spec = QuantSpec(4, 128, True)
    first = random_weight(source, H, F, spec, kernels.device)
    second = random_weight(source, kernels.pick(6144, 200), H, spec, kernels.device)
    gate_up = random_weight(source, 2 * F, H, spec, kernels.device)
    x = inputs.normal(source, (M, F), DTYPE, kernels.device)
    residual = inputs.normal(source, (M, H), DTYPE, kernels.device)
    norm_weight = inputs.normal(source, (H,), DTYPE, kernels.device)
    with inputs.poisoned_outputs():
        norm, stream = pending_norm.leave(x, prepared(first), residual, norm_weight, EPS, None)
        judge_wna16_linear(stream, x, first, residual=residual).require()
        assert torch.equal(norm.squares, sums_of_squares(stream))
        got = pending_norm.take(norm, prepared(second), None, None, None)
        judge_wna16_linear(got, norm, second).require()
        gated = pending_norm.take(norm, prepared(gate_up, "wna16_gate_up_silu"), None, None, None)
        judge_wna16_gate_up_silu(gated, norm, gate_up).require()


@pytest.mark.gpu
def test_the_operators_follow_the_library(device) -> None:
    """Where the library says that a norm may be left, it is, and comes to what whole norms come to."""
    source, spec = inputs.generator(0), QuantSpec(4, 128, True)
    sizes = ((4096, 14336), (6144, 4096), (28672, 4096))
    packed = [random_weight(source, N, K, spec, device) for N, K in sizes]
    down, qkv = (prepare_weight(one, dtype=DTYPE, backend="cuda") for one in packed[:2])
    gate_up = prepare_gate_up(packed[2], dtype=DTYPE, backend="cuda")
    norm_weight = inputs.normal(source, (4096,), DTYPE, device)
    props = library.device_props(device.index or 0)
    taken_rows = set()
    for M in range(1, 18):
        x = inputs.normal(source, (M, 14336), DTYPE, device)
        residual = inputs.normal(source, (M, 4096), DTYPE, device)
        for reader, operator, judge, second in (
            (qkv, wna16_linear, judge_wna16_linear, packed[1]),
            (gate_up, wna16_gate_up_silu, judge_wna16_gate_up_silu, packed[2]),
        ):
            streams = all(
                library.binding.describe_wna16_panels(
                    M, one.N, one.K, 4, 1, False, False, props, in_layer=True
                ).startswith("stream ")
                for one in (down, reader)
            )
            assert norm_may_pend(M, down, reader) == (streams and M <= 16)
            if not norm_may_pend(M, down, reader):
                continue
            taken_rows.add(M)
            norm, stream = wna16_linear_pending_norm(x, down, residual, norm_weight, eps=EPS)
            judge_wna16_linear(stream, x, packed[0], residual=residual).require()
            assert torch.equal(norm.squares, sums_of_squares(stream))
            judge(operator(norm, reader), norm, second).require()
            whole, same = wna16_linear_rms_norm(x, down, residual, norm_weight, eps=EPS)
            assert torch.equal(same, stream)
            apart = (operator(norm, reader).float() - operator(whole, reader).float()).norm()
            assert apart <= 0.02 * operator(whole, reader).float().norm()
    assert {1, 2, 4, 8} <= taken_rows


@pytest.mark.gpu
@pytest.mark.parametrize("M", (1, 2, 4, 8, 16))
def test_a_chain_in_a_graph_repeats(device, M) -> None:
    """Products that overlap one another, many times, with the bits of calls that wait for each other.

    Where the library would not stream, norms are left all the same: what may be asked for has to be right.
    """
    H, F = 4096, 14336
    source, spec = inputs.generator(M), QuantSpec(4, 128, True)
    down = prepared(random_weight(source, H, F, spec, device))
    gate_up = prepared(random_weight(source, 2 * F, H, spec, device), "wna16_gate_up_silu")
    norm_weight = inputs.normal(source, (H,), DTYPE, device)
    x = inputs.normal(source, (M, F), DTYPE, device)
    start = inputs.normal(source, (M, H), DTYPE, device)

    def chain(wait: bool) -> list[Tensor]:
        gated, stream, results = x, start, []
        for _ in range(6):
            norm, stream = pending_norm.leave(gated, down, stream, norm_weight, EPS, None)
            if wait:
                torch.cuda.synchronize()
            gated = pending_norm.take(norm, gate_up, None, None, None)
            if wait:
                torch.cuda.synchronize()
            results += [norm.weighted, norm.squares, stream, gated]
        return results

    expected = chain(True)
    assert all(tensor.isfinite().all() for tensor in expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(20):
        for tensor in got:
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "7"])
@pytest.mark.parametrize("copy_engine", (False, True), ids=("lanes", "engine"))
def test_what_is_read_before_the_launch_in_front_has_ended(
    emulated_kernels, guard, monkeypatch, copy_engine, order
) -> None:
    """Rows, squares and residual only behind it, whatever block and thread comes first."""
    monkeypatch.setenv("QSUN_EMULATOR_ORDER", order)
    source = inputs.generator(5)
    first = prepared(random_weight(source, 192, 256, SPECS[0], emulated_kernels.device))
    second = prepared(random_weight(source, 72, 192, SPECS[0], emulated_kernels.device))
    x = inputs.normal(source, (9, 256), DTYPE)
    residual, norm_weight = inputs.normal(source, (9, 192), DTYPE), inputs.normal(source, (192,), DTYPE)
    config = config_of(token_tiles=2, row_tiles=2, copy_engine=copy_engine, overlaps_producer=True)
    norm, stream = left(x, first, residual, norm_weight, None, config)
    expected = taken(norm, second, config=config)
    for tensor in (x, residual, norm.weighted, norm.squares):
        guard(tensor)
    again, same = left(x, first, residual, norm_weight, None, config)
    assert torch.equal(same, stream) and torch.equal(again.weighted, norm.weighted)
    assert torch.equal(again.squares, norm.squares)
    assert torch.equal(taken(norm, second, config=config), expected)


@pytest.mark.slow
def test_what_cannot_be_left_or_taken_is_refused(emulated_kernels) -> None:
    """By the library, with the name of what is wrong."""
    source, cpu = inputs.generator(0), torch.device("cpu")
    weight = prepared(random_weight(source, 64, 128, SPECS[0], cpu))
    x, residual = inputs.normal(source, (17, 128), DTYPE), inputs.normal(source, (17, 64), DTYPE)
    norm_weight = inputs.normal(source, (64,), DTYPE)
    auto = None
    with pytest.raises(KernelLaunchError, match="squares is given with M=17; expected null above 16 tokens"):
        left(x, weight, residual, norm_weight, None, auto)
    with pytest.raises(KernelLaunchError, match="x_squares is given with M=17"):
        taken(PendingNorm(x, torch.ones(17, 8), EPS), weight)
    two = PendingNorm(x[:2], torch.ones(2, 8), EPS)
    gemm = library.binding.GemmConfig(
        token_tile=16, warp_groups=1, split_k=1, stages=2, adds_in_cluster=False
    )
    tiles = library.binding.TilesConfig(
        token_tiles=2, row_groups=2, column_groups=2, split_k=1, stages=2, overlaps_producer=False
    )
    with pytest.raises(KernelLaunchError, match="x_squares is given; expected null for this kernel"):
        taken(two, weight, config=tiles)
    with pytest.raises(KernelLaunchError, match="squares is given; expected null for this kernel"):
        left(x[:2], weight, residual[:2], norm_weight, None, tiles)
    with pytest.raises(KernelLaunchError, match=r"wgmma|squares is given"):
        taken(two, weight, config=gemm)
    with pytest.raises(KernelLaunchError, match="x_squares is misaligned"):
        taken(PendingNorm(x[:2], torch.ones(17)[1:].view(2, 8), EPS), weight)
    narrow = prepared(random_weight(source, 64, 96, QuantSpec(4, 32, True), cpu))
    with pytest.raises(KernelLaunchError, match="K is 96; expected a multiple of 64"):
        taken(PendingNorm(x[:2, :96], torch.ones(2, 6), EPS), narrow)
    half = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(
        inputs.packed_weight(source, 64, 128, SPECS[0], scale_dtype=torch.float16), torch.float16
    )
    with pytest.raises(KernelLaunchError, match=r"x_squares is given with dtype float16"):
        taken(PendingNorm(x[:2].half(), torch.ones(2, 8), EPS), half)


def test_what_the_launchers_can_do_is_said_before() -> None:
    source = inputs.generator(1)
    spec = QuantSpec(4, 32, True)
    plain = prepared(random_weight(source, 64, 64, spec, torch.device("cpu")))
    assert pending_norm.cannot_leave(plain) is None and pending_norm.cannot_take(plain) is None
    half = cuda.IMPLEMENTATIONS["wna16_linear"].prepare(
        inputs.packed_weight(source, 64, 64, spec, scale_dtype=torch.float16), torch.float16
    )
    for reason in (pending_norm.cannot_leave(half), pending_norm.cannot_take(half)):
        assert reason is not None and "dtype is torch.float16, expected torch.bfloat16" in reason
    narrow = prepared(random_weight(source, 64, 96, spec, torch.device("cpu")))
    assert pending_norm.cannot_leave(narrow) is None
    assert "K is 96, expected a multiple of 64" in str(pending_norm.cannot_take(narrow))
    ordered = prepared(inputs.packed_weight(source, 64, 64, spec, scale_dtype=DTYPE, act_order=True))
    assert pending_norm.cannot_leave(ordered) is None
    assert "act-order" in str(pending_norm.cannot_take(ordered))
