"""What the host adds to a step: its wall clock beyond the device's own time, and the time of Python alone.

Both watch `torch.cuda.CUDAGraph.replay`, by which an engine runs its captured step, and nothing else:

    on the device   an event before and after each replay; the step's wall clock less that is exposed to the
                    host: scheduling, copies of the inputs, sampling, and waiting for the answer
    Python alone    a replay that does nothing, so that a step costs what its Python costs; tokens then repeat
                    the last real one, which no timing depends on
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class HostTime:
    """Microseconds of a step. wall_us: the clock. device_us: the replayed graphs. python_us: without them."""

    wall_us: float
    device_us: float
    python_us: float

    @property
    def exposed_us(self) -> float:
        """What the device does not fill."""
        return self.wall_us - self.device_us

    def to_json(self) -> dict[str, float]:
        """As a record keeps it."""
        return {
            "wall_us": round(self.wall_us, 1),
            "device_us": round(self.device_us, 1),
            "exposed_us": round(self.exposed_us, 1),
            "python_us": round(self.python_us, 1),
        }


def host_time(step: Callable[[], object], device: torch.device, steps: int) -> HostTime:
    """Of something that runs already and replays graphs.

    Raises RuntimeError when it replays none: its device time cannot be told from the host's then.
    """
    with replays_timed() as spans:
        walls = _walls(step, steps)
    torch.cuda.synchronize(device)
    if not spans:
        raise RuntimeError(
            "the step replays no CUDA graph, so its device time cannot be told from the host's"
        )
    replayed = sum(start.elapsed_time(end) for start, end in spans) * 1e3
    with replays_skipped():
        python = _walls(step, steps)
    torch.cuda.synchronize(device)
    return HostTime(statistics.fmean(walls) * 1e6, replayed / steps, statistics.median(python) * 1e6)


@contextmanager
def replays_timed() -> Iterator[list[tuple[Any, Any]]]:
    """Gives a list that gets the events (before, after) of every replay; read it once the device is done."""
    spans: list[tuple[Any, Any]] = []
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay(graph)
        end.record()
        spans.append((start, end))

    with _replaced(timed):
        yield spans


@contextmanager
def replays_skipped() -> Iterator[None]:
    """Where a replay does nothing."""
    with _replaced(lambda graph: None):
        yield


@contextmanager
def _replaced(replay: Callable[[torch.cuda.CUDAGraph], None]) -> Iterator[None]:
    own = torch.cuda.CUDAGraph.replay
    setattr(torch.cuda.CUDAGraph, "replay", replay)  # noqa: B010  a method is not assigned to by name
    try:
        yield
    finally:
        setattr(torch.cuda.CUDAGraph, "replay", own)  # noqa: B010


def _walls(step: Callable[[], object], steps: int) -> Sequence[float]:
    walls = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        walls.append(time.perf_counter() - begin)
    return walls
