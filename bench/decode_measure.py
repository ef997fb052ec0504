"""One batch in one setting, measured: steps with given KV, or whole answers from prompts on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.kv_cache.block_tables import blocks_for
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule
from qsun_bench.breakdown import breakdown_of
from qsun_bench.cases import generator
from qsun_bench.decode_generate import time_generate
from qsun_bench.decode_steps import (
    WARM_UP,
    given_at_once,
    given_engine,
    settle,
    submit_given,
    time_tokens,
)
from qsun_bench.engine_models import BLOCK_SIZE, Setting, kv_token_bytes
from qsun_bench.host_time import host_time
from qsun_bench.percentiles import summary
from qsun_bench.popularity import Mix
from qsun_bench.prefill_models import NOTE, model_names
from qsun_kernels.backends.problems import BackendName

# Steps that are traced, and steps whose host time is taken: beside the timed ones.
_TRACED = 4
_HOSTED = 16
# Tokens that the first requests may get before the last one has started.
_STARTING = 32
EXTRA_TOKENS = WARM_UP + _STARTING + _TRACED + 2 * _HOSTED
"""Tokens of a request beside the timed ones: enough for all that is done before and after."""


@dataclass(frozen=True, slots=True)
class Case:
    """One batch in one setting.

    tokens: of each request, that are timed. prefill_chunk: prompt tokens a step, in whole answers.
    mix: its requests belong to several models.
    """

    setting: Setting
    batch: int
    context: int
    tokens: int
    prefill_chunk: int
    mix: Mix | None = None
    generate: bool = False

    def models(self) -> Sequence[str]:
        """The model of each request."""
        if self.mix is None:
            return [*model_names(1)] * self.batch
        names = model_names(self.mix.models)
        return [names[model] for model in self.mix.assign(self.batch)]


@dataclass(frozen=True, slots=True)
class Figures:
    """us: median of a token. kv_token_bytes: as the engine's cache takes them. measured: all else by name."""

    us: float
    kv_token_bytes: float
    measured: Mapping[str, Any]
    note: str = ""


def measure_steps(
    module: DecodeModule, case: Case, backend: BackendName | None, *, host: bool, breakdown: bool
) -> Figures:
    """Steps whose requests bring their KV. Raises RuntimeError when a step is not what it should be."""
    device = module.device
    _start_memory(device)
    longest = longest_of(case)
    engine = given_engine(module, case.setting.kv, batch=case.batch, longest=longest, backend=backend)
    submit_given(engine, case.models(), case.context, case.tokens + EXTRA_TOKENS)
    settle(engine, case.batch)
    times = time_tokens(engine, case.batch, case.tokens)
    measured: dict[str, Any] = {
        "tpot_us": summary([interval * 1e6 for interval in times.intervals_s], 1),
        "tokens_s": round(case.batch / times.mean_us * 1e6, 1),
        "memory": _memory(module, [], engine),
    }
    notes = []
    if breakdown:
        measured["breakdown"] = breakdown_of(engine.step, device, _TRACED).to_json()
    if host:
        try:
            measured["host"] = host_time(engine.step, device, _HOSTED).to_json()
        except RuntimeError as error:
            notes.append(f"no host time: {error}")
    return Figures(times.us, _kv_token_bytes(engine), measured, "; ".join(notes))


def measure_generate(
    module: DecodeModule, prefills: Sequence[PrefillModule], case: Case, backend: BackendName | None
) -> Figures:
    """Whole answers to prompts of random tokens. prefills: of the models, in the order of their names."""
    device, config = module.device, module.config
    _start_memory(device)
    longest = longest_of(case)
    blocks = case.batch * (blocks_for(longest, BLOCK_SIZE) + 1)
    options = EngineOptions(
        kv_cache_dtype=case.setting.kv,
        max_batch_size=case.batch,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        memory=blocks * BLOCK_SIZE * kv_token_bytes(config, case.setting.kv, module.dtype),
        swap_memory=0,
        prefill_chunk=case.prefill_chunk,
        backend=backend,
        # Prompts come twice, and the second time is to be computed as the first.
        prefix_reuse=False,
    )
    engine = DecodeEngine(module, None, options)
    models = case.models()
    for prefill in prefills:
        engine.add_model(prefill.name, prefill)
    source = generator(torch.device("cpu"), "prompts", case.context)
    shape = (case.batch, case.context)
    prompts = torch.randint(config.vocab_size, shape, generator=source).tolist()
    times = time_generate(engine, prompts, models, case.tokens)
    tpot = summary([1e6 * seconds for seconds in times.tpot_s], 1)
    measured: dict[str, Any] = {
        "tpot_us": tpot,
        "tokens_s": round(case.batch * case.tokens / times.wall_s, 1),
        "wall_s": round(times.wall_s, 4),
        "ttft_ms": summary([1e3 * seconds for seconds in times.ttft_s]),
        "settled_tpot_ms": summary([1e3 * seconds for seconds in times.settled_s]),
        "memory": _memory(module, prefills, engine),
    }
    assert tpot["p50"] is not None
    return Figures(tpot["p50"], _kv_token_bytes(engine), measured, NOTE)


def _kv_token_bytes(engine: DecodeEngine) -> float:
    """What the cache takes for a token, as the engine counts it: scales, where it has some, included."""
    stats = engine.stats()
    return stats.kv_bytes / (stats.blocks * engine.options.block_size)


def _start_memory(device: torch.device) -> None:
    """Count the peak from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _memory(
    module: DecodeModule, prefills: Sequence[PrefillModule], engine: DecodeEngine
) -> dict[str, int | None]:
    """Bytes. All prefill modules are on one stack."""
    stats = engine.stats()
    on_gpu = module.device.type == "cuda"
    return {
        "weights": module.nbytes,
        "prefill": prefills[0].nbytes if prefills else 0,
        "kv": stats.kv_bytes,
        "graphs": stats.graph_bytes,
        "peak": torch.cuda.max_memory_allocated(module.device) if on_gpu else None,
    }


def longest_of(case: Case) -> int:
    """Tokens that each request may come to."""
    return case.context + case.tokens + (0 if case.generate else EXTRA_TOKENS)


def planned_bytes(module: DecodeModule, case: Case) -> int:
    """What the case takes beside the weights: its cache, and the given KV on its way into it."""
    positions = BLOCK_SIZE * (blocks_for(longest_of(case), BLOCK_SIZE) + 1)
    cache = case.batch * positions * kv_token_bytes(module.config, case.setting.kv, module.dtype)
    if case.generate:
        return cache
    # Beside what waits: the KV that all are given, and one request's on its way into blocks.
    copies = 3 + given_at_once(module.config, case.batch, case.context, module.dtype)
    return cache + copies * case.context * kv_token_bytes(module.config, "auto", module.dtype)
