"""What `qsun-bench tune wna16 --backend cuda` does on the GPU: launch as told, check and time."""

from __future__ import annotations

import datetime
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from qsun_bench import panel_ways
from qsun_bench.cases import generator
from qsun_bench.panel_ways import Cell, Kernel, Machine, Way
from qsun_bench.random_weights import random_packed_weight
from qsun_bench.tune_panels import LOAD_MS
from qsun_bench.tune_reference import error_of, float32_product
from qsun_kernels.backends.cuda import library, linear
from qsun_kernels.backends.problems import LinearOperator, PreparedWeight
from qsun_kernels.quant import Bits, PackedWeight, QuantSpec
from qsun_kernels.testing.timing import copies_to_overflow

DTYPE = torch.bfloat16

_GLANCE_US, _REFINE_US = 1500.0, 2000.0  # about how long a row of launches is
_GLANCE_MS = 4.0
_WARM_MS, _TIMED_MS, _PASSES = 15.0, 20.0, 2


def why_not() -> str | None:
    """Why this machine cannot tune; None when it can."""
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}, and tuning is timing on a GPU"
    if (reason := library.unavailable()) is not None:
        return reason
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := library.refuse(device, dtype=DTYPE)) is not None:
        return reason
    if torch.cuda.get_device_capability(device) != (9, 0) or "90a" not in str(library.build_info()["archs"]):
        return "the table of choices is for sm_90a, expected such a GPU and a library built for it"
    return None


def machine(device: torch.device) -> Machine:
    """What candidates depend on, of this GPU and the library as it is built."""
    return machine_of(library.device_props(device.index or 0))


def machine_of(props: library.binding.DeviceProps) -> Machine:
    """The same of a GPU with these properties."""
    before_sm90 = library.binding.DeviceProps(
        compute_major=8,
        compute_minor=0,
        sm_count=props.sm_count,
        shared_memory_per_block=panel_ways.SM80_SHARED_MEMORY,
        l2_bytes=props.l2_bytes,
    )

    def shared_bytes(kernel: Kernel, cell: Cell, way: Way) -> int:
        needed: int = library.binding.wna16_panels_shared_bytes(
            cell.M, cell.N, cell.K, cell.bits, 1, False, config(kernel, cell, way, props.sm_count)
        )
        return needed

    def estimate(cell: Cell) -> Way:
        chosen = library.binding.choose_wna16_tiles(cell.M, cell.N, cell.K, cell.bits, 1, False, before_sm90)
        return tuple(getattr(chosen, name) for name in panel_ways.fields("tiles_sm80"))

    return Machine(
        props.sm_count,
        props.shared_memory_per_block,
        library.binding.wna16_gemm_tiles(),
        shared_bytes,
        estimate,
    )


def config(
    kernel: Kernel, cell: Cell, way: Way, sm_count: int
) -> library.binding.StreamConfig | library.binding.GemmConfig | library.binding.TilesConfig:
    """The library's configuration for a way."""
    made_of = panel_ways.settings(kernel, cell, way, sm_count)
    if kernel == "tiles_sm80":
        return library.binding.TilesConfig(**made_of)
    if kernel == "gemm_sm90":
        return library.binding.GemmConfig(**made_of)
    return library.binding.StreamConfig(**made_of)


def where(device: torch.device) -> str:
    """Device and date, for the head of a file."""
    return f"{torch.cuda.get_device_name(device)}, {datetime.date.today().isoformat()}"


def _random_weight(cell: Cell, source: torch.Generator) -> PackedWeight:
    return random_packed_weight(cell.N, cell.K, QuantSpec(cast(Bits, cell.bits), 128, True), DTYPE, source)


def _source(cell: Cell, device: torch.device) -> torch.Generator:
    return generator(device, "tune", cell.bits, cell.N, cell.K)


def weight_copies(
    cell: Cell, operator: LinearOperator, count: int | None, device: torch.device
) -> Sequence[PreparedWeight]:
    """A random weight of the cell's size and width in so many copies, or as many as overflow the cache."""
    packed = _random_weight(cell, _source(cell, device))
    prepare = linear.prepare_gate_up if operator == "wna16_gate_up_silu" else linear.prepare
    first = prepare(packed, DTYPE)
    more = (copies_to_overflow(first.nbytes, device) if count is None else count) - 1
    return [first, *(replace(first, tensors=tuple(t.clone() for t in first.tensors)) for _ in range(more))]


class RowTrials:
    """One weight with as many copies as overflow the cache, activations, and what is right for them."""

    def __init__(self, cell: Cell, most_tokens: int, device: torch.device) -> None:
        source = _source(cell, device)
        packed = _random_weight(cell, source)
        self._x = torch.randn(most_tokens, cell.K, device=device, generator=source).to(DTYPE)
        self._reference = float32_product(self._x, packed)
        del packed
        self._weights = weight_copies(cell, "wna16_linear", None, device)
        self._sm_count = library.device_props(device.index or 0).sm_count
        # `clone` returns before it has written, and the kernels read a weight early.
        torch.cuda.synchronize(device)

    def check(self, kernel: Kernel, cell: Cell, way: Way) -> str | None:
        out, calls = self._calls(kernel, cell, way)
        out.fill_(math.nan)
        calls[0]()
        got = out.clone()
        out.fill_(math.nan)
        calls[-1]()
        return error_of(got, self._reference[: cell.M]) or (
            None if torch.equal(got, out) else "does not repeat"
        )

    def glance(self, kernel: Kernel, cell: Cell, way: Way) -> float:
        row = Row(self._calls(kernel, cell, way)[1], _GLANCE_US)
        return row.run(_GLANCE_MS)

    def refine(self, kernel: Kernel, cell: Cell, ways: Sequence[Way]) -> Sequence[float]:
        rows = [Row(self._calls(kernel, cell, way)[1], _REFINE_US) for way in ways]
        return _in_turn(rows)

    def _calls(self, kernel: Kernel, cell: Cell, way: Way) -> tuple[Tensor, Sequence[Callable[[], object]]]:
        """The output that all write, and a call for each copy of the weight."""
        x, told = self._x[: cell.M], config(kernel, cell, way, self._sm_count)
        out = x.new_empty(cell.M, cell.N)

        def call_with(weight: PreparedWeight) -> Callable[[], object]:
            return lambda: linear.launch_panels(x, weight, None, None, out, False, told)

        return out, [call_with(weight) for weight in self._weights]


class Row:
    """A graph of the calls, again and again until it takes about `us`.

    calls: how many there are.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], us: float) -> None:
        # What is refused, or set up at a first call, must not be so in the middle of a capture.
        for call in calls:
            call()
        once = self._captured(calls, 1)
        one_round = min(_replay_ms(once) for _ in range(2)) * 1e3
        rounds = max(1, math.ceil(us / one_round))
        self._graph = self._captured(calls, rounds) if rounds > 1 else once
        self.calls = len(calls)
        self._launches = rounds * self.calls

    @staticmethod
    def _captured(calls: Sequence[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        # Without torch.cuda.graph(), which empties the allocator's cache first: thousands are captured here.
        # A collection in the middle could end an older graph, which is not allowed there.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(side):
                graph.capture_begin(pool=_keeper().pool())
                try:
                    for _ in range(rounds):
                        for call in calls:
                            call()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def run(self, ms: float) -> float:
        """Median microseconds a call over at least so many milliseconds, and five replays."""
        samples: list[float] = []
        while len(samples) < 5 or sum(samples) < ms:
            samples.append(_replay_ms(self._graph))
        return statistics.median(samples) * 1e3 / self._launches


@cache
def _keeper() -> torch.cuda.CUDAGraph:
    """A graph that stays: thousands of others, one after another, allocate in its memory.

    Memory that only graphs use is given up with the last of them, and its name may not be used again.
    """
    graph = torch.cuda.CUDAGraph()
    flag = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        flag.add_(1)
        graph.capture_end()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _in_turn(rows: Sequence[Row]) -> Sequence[float]:
    """The median of each over passes in turn, each after a while of its own load."""
    rows[0].run(LOAD_MS)
    passes: list[list[float]] = []
    for _ in range(_PASSES):
        times = []
        for row in rows:
            row.run(_WARM_MS)
            times.append(row.run(_TIMED_MS))
        passes.append(times)
    return [statistics.mean(times) for times in zip(*passes, strict=True)]
