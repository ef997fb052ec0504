"""Every tuned configuration of wna16_linear's tiles, again and again on a busy GPU: the same bits each time.

One call on an idle device can be right by luck where a kernel races with itself or with its neighbours: what
is not written yet, or overwritten too early, may just hold what it should. So calls come back to back, each
followed by one with another weight, in a captured graph, beside other work. What they write starts as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qsun_kernels import QuantSpec
from qsun_kernels.backends.triton import wna16_linear as implementation
from qsun_kernels.backends.triton.wna16_configs import TilesConfig, tuned
from qsun_kernels.quant import PackedWeight
from qsun_kernels.testing import inputs
from qsun_kernels.testing.judge import judge_wna16_linear

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

REPEATS = 50
LARGEST = 8192
"""Rows and columns of the weights here at most: enough to fill a device, and quickly made and judged."""

TOKENS = sorted({tokens for *_, tokens, _ in tuned()})


def shipped(tokens: int) -> dict[tuple[int, TilesConfig], tuple[int, int]]:
    """The (N, K) of a weight for each (bits, configuration) that the table has for so many tokens."""
    found: dict[tuple[int, TilesConfig], tuple[int, int]] = {}
    for bits, N, K, measured, config in tuned():
        if measured == tokens:
            found.setdefault((bits, config), (min(N, LARGEST), min(K, LARGEST)))
    return found


def random_weight(bits: int, N: int, K: int, source: torch.Generator) -> PackedWeight:
    """Symmetric groups of 128; made on the device of `source`, where every word holds valid codes."""
    device = source.device
    words = torch.randint(
        -(2**31), 2**31, (N, K * bits // 32), dtype=torch.int64, device=device, generator=source
    )
    spread = 2.0 ** (3 * torch.rand(N, K // 128, device=device, generator=source) - 1.5)
    scales = (spread * (4 / (2**bits * K**0.5))).to(torch.bfloat16)
    return PackedWeight(QuantSpec(bits, 128, True), N, K, words.to(torch.int32), scales)


def replays(
    calls: list[Callable[[Tensor], object]], outs: Tensor, scratch: int, times: int
) -> Iterator[Tensor]:
    """outs (repeats, ...), written by `calls` in turn, after each of `times` replays of a graph of them.

    scratch: float32 values of a call's workspace. The graph fills so many with NaN first and frees them, and
    its calls get the same memory.
    """
    for call in calls:
        call(outs[0])
    busy = [torch.randn(2048, 2048, dtype=torch.bfloat16, device=outs.device) for _ in range(3)]
    side = torch.cuda.Stream(outs.device)
    torch.cuda.synchronize(outs.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if scratch:
            torch.empty(scratch, dtype=torch.float32, device=outs.device).fill_(torch.nan)
        for i, out in enumerate(outs):
            calls[i % len(calls)](out)
    for _ in range(times):
        outs.fill_(torch.nan)
        side.wait_stream(torch.cuda.current_stream(outs.device))
        with torch.cuda.stream(side):
            for _ in range(20):
                torch.mm(busy[0], busy[1], out=busy[2])
        graph.replay()
        torch.cuda.synchronize(outs.device)
        yield outs


@pytest.mark.parametrize("tokens", TOKENS)
def test_repeated_calls_give_the_same_bits(device: torch.device, tokens: int) -> None:
    source = torch.Generator(device).manual_seed(tokens)
    made: dict[tuple[int, int, int], list[PackedWeight]] = {}
    for (bits, config), (N, K) in shipped(tokens).items():
        if (bits, N, K) not in made:
            made[bits, N, K] = [random_weight(bits, N, K, source) for _ in range(2)]
        packed = made[bits, N, K]
        weights = [implementation.prepare(one, torch.bfloat16) for one in packed]
        columns = torch.randperm(N, device=device, generator=source)[:512]
        for M in range(max(1, tokens - 1), tokens + 2):
            name = f"W{bits} {N}x{K} M={M} {config}"
            x = inputs.normal(inputs.generator(M), (M, K), torch.bfloat16, device)
            outs = x.new_empty(REPEATS, M, N)

            def multiply(weight: object, out: Tensor, x: Tensor = x, config: TilesConfig = config) -> None:
                implementation.wna16_linear(x, weight, out=out, config=config)

            calls = [lambda out, weight=weight, to=multiply: to(weight, out) for weight in weights]
            scratch = config.splits * M * N if config.splits > 1 else 0
            first: Tensor | None = None
            for got in replays(calls, outs, scratch, times=3):
                if first is None:
                    first = got[:2].clone()
                    for one, weight in zip(first, packed, strict=True):
                        judged = judge_wna16_linear(one, x, weight, columns=columns)
                        assert judged.ok, f"{name}: {judged.report}"
                bits_of = got.view(torch.int16).view(-1, 2, M, N)
                differing = (bits_of != first.view(torch.int16)).any(-1).any(-1).sum().item()
                assert differing == 0, f"{name}: {differing} of {REPEATS} calls differ from the first two"
