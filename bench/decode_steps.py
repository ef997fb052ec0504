"""Bare decode steps: requests that bring random KV for their context, and a clock around the engine's step.

No prompt is computed, so a long context costs its reading and nothing else. The engine may tell the tokens of
a step with the next call, so the clock counts tokens as they are told and never looks into a call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qsun.core import SamplingParams, StepOutput
from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.kv_cache.block_tables import blocks_for
from qsun.models.config import ModelConfig
from qsun.modules.decode import DecodeModule
from qsun_bench.cases import generator
from qsun_bench.engine_models import BLOCK_SIZE, kv_token_bytes
from qsun_bench.engine_suites import KvDtype
from qsun_bench.percentiles import percentile
from qsun_kernels.backends.problems import BackendName

WARM_UP = 4

# Steps that a call may take before it tells of the first token, or of the last.
_SILENT_CALLS = 8

_GIVEN_BYTES = 4 << 30
"""Given KV that waits outside the cache at one time."""

_MOST_GROUPS = 16
"""Steps in which a batch comes to run: what its first requests are ahead of its last."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """intervals_s: from one call that told tokens to the next, one token for every request each."""

    intervals_s: tuple[float, ...]

    @property
    def us(self) -> float:
        """Median microseconds of a token."""
        return statistics.median(self.intervals_s) * 1e6

    @property
    def mean_us(self) -> float:
        """Wall clock over tokens of a request."""
        return statistics.fmean(self.intervals_s) * 1e6

    @property
    def p99_us(self) -> float:
        """What one token in a hundred takes at least."""
        return percentile(self.intervals_s, 0.99) * 1e6


def given_engine(
    module: DecodeModule,
    kv: KvDtype,
    *,
    batch: int,
    longest: int,
    backend: BackendName | None,
) -> DecodeEngine:
    """An engine whose cache holds `batch` requests of `longest` tokens, and a block more for each."""
    blocks = batch * (blocks_for(longest, BLOCK_SIZE) + 1)
    options = EngineOptions(
        kv_cache_dtype=kv,
        max_batch_size=batch,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        memory=blocks * BLOCK_SIZE * kv_token_bytes(module.config, kv, module.dtype),
        swap_memory=0,
        backend=backend,
        prefix_reuse=False,
    )
    return DecodeEngine(module, None, options)


def given_at_once(config: ModelConfig, batch: int, context: int, dtype: torch.dtype) -> int:
    """How many of `batch` requests of `context` prompt tokens may wait with their KV outside the cache.

    All at one time would need the memory of a second cache beside the first.
    """
    fitting = _GIVEN_BYTES // (context * kv_token_bytes(config, "auto", dtype))
    return max(1, min(batch, fitting), -(-batch // _MOST_GROUPS))


def submit_given(
    engine: DecodeEngine, models: Sequence[str], context: int, max_tokens: int, at_once: int | None = None
) -> None:
    """A request for each entry of `models`, of `context` prompt tokens whose KV is random and given.

    Names that are new are registered, each with a fingerprint of its own.
    at_once: requests that are submitted before a step takes their KV into the cache, by default
    `given_at_once`. Raises RuntimeError when one fails.
    """
    module = engine.decode_module
    config = module.config
    for name in dict.fromkeys(models):
        if name not in engine.models:
            engine.add_remote_model(name, fingerprint=name)
    source = generator(module.device, "kv", context)
    shape = (config.num_layers, context - 1, config.num_kv_heads, config.head_dim)
    keys, values = (
        torch.empty(shape, dtype=module.dtype, device=module.device).normal_(generator=source)
        for _ in range(2)
    )
    prompt = torch.randint(config.vocab_size, (context,), generator=source, device=module.device).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    at_once = at_once or given_at_once(config, len(models), context, module.dtype)
    for index, name in enumerate(models):
        if index and index % at_once == 0:
            _told(engine.step())
        engine.submit_kv(prompt, keys, values, prompt[-1], model=name, fingerprint=name, params=params)


def settle(engine: DecodeEngine, batch: int) -> None:
    """Step until all of `batch` requests run, and some steps more, before the clock does.

    Raises RuntimeError when the engine does not come to run them all at once.
    """
    full = 0
    for _ in range(batch + _SILENT_CALLS + WARM_UP):
        full += _told(engine.step()) == batch
        if full == WARM_UP:
            return
    raise RuntimeError(f"the engine does not run a batch of {batch}: {engine.stats()}")


def time_tokens(
    engine: DecodeEngine, batch: int, tokens: int, clock: Callable[[], float] = time.perf_counter
) -> StepTimes:
    """The time of `tokens` tokens of every request of a batch that runs already.

    It begins and ends where a call tells tokens. Raises RuntimeError when a call tells of another number than
    one for each request: what was timed would not be a step of this batch.
    """
    intervals: list[float] = []
    silent = 0
    last = clock()
    while len(intervals) < tokens:
        told = _told(engine.step())
        now = clock()
        if told == 0 and silent < _SILENT_CALLS:
            silent += 1
            continue
        if told != batch:
            raise RuntimeError(f"a step told {told} tokens, expected one for each of {batch} requests")
        silent = 0
        intervals.append(now - last)
        last = now
    return StepTimes(tuple(intervals))


def _told(outputs: Sequence[StepOutput]) -> int:
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"a request failed: {output.error}")
    return sum(len(output.token_ids) for output in outputs)
