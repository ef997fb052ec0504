"""How long an operator takes when its weights or its KV come from memory, and how fast that memory is.

What makes a small kernel look faster than it is, and what is done about it here:

    a warm cache         every call reads another copy; the copies together exceed the last-level cache
                         OVERFLOW times, counted on the storages; a rotation is always replayed whole
    overlap on one copy  at least two copies, so two neighbouring launches never read the same bytes
    zeros                constant operands are refused: they draw less power and let the chip clock higher
    the launch           on CUDA a graph is replayed: no Python, allocator or driver in the figure
    a zeroed buffer      nothing is written between calls: its dirty lines would slow the next one
    one lucky run        the median of samples taken after a warm-up of fixed length

On the CPU each call is timed by `perf_counter`, over copies that exceed the last-level cache as well.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qsun_kernels.testing.stream_read import PATTERNS, ReadPattern, StreamRead, granule_bytes

Method = Literal["cuda-graph", "cpu", "wall"]

OVERFLOW = 3
MAX_COPIES = 8192

# A graph this long makes the gap between two replays (about 2 us) disappear in the figure.
_GRAPH_US = 4000.0
_GRAPH_LAUNCHES = 16384
_WARM_UP_S = 0.1
_CPU_SAMPLE_S = 50e-6
_MIN_SAMPLES = 7
_PROBE_BYTES = 4 << 30
_CPU_CACHE_WHEN_UNKNOWN = 64 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """us: median microseconds a call. spread: interquartile range over the median. samples: samples taken.

    calls: calls a sample. copies: distinct copies of the streamed operands. method: how the clock was read.
    """

    us: float
    spread: float
    samples: int
    calls: int
    copies: int
    method: Method


def last_level_cache_bytes(device: torch.device) -> int:
    """The size of the cache in front of memory: L2 on CUDA, the last level that this process's CPUs share.

    Where the CPU does not tell, 64 MiB.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache_bytes(Path("/sys/devices/system/cpu")) or _CPU_CACHE_WHEN_UNKNOWN


def _cpu_cache_bytes(root: Path) -> int:
    """The distinct caches of the highest level, added up, from Linux's sysfs; 0 where it says nothing."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    levels: dict[int, dict[str, int]] = {}
    for entry in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            kind = (entry / "type").read_text().strip()
            level = int((entry / "level").read_text())
            size = (entry / "size").read_text().strip()
            shared = (entry / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and size[:-1].isdigit() and size[-1] in units:
            levels.setdefault(level, {})[shared] = int(size[:-1]) * units[size[-1]]
    return sum(levels[max(levels)].values()) if levels else 0


def copies_to_overflow(bytes_per_copy: int, device: torch.device) -> int:
    """How many copies of `bytes_per_copy` bytes exceed the last-level cache OVERFLOW times; at least 2.

    Raises ValueError when that takes more than MAX_COPIES: so small an operand lives in the cache in any
    real use, and a figure for it read from memory would describe nothing.
    """
    if bytes_per_copy < 1:
        raise ValueError(f"bytes_per_copy is {bytes_per_copy}, expected at least 1")
    cache = last_level_cache_bytes(device)
    copies = max(2, math.ceil(OVERFLOW * cache / bytes_per_copy))
    if copies > MAX_COPIES:
        raise ValueError(
            f"bytes_per_copy is {bytes_per_copy}: overflowing {cache} bytes of cache {OVERFLOW} times takes "
            f"{copies} copies, expected at most {MAX_COPIES}"
        )
    return copies


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage counted once however many views share it."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def check_rotation(streamed: Sequence[Sequence[Tensor]], device: torch.device) -> None:
    """Refuse operands whose timing would not describe reads from memory.

    streamed: for every copy, the tensors that its call reads.
    Raises ValueError when there are fewer than two copies, when their distinct storages do not exceed the
    last-level cache OVERFLOW times, or when a tensor of 4 KiB or more holds one value only.
    """
    if len(streamed) < 2:
        raise ValueError(f"streamed has {len(streamed)} copies, expected at least 2")
    total = distinct_bytes(tensor for copy in streamed for tensor in copy)
    cache = last_level_cache_bytes(device)
    if total < OVERFLOW * cache:
        raise ValueError(
            f"streamed holds {total} distinct bytes in {len(streamed)} copies, expected at least {OVERFLOW} "
            f"times the {cache} bytes of last-level cache of {device}: this would time a warm cache"
        )
    for i, copy in enumerate(streamed):
        for tensor in copy:
            if tensor.nbytes >= 4096 and _is_constant(tensor):
                raise ValueError(
                    f"streamed[{i}] holds a {tuple(tensor.shape)} {tensor.dtype} tensor of one repeated "
                    "value, expected random data: constant data runs faster"
                )


def _is_constant(tensor: Tensor) -> bool:
    flat = tensor.detach().reshape(-1)
    if flat.dtype.itemsize == 1:
        flat = flat.view(torch.uint8)  # codes: not every device compares them as numbers
    sample = flat[:: max(1, flat.numel() // 1024)]
    return bool((sample == sample[0]).all())


def time_calls(
    calls: Sequence[Callable[[], object]],
    streamed: Sequence[Sequence[Tensor]],
    *,
    device: torch.device,
    seconds: float = 0.4,
) -> Timing:
    """Time one operator whose operands rotate over copies.

    calls: one closure a copy; each runs the operator once on its own copy.
    streamed: one entry a copy; the tensors that call reads and that must come from memory.
    seconds: about how long to measure, after the warm-up.
    Raises ValueError as `check_rotation` does, and when the two sequences differ in length.
    """
    if len(calls) != len(streamed):
        raise ValueError(f"calls has {len(calls)} entries, expected {len(streamed)} as in streamed")
    check_rotation(streamed, device)
    if device.type == "cuda":
        return _time_graph(calls, device, seconds)
    return _time_cpu(calls, seconds)


def _summary(
    samples: Sequence[float], calls: int, copies: int, method: Literal["cuda-graph", "cpu", "wall"]
) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, median, median)
    return Timing(median * 1e6, (high - low) / median, len(samples), calls, copies, method)


def _time_graph(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> Timing:
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        # Whatever a first call sets up (a compilation, an attribute, a workspace) must not happen in capture.
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)

        graph = _capture(calls, 1)
        one_round = min(_replay_s(graph) for _ in range(3))
        rounds = max(1, math.ceil(_GRAPH_US * 1e-6 / one_round))
        rounds = min(rounds, max(1, _GRAPH_LAUNCHES // len(calls)))
        if rounds > 1:
            graph = _capture(calls, rounds)
        launches = rounds * len(calls)
        spent = 0.0
        while spent < _WARM_UP_S:
            spent += _replay_s(graph)
        per_replay = _replay_s(graph)
        samples = [
            _replay_s(graph) / launches
            for _ in range(min(200, max(_MIN_SAMPLES, round(seconds / per_replay))))
        ]
        return _summary(samples, launches, len(calls), "cuda-graph")


def _capture(calls: Sequence[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _time_cpu(calls: Sequence[Callable[[], object]], seconds: float) -> Timing:
    begin = time.perf_counter()
    for call in calls:
        call()
    one_call = max(1e-9, (time.perf_counter() - begin) / len(calls))
    # Short calls are timed in groups, or the clock itself would be part of the figure.
    group = min(len(calls), max(1, math.ceil(_CPU_SAMPLE_S / one_call)))
    samples: list[float] = []
    position = 0
    warm_until = time.perf_counter() + _WARM_UP_S
    end = warm_until + seconds
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < end:
        chosen = [calls[(position + j) % len(calls)] for j in range(group)]
        position += group
        begin = time.perf_counter()
        for call in chosen:
            call()
        done = time.perf_counter()
        if begin >= warm_until:
            samples.append((done - begin) / group)
    return _summary(samples, group, len(calls), "cpu")


def time_steps(step: Callable[[], object], *, device: torch.device, count: int, warm_up: int = 3) -> Timing:
    """Time a step that cannot be captured by a caller (it synchronises, or replays graphs of its own).

    step: run once a sample, `warm_up + count` times; the device is idle before and after each.
    The figure is host wall clock, launches included, which is what a user of the step waits for.
    """
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    samples: list[float] = []
    for i in range(warm_up + count):
        _synchronize(device)
        begin = time.perf_counter()
        step()
        _synchronize(device)
        if i >= warm_up:
            samples.append(time.perf_counter() - begin)
    return _summary(samples, 1, 1, "wall")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_bandwidth(device: torch.device, *, probe_bytes: int | None = None) -> float:
    """Bytes a second of a read-only stream over a buffer far larger than the cache; the floor's denominator.

    On CUDA: `StreamRead` over 4 GiB (or a quarter of the free memory) in several access patterns, the fastest
    pass of all, after checking that the kernel's sum is that of the data. The fastest, not the median: a
    share of this figure must not exceed one because the machine was busy while it was taken.
    On the CPU: the fastest of several torch reductions over 8 times the last-level cache with the threads
    torch uses; no reduction reads faster than the memory, so this is a lower bound of the true figure.

    probe_bytes: the size of the buffer; by default as above.
    """
    cache = last_level_cache_bytes(device)
    if device.type == "cuda":
        return _read_bandwidth_cuda(device, cache, probe_bytes)
    size = probe_bytes or max(8 * cache, 256 << 20)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (size // 4,), dtype=torch.int32)
    floats = words.view(torch.float32).nan_to_num_()
    reductions: tuple[Callable[[], object], ...] = (words.max, words.sum, floats.max, floats.sum)
    best = math.inf
    for reduction in reductions:
        for _ in range(3):
            begin = time.perf_counter()
            reduction()
            best = min(best, time.perf_counter() - begin)
    return words.nbytes / best


def _read_bandwidth_cuda(device: torch.device, cache: int, probe_bytes: int | None) -> float:
    with torch.cuda.device(device):
        free, _ = torch.cuda.mem_get_info(device)
        size = probe_bytes or min(_PROBE_BYTES, free // 4)
        granule = granule_bytes(device)
        if size < 8 * cache or size < granule:
            raise ValueError(f"probe_bytes is {size}, expected at least 8 times the cache of {cache} bytes")
        buffer = torch.empty(size // granule * (granule // 4), dtype=torch.int32, device=device)
        buffer.random_(-(1 << 31), (1 << 31) - 1)
        expected = int(buffer.sum()) % (1 << 32)
        best = min(_fastest_pass(buffer, pattern, expected) for pattern in PATTERNS)
        return buffer.nbytes / best


def _fastest_pass(buffer: Tensor, pattern: ReadPattern, expected: int) -> float:
    """Seconds of the fastest of ten passes; RuntimeError when a pass did not read every byte."""
    read = StreamRead(buffer, pattern)
    best = math.inf
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        read.launch()
        end.record()
        end.synchronize()
        best = min(best, float(start.elapsed_time(end)) * 1e-3)
    got = int(read.sums.sum()) % (1 << 32)
    if got != expected:
        raise RuntimeError(
            f"stream_read added up to {got}, expected {expected}: not every byte was read ({pattern})"
        )
    return best
