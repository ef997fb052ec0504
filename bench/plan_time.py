"""How long a contender plans: once a step for all layers, so it is told apart from the call."""

from __future__ import annotations

import statistics

import torch

from qsun_bench.peers import Prepared
from qsun_kernels.testing.timing import time_steps

_CAPTURED = 64
_REPLAYS = 20


def time_plan(prepared: Prepared, device: torch.device) -> float | None:
    """Microseconds of one plan; None for a contender that makes none.

    On CUDA that of one launch of a replayed graph, as the calls are timed; what plans on the host, and all on
    the CPU, by the wall clock, with an idle device before and after. The lengths are in the cache: they were
    just written.
    """
    if prepared.plan is None:
        return None
    if device.type != "cuda" or prepared.plans_on_host:
        return round(time_steps(prepared.plan, device=device, count=_REPLAYS).us, 3)
    with torch.cuda.device(device):
        prepared.plan()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CAPTURED):
                prepared.plan()
        samples = []
        for _ in range(_REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(float(start.elapsed_time(end)) * 1e3 / _CAPTURED)
        return round(statistics.median(samples), 3)
