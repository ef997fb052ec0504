"""What `qsun-bench tune` does on the GPU: compile ahead, check, stress and time one configuration."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor

from qsun_bench.cases import generator
from qsun_bench.random_weights import random_packed_weight
from qsun_bench.tune_reference import error_of, float32_product
from qsun_kernels.backends.problems import PreparedWeight
from qsun_kernels.backends.triton import wna16_linear as implementation
from qsun_kernels.backends.triton import wna16_tiles
from qsun_kernels.backends.triton.launch import next_power_of_two
from qsun_kernels.backends.triton.wna16_configs import TilesConfig
from qsun_kernels.backends.triton.wna16_layout import COLUMNS, LAYOUT, TILE_ROWS, TILE_WORDS, chunk_columns
from qsun_kernels.errors import KernelLaunchError
from qsun_kernels.quant import Bits, QuantSpec
from qsun_kernels.testing.timing import copies_to_overflow, time_calls

Job = tuple[int, int, int, int, TilesConfig]
"""bits, M, N, K and how to cut it."""

_GROUP_SIZE: Final = 128
_DTYPE = torch.bfloat16

_GLANCE_US = 250.0
_CALLS = 40
_REPLAYS = 3


def name(device: torch.device) -> str:
    """The device as its driver names it, for the table's docstring."""
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ")


def why_lost(device: torch.device) -> str | None:
    """Why nothing more can run on the device; None when it can."""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return f"the CUDA context is broken ({str(error).splitlines()[0]})"
    return None


def compile_ahead(jobs: Sequence[Job], device: torch.device, *, seconds: float) -> None:
    """Put the kernels of `jobs` into Triton's cache on disk, in several processes, for at most `seconds`.

    What does not get there, or fails, is compiled (or fails, with its reason) where it is first called.
    """
    distinct = list({_kernel_key(*job): job for job in jobs}.values())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(16, os.cpu_count() or 1), context, initializer=_compile_only)
    try:
        futures = [pool.submit(_compile, job, device.index or 0) for job in distinct]
        done, _ = wait(futures, timeout=seconds)
        compiled = sum(future.exception() is None and future.result() for future in done)
    except BrokenProcessPool:
        compiled = 0
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{compiled} of {len(distinct)} kernels compiled ahead", file=sys.stderr)


def _kernel_key(bits: int, M: int, N: int, K: int, config: TilesConfig) -> tuple[object, ...]:
    """What makes another kernel of a job: sizes and strides are multiples of 16 here, one case to Triton."""
    lines = 0
    if config.prefetch:
        lines_a_split = -(-K * bits // (64 * config.splits))
        lines = min(next_power_of_two(lines_a_split), config.prefetch)
    even = K % (config.slices * config.step_k) == 0
    # The number of splits is an argument, except to the small kernel that adds them up.
    return bits, replace(config, splits=min(config.splits, 2), prefetch=lines), even


def _compile_only() -> None:
    """Make every launch in this process a compilation: it is a worker's, and has nothing to launch."""
    kernels: Any = type(wna16_tiles.wna16_linear_kernel)
    launch = kernels.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    kernels.run = run


def _compile(job: Job, index: int) -> bool:
    """Whether a job's kernels compiled."""
    bits, M, N, K, config = job
    device = torch.device("cuda", index)
    x = torch.empty((M, K), dtype=_DTYPE, device=device)
    try:
        implementation.wna16_linear(x, _hollow_weight(bits, N, K, device), config=config)
    except KernelLaunchError:
        return False
    return True


def _hollow_weight(bits: int, N: int, K: int, device: torch.device) -> PreparedWeight:
    """A prepared weight of the right shapes without the memory behind it."""
    words = torch.zeros(TILE_WORDS, dtype=torch.int32, device=device)
    tiles, blocks = -(-N // TILE_ROWS), -(-K // COLUMNS)
    tensors = (
        words.expand(tiles, blocks * COLUMNS // chunk_columns(bits), TILE_WORDS),
        words[:8].expand(tiles, blocks * COLUMNS // _GROUP_SIZE, 8),
    )
    return PreparedWeight(_spec(bits), N, K, _DTYPE, "triton", LAYOUT, tensors)


def _spec(bits: int) -> QuantSpec:
    return QuantSpec(cast("Bits", bits), _GROUP_SIZE, True)


class DeviceTrials:
    """A random weight with as many copies as overflow the cache, activations, and what is right for them."""

    def __init__(self, bits: int, N: int, K: int, most_tokens: int, device: torch.device) -> None:
        source = generator(device, "tune", bits, N, K)
        packed = random_packed_weight(N, K, _spec(bits), _DTYPE, source)
        first = implementation.prepare(packed, _DTYPE)
        self._x = torch.randn(most_tokens, K, device=device, generator=source).to(_DTYPE)
        self._reference = float32_product(self._x, packed)
        del packed
        more = copies_to_overflow(first.nbytes, device) - 1
        clones = [replace(first, tensors=tuple(t.clone() for t in first.tensors)) for _ in range(more)]
        self._copies = [first, *clones]
        self._guess_us = first.nbytes / 2.5e6
        # `clone` returns before it has written, and the kernel may read a weight early.
        torch.cuda.synchronize(device)

    def check(self, tokens: int, config: TilesConfig) -> str | None:
        out, calls = self._calls(tokens, config)
        out.fill_(math.nan)
        calls[0]()
        got = out.clone()
        out.fill_(math.nan)
        calls[-1]()
        return self._error(got) or (None if torch.equal(got, out) else "does not repeat")

    def stress(self, tokens: int, config: TilesConfig) -> str | None:
        first = self._copies[0]
        words, *others = first.tensors
        weights = (first, replace(first, tensors=(words.roll(1, 0), *others)))
        x = self._x[:tokens]
        outs = x.new_empty(_CALLS, tokens, first.N)
        torch.cuda.synchronize(x.device)
        for weight in weights:
            implementation.wna16_linear(x, weight, out=outs[0], config=config)
        left, right, product = (torch.randn(2048, 2048, device=x.device).to(_DTYPE) for _ in range(3))
        side = torch.cuda.Stream(x.device)
        torch.cuda.synchronize(x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if config.splits > 1:
                # Freed at once: the calls get the same memory for their sums.
                torch.empty(config.splits * tokens * first.N, device=x.device).fill_(math.nan)
            for i, out in enumerate(outs):
                implementation.wna16_linear(x, weights[i % 2], out=out, config=config)
        seen: Tensor | None = None
        for _ in range(_REPLAYS):
            outs.fill_(math.nan)
            side.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(side):
                for _ in range(20):
                    torch.mm(left, right, out=product)
            graph.replay()
            torch.cuda.synchronize(x.device)
            if seen is None:
                seen = outs[:2].clone()
                if seen.isnan().any():
                    return "on a busy device: not all is written"
                if (error := self._error(seen[0])) is not None:
                    return f"on a busy device: {error}"
            pairs = outs.view(torch.int16).view(-1, 2, tokens, first.N)
            if differing := int((pairs != seen.view(torch.int16)).any(-1).any(-1).sum()):
                return f"on a busy device: {differing} of {_CALLS} calls do not repeat"
        return None

    def glance(self, tokens: int, config: TilesConfig) -> float:
        _, calls = self._calls(tokens, config)
        rounds = math.ceil(_GLANCE_US / (max(3.0, self._guess_us) * len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        samples = []
        for _ in range(4):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(float(start.elapsed_time(end)))
        return statistics.median(samples[1:]) * 1e3 / (rounds * len(calls))

    def time(self, tokens: int, config: TilesConfig) -> float:
        _, calls = self._calls(tokens, config)
        streamed = [copy.tensors for copy in self._copies]
        return time_calls(calls, streamed, device=self._x.device, seconds=0.05).us

    def _calls(self, tokens: int, config: TilesConfig) -> tuple[Tensor, Sequence[Callable[[], object]]]:
        """The output that all write, and a call for each copy of the weight."""
        x = self._x[:tokens]
        out = x.new_empty(tokens, self._copies[0].N)

        def call_with(weight: PreparedWeight) -> Callable[[], object]:
            return lambda: implementation.wna16_linear(x, weight, out=out, config=config)

        return out, [call_with(weight) for weight in self._copies]

    def _error(self, got: Tensor) -> str | None:
        return error_of(got, self._reference[: len(got)])
