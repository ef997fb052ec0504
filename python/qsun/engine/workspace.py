"""What an engine has once it starts to work: its cache, and all that is sized by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qsun.engine.intake import Limits
from qsun.engine.memory import MemoryPlan, plan_memory
from qsun.engine.options import EngineOptions, kv_format_of
from qsun.engine.report import require_operators
from qsun.engine.runner import Runner, step_memory
from qsun.engine.scheduler import Scheduler
from qsun.engine.swap import HostSwap
from qsun.kv_cache.block_tables import BlockTables, blocks_for
from qsun.kv_cache.format import KVFormat
from qsun.kv_cache.tensors import KVCache

if TYPE_CHECKING:
    from qsun.modules.decode import DecodeModule

__all__ = ["Workspace"]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Cache, swap space, scheduler and runner of one engine.

    overlap: whether a step is launched before the last one's tokens are on the host.
    """

    plan: MemoryPlan
    limits: Limits
    kv_cache: KVCache
    swap: HostSwap
    scheduler: Scheduler
    runner: Runner
    overlap: bool

    @classmethod
    def create(
        cls, decode: DecodeModule, options: EngineOptions, stream: torch.cuda.Stream | None
    ) -> Workspace:
        """Measure, plan and allocate; capture the decode step where graphs are used.

        Raises ValueError when the memory holds no block, BackendUnavailable when an operator has no backend.
        """
        config, device = decode.config, decode.device
        kv_format = kv_format_of(options.kv_cache_dtype, decode.dtype, config.head_dim)
        require_operators(decode, options.block_size, kv_format, options.backend)
        longest = options.max_model_len or config.max_position_embeddings
        plan = plan_memory(
            options.memory,
            options.swap_memory,
            bytes_per_block=KVCache.block_bytes(config, options.block_size, kv_format),
            block_size=options.block_size,
            useful_tokens=options.max_batch_size * longest,
            device=device,
            reserve=_reserve(decode, options, kv_format, longest, stream),
        )
        if options.max_model_len is None:
            longest = min(longest, plan.num_tokens)
        kv_cache = KVCache.allocate(config, plan.num_blocks, options.block_size, kv_format, device)
        if stream is not None:
            # The cache was zeroed on the caller's stream.
            torch.cuda.current_stream(device).synchronize()
        swap = HostSwap(kv_cache, plan.swap_blocks)
        tables = BlockTables(plan.num_blocks, options.block_size, prefix_reuse=options.prefix_reuse)
        return cls(
            plan=plan,
            limits=Limits(config.vocab_size, longest, options.block_size, plan.num_blocks),
            kv_cache=kv_cache,
            swap=swap,
            scheduler=Scheduler(
                tables,
                max_batch_size=options.max_batch_size,
                token_budget=options.prefill_chunk,
                swap=swap,
            ),
            runner=Runner(
                decode,
                kv_cache,
                max_batch_size=options.max_batch_size,
                max_blocks=min(blocks_for(longest, options.block_size), plan.num_blocks),
                stream=stream,
                backend=options.backend,
                cuda_graphs=options.cuda_graphs,
                shares_prefixes=options.prefix_reuse,
            ),
            overlap=options.overlap == "on" or (options.overlap == "auto" and stream is not None),
        )


def _reserve(
    decode: DecodeModule,
    options: EngineOptions,
    kv_format: KVFormat,
    longest: int,
    stream: torch.cuda.Stream | None,
) -> int:
    """Device bytes to leave for a step; only asked for where the cache takes what is left."""
    if stream is None or isinstance(options.memory, (int, str)):
        return 0
    return step_memory(
        decode,
        kv_format=kv_format,
        block_size=options.block_size,
        token_budget=options.prefill_chunk,
        max_batch_size=options.max_batch_size,
        max_model_len=longest,
        stream=stream,
        backend=options.backend,
        shares_prefixes=options.prefix_reuse,
    )
