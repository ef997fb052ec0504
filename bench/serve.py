"""`qsun-bench serve`: prompts and answers of several models arrive at one GPU, by the wall clock.

Prefill and decode share the device, as in an aggregated server. The same arrivals are played to both arms of
`serve_arms`. A record is one arm at one rate, or on one trace; `us` is the median time per output token and
`bytes` those of a decode step on average. `Record.measured` holds, beside `serve_metrics.summarise`:

    offered_s      requests a second that arrived
    drawn          {prompt, output: {mean, p50, p95, p99}, by_model: requests of each}
    mean_batch     rows of a decode step; decode_steps, preemptions: as the engine counts them
    unfinished     requests that the time limit left
    memory         {weights, prefill, kv, graphs, peak} in bytes, over all engines of the arm
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qsun.core import SamplingParams
from qsun.engine.engine import DecodeEngine
from qsun.engine.memory import format_bytes
from qsun.engine.options import EngineOptions
from qsun.engine.statistics import EngineStats
from qsun.kv_cache.block_tables import blocks_for
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule
from qsun_bench.cases import Json
from qsun_bench.engine_models import (
    BLOCK_SIZE,
    Description,
    Setting,
    Source,
    describe,
    free_bytes,
    head_spec_of,
    kv_token_bytes,
    load,
    refusal,
    release,
    setting_fields,
    setting_names,
    spec_of,
    step_weight_bytes,
)
from qsun_bench.engine_suites import PER_MODEL, SERVE, SHARED, ArmName, Order
from qsun_bench.gate import Verdict
from qsun_bench.percentiles import summary
from qsun_bench.prefill_models import NOTE, prefill_bytes, prefill_modules
from qsun_bench.results import Record
from qsun_bench.serve_arms import Arm, PerModelArm, SharedArm, play
from qsun_bench.serve_metrics import Objective, Served, summarise
from qsun_bench.step_gate import judge_setting
from qsun_bench.workload import Arrival
from qsun_kernels.quant import QuantSpec

# Of the memory that is free once all modules are loaded; graphs and the largest step take the rest.
_KV_SHARE = 0.7

Outcome = tuple[Record | None, str]


class DoesNotFit(ValueError):
    """The memory, or the model, holds less than the load asks for."""


@dataclass(frozen=True, slots=True)
class Load:
    """One stream of arrivals. name: of the case. fields: what it was made of, for the record.

    span_s: the time in which they arrive; None where there is but one, or all come at once.
    """

    name: str
    arrivals: Sequence[Arrival]
    fields: Mapping[str, Json]
    span_s: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for.

    overlap: of the engines, as in EngineOptions; None is their default. kv_memory: bytes of all caches of an
    arm together; None is most of what is free. limit_s: after which an arm leaves a load. bisect: of loads
    that rise, an arm plays those only by which the last is found of which it serves such a share as promised;
    None plays all.
    """

    source: Source
    setting: Setting
    loads: Sequence[Load]
    objective: Objective
    arms: Sequence[ArmName]
    order: Order = "round-robin"
    max_batch: int = 64
    prefill_chunk: int = 512
    overlap: Literal["auto", "on", "off"] | None = None
    kv_memory: int | None = None
    limit_s: float = 600.0
    bisect: float | None = None

    @property
    def overlap_option(self) -> dict[str, Any]:
        """Not named by default, so that an engine without the option serves as well."""
        return {} if self.overlap is None else {"overlap": self.overlap}


def serve_records(request: Request) -> Iterator[Outcome]:
    """A record for every arm and load, and why one is wrong; arm by arm, loads in order.

    Raises DoesNotFit when the model or the caches cannot hold the longest requests, and what loading raises.
    """
    source, setting = request.source, request.setting
    arrivals = [arrival for load_ in request.loads for arrival in load_.arrivals]
    longest = max(arrival.prompt_tokens + arrival.output_tokens for arrival in arrivals)
    description = describe(source, longest)
    if longest > description.config.max_position_embeddings:
        raise DoesNotFit(
            f"--prompt-tokens, --output-tokens or --trace: a request comes to {longest} tokens, expected at"
            f" most {description.config.max_position_embeddings}, the longest that the model is meant for"
        )
    bench = _Bench(request, description, longest, list(dict.fromkeys(a.model for a in arrivals)))
    reason = refusal(setting, **request.overlap_option)
    if reason is not None:
        yield from bench.untimed(Verdict(False, None, reason))
        return
    needed = bench.weight_bytes() + prefill_bytes(description.config, source.dtype)
    if source.checkpoint is None and needed > free_bytes(source.device):
        why = f"decode and prefill weights take {needed} bytes, {free_bytes(source.device)} are free"
        yield None, f"{description.label} {setting}: {why}"
        return
    verdict = judge_setting(source, setting, description.config)
    if not verdict.ok:
        yield from bench.untimed(verdict)
        return
    module = load(source, setting, description.config)
    prefills = prefill_modules(source, module, bench.models)
    kv_bytes = bench.kv_bytes(module, arrivals)
    for name in request.arms:
        arm = bench.arm(name, module, prefills, kv_bytes, arrivals)
        first, last = 0, len(request.loads) - 1
        while first <= last:
            place = first if request.bisect is None else (first + last) // 2
            record, why = bench.play(name, arm, request.loads[place], verdict, prefills[0].nbytes)
            yield record, why
            share = record.measured["met"] / record.measured["requests"]
            if request.bisect is None or share >= request.bisect:
                first = place + 1
            else:
                last = place - 1
        del arm
        release(source.device)


@dataclass(frozen=True, slots=True)
class _Bench:
    """What all arms have in common. models: in the order of their first arrival."""

    request: Request
    description: Description
    longest: int
    models: Sequence[str]

    def kv_bytes(self, module: DecodeModule, arrivals: Sequence[Arrival]) -> int:
        """Bytes of an arm's caches: as told, else most of what is free, and never more than could be used."""
        a_token = kv_token_bytes(module.config, self.request.setting.kv, module.dtype)
        most = sum(self._held(arrival) for arrival in arrivals) * a_token
        if self.request.kv_memory is not None:
            return self.request.kv_memory
        return min(most, int(_KV_SHARE * free_bytes(module.device)))

    def _held(self, arrival: Arrival) -> int:
        """Positions of the blocks that a request comes to hold, with one to spare."""
        return BLOCK_SIZE * (blocks_for(arrival.prompt_tokens + arrival.output_tokens, BLOCK_SIZE) + 1)

    def arm(
        self,
        name: ArmName,
        module: DecodeModule,
        prefills: Sequence[PrefillModule],
        kv_bytes: int,
        arrivals: Sequence[Arrival],
    ) -> Arm:
        """An arm that is warm: its graphs are captured, and every model has answered once."""
        if self.request.source.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.request.source.device)
        least = self._least_bytes(module, arrivals)
        if name == SHARED:
            require_room(kv_bytes, max(least.values()))
            arm: Arm = SharedArm(self._engine(module, prefills, kv_bytes))
        else:
            shares = cache_shares(arrivals, kv_bytes, least)
            engines = {
                prefill.name: self._engine(module, [prefill], shares[prefill.name]) for prefill in prefills
            }
            arm = PerModelArm(engines, self.request.order)
        for engine in arm.engines:
            # A chunk, or as much of one as the cache of this arm's engine and the model hold.
            room = min(self.longest, engine.stats().blocks * BLOCK_SIZE) - 2
            length = max(1, min(self.request.prefill_chunk, room))
            prompt = [token % module.config.vocab_size for token in range(length)]
            params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
            engine.generate([prompt] * len(engine.models), model=list(engine.models), params=params)
        return arm

    def _least_bytes(self, module: DecodeModule, arrivals: Sequence[Arrival]) -> Mapping[str, int]:
        """By model, the bytes that its longest request takes: with less it could never run."""
        a_token = kv_token_bytes(module.config, self.request.setting.kv, module.dtype)
        least: dict[str, int] = {}
        for arrival in arrivals:
            least[arrival.model] = max(least.get(arrival.model, 0), self._held(arrival) * a_token)
        return least

    def _engine(self, module: DecodeModule, prefills: Sequence[PrefillModule], kv_bytes: int) -> DecodeEngine:
        options = EngineOptions(
            kv_cache_dtype=self.request.setting.kv,
            max_batch_size=self.request.max_batch,
            max_model_len=self.longest,
            block_size=BLOCK_SIZE,
            memory=kv_bytes,
            prefill_chunk=self.request.prefill_chunk,
            backend=self.request.source.backend,
            # Loads of several rates have the same prompts, and each is to be computed.
            prefix_reuse=False,
            **self.request.overlap_option,
        )
        engine = DecodeEngine(module, None, options)
        for prefill in prefills:
            engine.add_model(prefill.name, prefill)
        engine.prepare()
        return engine

    def play(
        self, name: ArmName, arm: Arm, load_: Load, verdict: Verdict, prefill_nbytes: int
    ) -> tuple[Record, str]:
        """One load through one arm, as a record."""
        vocabulary = self.description.config.vocab_size
        prompts = [random_prompt(i, a.prompt_tokens, vocabulary) for i, a in enumerate(load_.arrivals)]
        before = _totals(arm)
        served, wall = play(arm, load_.arrivals, prompts, limit_s=self.request.limit_s)
        after = _totals(arm)
        counted = {key: after[key] - before[key] for key in after}
        measured = self._measured(load_, served, wall, counted)
        measured["memory"] = _memory(arm, self.request.source.device, prefill_nbytes)
        wrong = _wrong(served, wall >= self.request.limit_s)
        us = measured["tpot_ms"]["p50"]
        if not wrong and us is None:
            wrong = "no finished request had two tokens, so there is no time per token"
        record = Record(
            op=SERVE,
            case=self._name(load_),
            backend=name,
            us=None if wrong else round(us * 1e3, 1),
            bytes=round(counted["bytes"] / max(1, counted["decode_steps"])),
            error=verdict.error,
            ok=not wrong,
            fields=self._fields(name, load_),
            note=wrong or NOTE,
            measured=measured,
        )
        return record, wrong

    def untimed(self, verdict: Verdict) -> Iterator[Outcome]:
        """Records of a setting that is wrong or refused."""
        for name in self.request.arms:
            for load_ in self.request.loads:
                record = Record(
                    op=SERVE,
                    case=self._name(load_),
                    backend=name,
                    us=None,
                    bytes=self.weight_bytes(),
                    error=verdict.error,
                    ok=False,
                    fields=self._fields(name, load_),
                    note=verdict.reason,
                )
                yield record, verdict.reason

    def weight_bytes(self) -> int:
        """Of the decode module, that one step reads."""
        source, setting, config = self.request.source, self.request.setting, self.description.config
        head = head_spec_of(setting.lm_head_bits, config)
        return step_weight_bytes(config, self._spec(), source.dtype, head)

    def _measured(
        self, load_: Load, served: Sequence[Served], wall: float, counted: Mapping[str, float]
    ) -> dict[str, Any]:
        arrivals = load_.arrivals
        by_model = Counter(arrival.model for arrival in arrivals)
        steps = counted["decode_steps"]
        return summarise(served, wall, self.request.objective, load_.span_s) | {
            "offered_s": round(len(arrivals) / load_.span_s, 4) if load_.span_s else 0.0,
            "drawn": {
                "prompt": summary([a.prompt_tokens for a in arrivals], 1),
                "output": summary([a.output_tokens for a in arrivals], 1),
                "by_model": dict(by_model.most_common()),
            },
            "mean_batch": round(counted["decode_tokens"] / steps, 2) if steps else 0.0,
            "decode_steps": steps,
            "preemptions": counted["preemptions"],
            "unfinished": sum(not one.done and one.error is None for one in served),
        }

    def _spec(self) -> QuantSpec | None:
        bits, config = self.request.setting.bits, self.description.config
        return self.description.stored or spec_of(bits, self.request.source, config)

    def _name(self, load_: Load) -> str:
        return ".".join([*setting_names(self.description, self._spec(), self.request.setting), load_.name])

    def _fields(self, name: ArmName, load_: Load) -> dict[str, Json]:
        request = self.request
        fields = setting_fields(self.description, self._spec(), request.setting, request.source.dtype) | {
            "max_batch": request.max_batch,
            "prefill_chunk": request.prefill_chunk,
            "slo_ttft_ms": round(1e3 * request.objective.ttft_s, 3),
            "slo_tpot_ms": round(1e3 * request.objective.tpot_s, 3),
        }
        fields |= request.overlap_option
        if name == PER_MODEL:
            fields["order"] = request.order
        return fields | dict(load_.fields)


def cache_shares(arrivals: Sequence[Arrival], kv_bytes: int, least: Mapping[str, int]) -> Mapping[str, int]:
    """Bytes of each model's own cache: what its longest request takes, and its share of the rest by tokens.

    Raises DoesNotFit as `require_room` does.
    """
    require_room(kv_bytes, sum(least.values()))
    tokens: Counter[str] = Counter()
    for arrival in arrivals:
        tokens[arrival.model] += arrival.prompt_tokens + arrival.output_tokens
    rest, total = kv_bytes - sum(least.values()), sum(tokens.values())
    return {model: size + rest * tokens[model] // total for model, size in least.items()}


def require_room(kv_bytes: int, least: int) -> None:
    """Raise DoesNotFit when the longest request of a cache takes more than there is."""
    if kv_bytes < least:
        raise DoesNotFit(
            f"--kv-memory: {format_bytes(kv_bytes)}, expected at least {format_bytes(least)}: what the"
            " longest requests take"
        )


def random_prompt(index: int, length: int, vocabulary: int) -> Sequence[int]:
    """Token ids of the index-th prompt: the same in every arm and at every rate."""
    source = torch.Generator().manual_seed(index)
    return torch.randint(vocabulary, (length,), generator=source).tolist()


def _totals(arm: Arm) -> dict[str, float]:
    """What the engines of an arm have counted so far."""

    def of(number: Callable[[EngineStats], float]) -> float:
        return sum(number(engine.stats()) for engine in arm.engines)

    return {
        "decode_steps": of(lambda stats: stats.decode_steps),
        "decode_tokens": of(lambda stats: stats.decode_tokens),
        "bytes": of(lambda stats: stats.bytes_read_per_token * stats.decode_tokens),
        "preemptions": of(lambda stats: stats.preemptions),
    }


def _memory(arm: Arm, device: torch.device, prefill_nbytes: int) -> dict[str, int | None]:
    stats = [engine.stats() for engine in arm.engines]
    return {
        "weights": arm.engines[0].decode_module.nbytes,
        "prefill": prefill_nbytes,
        "kv": sum(one.kv_bytes for one in stats),
        "graphs": sum(one.graph_bytes for one in stats),
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _wrong(served: Sequence[Served], cut: bool) -> str:
    """Why a load was not served rightly; empty when it was. What the limit left is slow and not wrong."""
    failed = [one.error for one in served if one.error is not None]
    if failed:
        return f"{len(failed)} requests failed, the first: {failed[0]}"
    short = [one for one in served if not one.done]
    if short and not cut:
        one = short[0]
        return (
            f"{len(short)} requests ended early, the first with {len(one.stamps_s)} of"
            f" {one.arrival.output_tokens} tokens"
        )
    return ""
