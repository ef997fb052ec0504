"""What an engine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qsun.engine.book import RequestBook

__all__ = ["Counters", "EngineStats"]


@dataclass(slots=True)
class Counters:
    """Running totals, kept by the engine while it works."""

    steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    rebuilt_tokens: int = 0
    decode_tokens: int = 0
    dropped_tokens: int = 0
    host_seconds: float = 0.0
    wait_seconds: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    weight_bytes_read: int = 0
    kv_bytes_read: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot.

    steps: calls that computed something; decode_steps: those with a decode batch.
    prompt_tokens: tokens of all prompts accepted; prefill_tokens: computed by prefill modules;
        prefix_hit_tokens: found in the cache instead; rebuilt_tokens: response positions computed again after
        a preemption.
    decode_tokens: rows of all decode batches; output_tokens: tokens of all answers.  dropped_tokens: rows
        that were launched before it was known that their request had ended; no other number counts them.
    host_seconds: time in `step` without wait_seconds, which was spent waiting for the device.
    swaps, rebuilds: preemptions by what became of the KV; lost: requests ended with MissingKV.
    blocks, blocks_in_use, blocks_cached: of the cache, held by requests, and idle but findable;
        swap_blocks_in_use: in host memory.  evictions: findable blocks that had to make room.
    bytes_read_per_token: weights and KV that decode batches read, by the algorithm, over their tokens;
        weight_bytes_per_step: the weights' part of one decode step, whatever its batch.
    kv_bytes, graph_bytes: memory of the cache and of the captured graphs; graph_seconds: to capture them.
    """

    steps: int
    decode_steps: int
    prompt_tokens: int
    prefill_tokens: int
    prefix_hit_tokens: int
    rebuilt_tokens: int
    decode_tokens: int
    dropped_tokens: int
    host_seconds: float
    wait_seconds: float
    output_tokens: int
    finished: int
    cancelled: int
    failed: int
    swaps: int
    rebuilds: int
    lost: int
    evictions: int
    blocks: int
    blocks_in_use: int
    blocks_cached: int
    swap_blocks_in_use: int
    bytes_read_per_token: float
    weight_bytes_per_step: int
    kv_bytes: int
    graph_bytes: int
    graph_seconds: float
    running: int
    waiting: int

    @property
    def preemptions(self) -> int:
        """All preemptions."""
        return self.swaps + self.rebuilds

    @property
    def mean_batch(self) -> float:
        """Rows of a decode batch, on average."""
        return self.decode_tokens / self.decode_steps if self.decode_steps else 0.0

    @classmethod
    def snapshot(cls, book: RequestBook | None, weight_bytes_per_step: int) -> EngineStats:
        """The numbers of an engine; without a book (nothing was submitted yet) its cache is empty."""
        counters = Counters() if book is None else book.counters
        workspace = None if book is None else book.workspace
        scheduler = None if workspace is None else workspace.scheduler
        pool = None if scheduler is None else scheduler.tables.pool
        graphs = None if workspace is None else workspace.runner.graphs
        unfinished = 0 if scheduler is None else len(scheduler.live)
        running = 0 if scheduler is None else scheduler.num_holding
        read = counters.weight_bytes_read + counters.kv_bytes_read
        hits = 0 if scheduler is None else sum(s.num_prefix_hits for s in scheduler.live.values())
        return cls(
            steps=counters.steps,
            decode_steps=counters.decode_steps,
            prompt_tokens=counters.prompt_tokens,
            prefill_tokens=counters.prefill_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens + hits,
            rebuilt_tokens=counters.rebuilt_tokens,
            decode_tokens=counters.decode_tokens,
            dropped_tokens=counters.dropped_tokens,
            host_seconds=counters.host_seconds,
            wait_seconds=counters.wait_seconds,
            output_tokens=counters.output_tokens,
            finished=counters.finished,
            cancelled=counters.cancelled,
            failed=counters.failed,
            swaps=0 if scheduler is None else scheduler.num_swaps,
            rebuilds=0 if scheduler is None else scheduler.num_rebuilds,
            lost=0 if scheduler is None else scheduler.num_lost,
            evictions=0 if pool is None else pool.num_evictions,
            blocks=0 if pool is None else pool.num_blocks,
            blocks_in_use=0 if pool is None else pool.num_blocks - pool.num_available,
            blocks_cached=0 if pool is None else pool.num_idle,
            swap_blocks_in_use=0 if workspace is None else workspace.swap.used,
            bytes_read_per_token=read / counters.decode_tokens if counters.decode_tokens else 0.0,
            weight_bytes_per_step=weight_bytes_per_step,
            kv_bytes=0 if workspace is None else workspace.kv_cache.nbytes,
            graph_bytes=0 if graphs is None else graphs.nbytes,
            graph_seconds=0.0 if graphs is None else graphs.seconds,
            running=running,
            waiting=unfinished - running,
        )
