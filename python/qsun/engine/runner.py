"""Forward passes: prompt chunks, rebuilt responses, and the decode step, eagerly or by graph replay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qsun.core import Chunk, ForwardContext, PrefillAttention, PrefillChunk, Sequence
from qsun.engine.cuda_graphs import DecodeGraphs, batch_buckets, bucket_for
from qsun.engine.inputs import DecodeInputs, prefill_inputs
from qsun.kv_cache.block_tables import blocks_for
from qsun.kv_cache.tensors import KVCache
from qsun_kernels import use_backend

if TYPE_CHECKING:
    from qsun.models.decoder import DecoderStack
    from qsun.modules.decode import DecodeModule
    from qsun_kernels.backends.problems import BackendName

__all__ = ["GraphMode", "Runner", "running", "step_memory"]

# "auto": graphs where they can be captured, with a warning where they cannot; "on": an error there.
GraphMode = Literal["auto", "on", "off"]


@contextmanager
def running(stream: torch.cuda.Stream | None, backend: BackendName | None) -> Iterator[None]:
    """Run what is inside without gradients, on the engine's stream and backend."""
    with (
        torch.inference_mode(),
        nullcontext() if stream is None else torch.cuda.stream(stream),
        nullcontext() if backend is None else use_backend(backend),
    ):
        yield


class Runner:
    """Executes on one cache what the scheduler has planned.

    max_blocks: blocks of the longest sequence.  stream: the engine's own; None on a CPU.
    """

    def __init__(
        self,
        decode: DecodeModule,
        kv_cache: KVCache,
        *,
        max_batch_size: int,
        max_blocks: int,
        stream: torch.cuda.Stream | None,
        backend: BackendName | None,
        cuda_graphs: GraphMode,
    ) -> None:
        self.decode_module = decode
        self.kv_cache = kv_cache
        self._stream = stream
        self._backend = backend
        with self.running():
            self._inputs = DecodeInputs(max_batch_size, max_blocks, kv_cache.block_size, kv_cache.device)
        self.graphs: DecodeGraphs | None = None
        self.graph_status = "eager: no CUDA device" if stream is None else "eager: cuda_graphs='off'"
        if stream is not None and cuda_graphs != "off":
            self._capture(batch_buckets(max_batch_size), stream, cuda_graphs)

    def _capture(self, buckets: tuple[int, ...], stream: torch.cuda.Stream, cuda_graphs: GraphMode) -> None:
        try:
            with self.running():
                self.graphs = DecodeGraphs(self._decode_forward, self._inputs, buckets, stream)
        except RuntimeError as failure:
            if cuda_graphs == "on":
                raise
            self.graph_status = f"eager: capturing a graph failed: {failure}"
            warnings.warn(
                f"the decode step runs without CUDA graphs: {failure}", RuntimeWarning, stacklevel=4
            )
        else:
            self.graph_status = f"CUDA graphs for batches of {', '.join(map(str, buckets))}"

    def running(self) -> AbstractContextManager[None]:
        """Where every other method has to be called, and whatever else touches the cache."""
        return running(self._stream, self._backend)

    def prefill(self, stack: DecoderStack, chunks: Items[Chunk]) -> Tensor:
        """Write the KV of chunks through one module's stack.  Returns its hidden states (T, H)."""
        token_ids, ctx = prefill_inputs(chunks, self.kv_cache.block_size, self.kv_cache.device)
        return stack.forward(self.decode_module.embed(token_ids), ctx, self.kv_cache)

    def rebuild(self, chunks: Items[Chunk]) -> None:
        """Write the KV of response positions again, as the decode module wrote it, many at a time."""
        self.prefill(self.decode_module.stack, chunks)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (n, V) of hidden states (n, H) through the lm_head that all modules share."""
        return self.decode_module.logits(hidden)

    def decode(self, sequences: Items[Sequence]) -> Tensor:
        """One token further for each sequence.  Returns logits float32 (n, V), valid until the next call."""
        rows = len(sequences)
        if self.graphs is None:
            self._inputs.fill(sequences, rows)
            return self._decode_forward(rows)
        bucket = bucket_for(rows, self.graphs.buckets)
        self._inputs.fill(sequences, bucket)
        return self.graphs.replay(bucket)[:rows]

    def _decode_forward(self, rows: int) -> Tensor:
        return _decode_step(
            self.decode_module, self._inputs.token_ids(rows), self._inputs.context(rows), self.kv_cache
        )


def _decode_step(decode: DecodeModule, token_ids: Tensor, ctx: ForwardContext, kv_cache: KVCache) -> Tensor:
    return decode.logits(decode.stack.forward(decode.embed(token_ids), ctx, kv_cache))


def step_memory(
    decode: DecodeModule,
    *,
    kv_dtype: torch.dtype,
    block_size: int,
    token_budget: int,
    max_batch_size: int,
    max_model_len: int,
    stream: torch.cuda.Stream,
    backend: BackendName | None,
) -> int:
    """Device bytes that the largest step takes beside weights and cache, by running one.

    The prompt chunk stands at the end of the longest context, whose keys and values are gathered: all from
    one block, so no large cache is needed to find out.
    """
    device = stream.device
    length = min(token_budget, max_model_len)
    num_blocks = blocks_for(max_model_len, block_size)
    with running(stream, backend):
        kv_cache = KVCache.allocate(decode.config, 1, block_size, kv_dtype, device)
        inputs = DecodeInputs(max_batch_size, 1, block_size, device)
        block_ids = torch.zeros(num_blocks, dtype=torch.int64, device=device)
        chunk = PrefillChunk(0, length, max_model_len - length, block_ids)
        positions = torch.arange(max_model_len - length, max_model_len, device=device)
        nowhere = torch.full((length,), -1, dtype=torch.int64, device=device)
        ctx = ForwardContext(positions, nowhere, PrefillAttention((chunk,)))
        stream.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        decode.stack.forward(decode.embed(torch.zeros_like(positions)), ctx, kv_cache)
        logits = _decode_step(
            decode, inputs.token_ids(max_batch_size), inputs.context(max_batch_size), kv_cache
        )
        # The sampler's worst case: float64 probabilities, their sums and the noise beside the logits.
        work = [torch.empty_like(logits, dtype=torch.float64) for _ in range(6)]
        stream.synchronize()
        del work, logits
        return torch.cuda.max_memory_allocated(device) - before
