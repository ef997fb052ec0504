"""The decode step as CUDA graphs, one for each size of batch that is worth one.

A decode step is hundreds of short kernels, and launching them one by one takes longer than running them.  A
graph launches them at once, but it is fixed: the same kernels, addresses and shapes at every replay.  So a
batch is padded to the next size that was captured, its inputs are copied into tensors at fixed addresses
(`inputs.DecodeInputs`), and the kernels read lengths on the device.

Each engine has its own memory pool and stream: graphs of one pool may use the same memory, since they never
run at the same time, and two engines never share one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from qsun.engine.inputs import DecodeInputs

__all__ = ["DecodeGraphs", "batch_buckets", "bucket_for"]

# Runs before a capture let libraries allocate and choose what they do only once.
_WARM_UP_RUNS = 2
# Capturing begins by waiting for the device, which is an error while another thread captures on it.
_CAPTURING = threading.Lock()


def batch_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Sizes of batch to capture: powers of two, and the largest batch itself.

    A batch is padded to at most twice its size, which costs little while the weights' bytes are what a step
    waits for, and padding rows read no KV.
    """
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if sizes[-1] == max_batch_size else (*sizes, max_batch_size)


def bucket_for(rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest size of batch that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)


class DecodeGraphs:
    """Captured decode steps over one set of input tensors.

    forward: from a number of rows to logits float32 (rows, V), reading `inputs` and nothing that moves.
    stream: where the engine runs everything; capture and replay use it too.
    """

    def __init__(
        self,
        forward: Callable[[int], Tensor],
        inputs: DecodeInputs,
        buckets: tuple[int, ...],
        stream: torch.cuda.Stream,
    ) -> None:
        self.buckets = buckets
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        free_before, _ = torch.cuda.mem_get_info(stream.device)
        pool = torch.cuda.graph_pool_handle()
        with _CAPTURING, torch.cuda.stream(stream):
            # The largest first: what it allocates is enough for the others, which reuse it.
            for rows in reversed(buckets):
                # Padding reads no KV and writes none, so capturing disturbs no request.
                inputs.padding(rows)
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

    def replay(self, rows: int) -> Tensor:
        """Run the step of `rows` rows (a bucket) on what the input tensors hold now.

        Returns float32 (rows, V), which the next replay of any size overwrites.
        """
        graph, logits = self._graphs[rows]
        graph.replay()
        return logits
