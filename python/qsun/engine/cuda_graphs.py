"""The decode step as CUDA graphs, one for each size of batch that is worth one.

A decode step is hundreds of short kernels, and launching them one by one takes longer than running them.  A
graph launches them at once, but it is fixed: the same kernels, addresses and shapes at every replay.  So a
batch is padded to the next size that was captured, its inputs are copied into tensors at fixed addresses
(`DecodeInputs`), and the kernels read lengths on the device.  The tokens are drawn inside the graph.

Each engine has its own memory pool and stream: graphs of one pool may use the same memory, since they never
run at the same time, and two engines never share one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

__all__ = ["DecodeGraphs", "batch_buckets", "bucket_for"]

# Runs before a capture let libraries allocate and choose what they do only once.
_WARM_UP_RUNS = 2
# Capturing begins by waiting for the device, which is an error while another thread captures on it.
_CAPTURING = threading.Lock()


def batch_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Sizes of batch to capture: 1, 2, 4, 8, then by 8 to 64, by 16 to 128, by 32 beyond; and the largest.

    Up to 8 rows a step costs what one row costs, since the weights' bytes are what it waits for.  Beyond,
    matmuls take longer with every 8 rows, so a batch is padded to no more than that, or to a tenth or so.
    """
    steps = ((8, 64), (16, 128), (32, max_batch_size))
    sizes = [1, 2, 4, 8]
    for step, end in steps:
        sizes += range(sizes[-1] + step, end + 1, step)
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def bucket_for(rows: int, buckets: Items[int]) -> int:
    """The smallest size of batch that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)


class DecodeGraphs:
    """Captured decode steps over one set of input tensors, with what capturing took (seconds, nbytes).

    forward: from a number of rows to logits (rows, V), reading nothing that moves.  Its inputs have to hold
        padding while it is captured.
    stream: where the engine runs everything; capture and replay use it too.
    """

    def __init__(
        self,
        forward: Callable[[int], Tensor],
        buckets: tuple[int, ...],
        stream: torch.cuda.Stream,
    ) -> None:
        self.buckets = buckets
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        started = time.perf_counter()
        free_before, _ = torch.cuda.mem_get_info(stream.device)
        pool = torch.cuda.graph_pool_handle()
        with _CAPTURING, torch.cuda.stream(stream):
            # The largest first: what it allocates is enough for the others, which reuse it.
            for rows in reversed(buckets):
                # Padding reads no KV and writes none, so capturing disturbs no request.
                for _ in range(_WARM_UP_RUNS):
                    forward(rows)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Another engine may be at work on its own stream and thread meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    logits = forward(rows)
                self._graphs[rows] = (graph, logits)
            stream.synchronize()
        free_after, _ = torch.cuda.mem_get_info(stream.device)
        self.nbytes = max(0, free_before - free_after)
        self.seconds = time.perf_counter() - started

    def replay(self, rows: int) -> Tensor:
        """Run the step of `rows` rows (a bucket) on what the input tensors hold now.

        Returns (rows, V), which the next replay of any size overwrites.
        """
        graph, logits = self._graphs[rows]
        graph.replay()
        return logits
