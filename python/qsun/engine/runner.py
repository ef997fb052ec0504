"""Forward passes: prompt chunks, rebuilt responses, and the decode step, eagerly or by graph replay."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from qsun.core import Chunk, ForwardContext, PrefillAttention, PrefillChunk, Sequence
from qsun.engine.cuda_graphs import DecodeGraphs, batch_buckets, bucket_for
from qsun.engine.decode_inputs import DecodeInputs, Members
from qsun.engine.inputs import prefill_inputs
from qsun.engine.memory import format_bytes
from qsun.kv_cache.block_tables import blocks_for
from qsun.kv_cache.format import KVFormat
from qsun.kv_cache.tensors import KVCache
from qsun_kernels import sample_tokens, use_backend

if TYPE_CHECKING:
    from qsun.models.decoder import DecoderStack
    from qsun.modules.decode import DecodeModule
    from qsun_kernels.backends.problems import BackendName

__all__ = ["DecodeStep", "GraphMode", "Runner", "running", "step_memory"]

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """A decode step that was launched.

    members: whose step it is, with their rows.  logits: (rows, V) on the device, in the module's dtype; the
    next launch overwrites them.
    """

    members: Members
    logits: Tensor
    _result: Tensor
    _done: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """What was drawn, by row, -1 where the logits were not finite.  Waits for the step to end.

        The launch after the next one overwrites it.
        """
        if self._done is not None:
            self._done.synchronize()
        tokens: list[int] = self._result.tolist()
        return tokens


class Runner:
    """Executes on one cache what the scheduler has planned.

    max_blocks: blocks of the longest sequence, and most that attention of chunks reads at once: `step_memory`
    measures a single chunk.  stream: the engine's own; None on a CPU.  shares_prefixes: whether sequences may
    begin with the same blocks, which a decode step then reads once.
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
        shares_prefixes: bool = False,
    ) -> None:
        self.decode_module = decode
        self.kv_cache = kv_cache
        self._max_blocks = max_blocks
        self._stream = stream
        self._backend = backend
        with self.running():
            self._inputs = DecodeInputs(
                max_batch_size,
                max_blocks,
                kv_cache.block_size,
                kv_cache.device,
                shares_prefixes=shares_prefixes,
            )
        # In turn: a step is launched while the one before it runs.
        self._events = [None, None] if stream is None else [torch.cuda.Event(), torch.cuda.Event()]
        self.graphs: DecodeGraphs | None = None
        self.graph_status = "eager: no CUDA device" if stream is None else "eager: cuda_graphs='off'"
        if stream is not None and cuda_graphs != "off":
            self._capture(batch_buckets(max_batch_size), stream, cuda_graphs)
        # Without graphs nothing is won by padding.
        self.use_buckets(range(1, max_batch_size + 1) if self.graphs is None else self.graphs.buckets)

    def _capture(self, buckets: tuple[int, ...], stream: torch.cuda.Stream, cuda_graphs: GraphMode) -> None:
        try:
            with self.running():
                self.graphs = DecodeGraphs(self._decode_forward, buckets, stream)
        except torch.OutOfMemoryError as failure:
            raise ValueError(
                f"max_batch_size is {buckets[-1]} and memory leaves too little of {stream.device} to capture"
                f" the decode step of that many rows ({failure}), expected a smaller max_batch_size or"
                " memory, or cuda_graphs='off'"
            ) from failure
        except RuntimeError as failure:
            if cuda_graphs == "on":
                raise
            self.graph_status = f"eager: capturing a graph failed: {failure}"
            warnings.warn(
                f"the decode step runs without CUDA graphs: {failure}", RuntimeWarning, stacklevel=4
            )
        else:
            self.graph_status = (
                f"CUDA graphs for batches of {', '.join(map(str, buckets))}, captured in"
                f" {self.graphs.seconds:.1f} s, {format_bytes(self.graphs.nbytes)}"
            )
            logger.info("decode step: %s", self.graph_status)

    def use_buckets(self, buckets: Items[int]) -> None:
        """Sizes, rising, that decode batches are padded to from now on; the last is the largest batch."""
        self._rows_for = [0, *(bucket_for(rows, buckets) for rows in range(1, buckets[-1] + 1))]

    def running(self) -> AbstractContextManager[None]:
        """Where every other method has to be called, and whatever else touches the cache."""
        return running(self._stream, self._backend)

    def prefill(self, stack: DecoderStack, chunks: Items[Chunk]) -> Tensor | None:
        """Write the KV of chunks through one module's stack.

        Returns its hidden states (T, H); None, and they are not computed, where no chunk gives a first token.
        """
        token_ids, ctx = prefill_inputs(
            chunks, self.kv_cache.block_size, self.kv_cache.device, max_blocks=self._max_blocks
        )
        embedded = self.decode_module.embed(token_ids)
        if any(chunk.gives_first_token for chunk in chunks):
            return stack.forward(embedded, ctx, self.kv_cache)
        stack.write_kv(embedded, ctx, self.kv_cache)
        return None

    def rebuild(self, chunks: Items[Chunk]) -> None:
        """Write the KV of response positions again, as the decode module wrote it, many at a time."""
        self.prefill(self.decode_module.stack, chunks)

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all that was launched so far; None on a CPU, where nothing is under way."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 (n, V) of hidden states (n, H) through the lm_head that all modules share."""
        return self.decode_module.logits(hidden)

    @property
    def num_decoding(self) -> int:
        """Sequences that a step after the last one would have, as far as anybody knows."""
        return self._inputs.num_sequences

    def decode(self, sequences: Items[Sequence]) -> DecodeStep:
        """Launch a step for these sequences, in order of arrival, from their last tokens.

        Waits for a step that is under way: after an interruption nobody has collected it.
        """
        last = self._events[-1]
        if last is not None:
            last.synchronize()
        self._inputs.place(sequences, self._rows_for[len(sequences)])
        return self._launch(from_host=True)

    def decode_next(self, extend: Callable[[Collection[Sequence]], bool]) -> DecodeStep | None:
        """Launch a step for the sequences of the last one, from the tokens that it draws.

        The last step may be under way.  extend: gives sequences a block more each, or none and False.
        None, and nothing was changed, when that is refused or other rows are called for.
        """
        if not self._inputs.advance(extend, self._rows_for.__getitem__):
            return None
        return self._launch(from_host=False)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended: later steps do without it."""
        self._inputs.vacate(sequence)

    def _launch(self, *, from_host: bool) -> DecodeStep:
        inputs = self._inputs
        rows = self._rows_for[inputs.span]
        inputs.stage(from_host=from_host)
        logits = self._decode_forward(rows) if self.graphs is None else self.graphs.replay(rows)
        result = inputs.fetch()
        done = self._events[0]
        self._events.reverse()
        if done is not None:
            done.record()
        inputs.prepare()
        return DecodeStep(inputs.members, logits, result, done)

    def _decode_forward(self, rows: int) -> Tensor:
        """Logits (rows, V) of what the input tensors hold, and the tokens drawn from them taken in."""
        inputs = self._inputs
        inputs.write_blocks(rows)
        logits = _decode_step(self.decode_module, inputs.token_ids(rows), inputs.context(rows), self.kv_cache)
        inputs.take(*sample_tokens(logits, *inputs.sampling(rows)))
        return logits


def _decode_step(decode: DecodeModule, token_ids: Tensor, ctx: ForwardContext, kv_cache: KVCache) -> Tensor:
    return decode.raw_logits(decode.stack.forward(decode.embed(token_ids), ctx, kv_cache))


def step_memory(
    decode: DecodeModule,
    *,
    kv_format: KVFormat,
    block_size: int,
    token_budget: int,
    max_batch_size: int,
    max_model_len: int,
    stream: torch.cuda.Stream,
    backend: BackendName | None,
    shares_prefixes: bool = False,
) -> int:
    """Device bytes that the largest step takes beside weights and cache, by running one.

    The prompt chunk stands at the end of the longest context, whose keys and values are gathered: all from
    one block, so no large cache is needed to find out.
    """
    device = stream.device
    length = min(token_budget, max_model_len)
    num_blocks = blocks_for(max_model_len, block_size)
    with running(stream, backend):
        kv_cache = KVCache.allocate(decode.config, 1, block_size, kv_format, device)
        inputs = DecodeInputs(max_batch_size, 1, block_size, device, shares_prefixes=shares_prefixes)
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
        # The samplers' worst case: float64 probabilities, their sums and the noise beside the logits.
        work = [torch.empty_like(logits, dtype=torch.float64) for _ in range(6)]
        stream.synchronize()
        del work, logits
        return torch.cuda.max_memory_allocated(device) - before
