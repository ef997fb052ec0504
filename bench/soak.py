"""`qsun-bench soak`: one engine under random requests for a long time, and what must hold throughout.

Requests of several models come in bursts and lulls to a cache that does not hold them, so that they are
preempted, swapped and rebuilt; some are cancelled at any moment, some do not fit the context and have to be
refused, some run into its end. Many begin alike, within a model and across models. It has to hold that

- every request ends, with all its tokens, or cancelled where that was asked for, and none in an error;
- a sample of the answers is that of the modules themselves (`soak_check`), each with weights of its own;
- whenever the engine is empty, no block of cache or swap space is held;
- memory does not grow from the second third of the time to the last, in bytes and in Python objects.

`us` is the median time of a step. `Record.measured` holds

    seconds, counts   how long; what was asked and what became of it
    checked           {requests, tokens, wrong, largest_gap, tolerance}, the gaps in standard deviations
    violations        {count, first}: of what has to hold, the first in words
    leaked_blocks     the most that an empty engine held
    memory, growth    {minute, host and device in bytes, objects} at every rest; None where it is too early
    stats             of the engine, as it counts
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from qsun.core import StepOutput
from qsun.engine.engine import DecodeEngine
from qsun.engine.options import EngineOptions
from qsun.errors import RequestError
from qsun.models.build import Placement
from qsun.modules.decode import DecodeModule
from qsun.modules.prefill import PrefillModule
from qsun_bench.engine_models import (
    BLOCK_SIZE,
    Setting,
    Source,
    backend_name,
    describe,
    kv_token_bytes,
    load,
    setting_fields,
    setting_names,
    spec_of,
    step_weight_bytes,
)
from qsun_bench.engine_suites import SOAK
from qsun_bench.prefill_models import model_names
from qsun_bench.random_model import random_stack
from qsun_bench.results import Record
from qsun_bench.soak_check import Reference, tolerance_of
from qsun_bench.soak_ledger import Ledger
from qsun_bench.soak_traffic import Asked, Traffic

_FULL = 2
"""Requests that may wait, for each that a batch holds, before more are kept back."""
_CACHE_SHARE = 0.35
"""Of the tokens of a batch of the longest requests, that the cache holds."""
_SWAP_SHARE = 0.12
"""Of the cache, that the swap space holds: some are swapped, some are rebuilt."""
_SILENT_STEPS = 10_000
"""Steps after which an engine that tells of nothing is stuck."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for. context: most tokens of a request. rest_s: how often the engine is
    emptied, looked at, and its answers checked. check_share: of the requests, that are checked.
    """

    source: Source
    setting: Setting
    seconds: float
    models: int = 6
    zipf: float = 1.0
    max_batch: int = 8
    context: int = 256
    prefill_chunk: int = 96
    check_share: float = 0.01
    rest_s: float = 30.0
    seed: int = 0


@dataclass(slots=True)
class _Answer:
    asked: Asked
    tokens: list[int] = field(default_factory=list)
    is_cancelled: bool = False


def soak_models(request: Request, decode: DecodeModule) -> Sequence[PrefillModule]:
    """Modules with weights of their own, half of them under each convention of the first token."""
    source = request.source
    placement = Placement(source.dtype, source.device, source.backend)
    made = []
    for place, name in enumerate(model_names(request.models)):
        generator = torch.Generator(source.device).manual_seed(place + 1)
        stack = random_stack(decode.config, None, placement, source.dtype, generator)
        card = replace(decode.card, name=name, first_token="prefill" if place % 2 else "decode")
        made.append(PrefillModule(name, stack, card, f"random-{place}", ()))
    return made


def soak_engine(request: Request, decode: DecodeModule, prefills: Sequence[PrefillModule]) -> DecodeEngine:
    """An engine whose cache is too small for its batch."""
    tokens = max(request.context + BLOCK_SIZE, int(_CACHE_SHARE * request.max_batch * request.context))
    a_token = kv_token_bytes(decode.config, request.setting.kv, decode.dtype)
    memory = -(-tokens // BLOCK_SIZE) * BLOCK_SIZE * a_token
    options = EngineOptions(
        kv_cache_dtype=request.setting.kv,
        max_batch_size=request.max_batch,
        max_model_len=request.context,
        block_size=BLOCK_SIZE,
        memory=memory,
        swap_memory=int(_SWAP_SHARE * memory),
        prefill_chunk=request.prefill_chunk,
        backend=request.source.backend,
        overlap="on",
    )
    engine = DecodeEngine(decode, None, options)
    for prefill in prefills:
        engine.add_model(prefill.name, prefill)
    engine.prepare()
    return engine


class Soak:
    """An engine and the requests that it is given, until the time is over."""

    def __init__(
        self,
        request: Request,
        engine: DecodeEngine,
        reference: Reference,
        is_over: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """is_over: asked before every step whether to end before the time."""
        self.ledger = Ledger()
        self.steps_s: list[float] = []
        self._request = request
        self._engine = engine
        self._reference = reference
        self._tolerance = tolerance_of(engine.decode_module.dtype, request.setting.kv)
        self._is_over = is_over
        self._clock = clock
        self._live: dict[str, _Answer] = {}
        self._to_check: list[_Answer] = []
        self._silent = 0
        self._traffic = Traffic(
            engine.models,
            zipf=request.zipf,
            context=request.context,
            vocabulary=engine.decode_module.config.vocab_size,
            check_share=request.check_share,
            seed=request.seed,
        )

    def run(self) -> float:
        """Soak; the seconds that it took. It ends early where the engine is stuck."""
        begin = self._clock()
        end, rest_at = begin + self._request.seconds, begin + self._request.rest_s
        self.ledger.sample_memory(0.0, self._engine.decode_module.device)
        while self._clock() < end and not self._is_over():
            if self._clock() >= rest_at:
                if not self._rest(begin):
                    return self._clock() - begin
                rest_at = self._clock() + self._request.rest_s
            if self._engine.stats().waiting < _FULL * self._request.max_batch:
                for asked in self._traffic.before_step():
                    self._submit(asked)
            self._step()
        self._rest(begin)
        return self._clock() - begin

    def _submit(self, asked: Asked) -> None:
        counts = self.ledger.counts
        counts["asked"] += 1
        try:
            self._engine.submit(
                list(asked.prompt), model=asked.model, params=asked.params, request_id=asked.request_id
            )
        except RequestError as error:
            counts["refused"] += 1
            if asked.expected:
                self.ledger.blame(f"{asked.request_id} was refused: {error}")
            return
        if not asked.expected:
            self.ledger.blame(f"{asked.request_id}: a prompt of {len(asked.prompt)} tokens was taken")
        answer = _Answer(asked)
        self._live[asked.request_id] = answer
        if asked.cancel_at == 0:
            self._cancel(answer)

    def _cancel(self, answer: _Answer) -> None:
        answer.is_cancelled = True
        if not self._engine.cancel(answer.asked.request_id):
            self.ledger.blame(f"{answer.asked.request_id} was running and could not be cancelled")

    def _step(self) -> bool:
        """One step, and what it told. False where the engine has told nothing for too long."""
        begin = time.perf_counter()
        outputs = self._engine.step()
        if self._engine.has_work:
            self.steps_s.append(time.perf_counter() - begin)
        for output in outputs:
            self._hear(output)
        self._silent = 0 if outputs or not self._engine.has_work else self._silent + 1
        return self._silent < _SILENT_STEPS

    def _hear(self, output: StepOutput) -> None:
        answer = self._live.get(output.request_id)
        if answer is None:
            self.ledger.blame(f"{output.request_id} was told of, which was over or never asked for")
            return
        asked = answer.asked
        answer.tokens += output.token_ids
        self.ledger.counts["tokens"] += len(output.token_ids)
        if output.finish_reason is not None:
            self._end(answer, output)
        elif (
            asked.cancel_at is not None and len(answer.tokens) >= asked.cancel_at and not answer.is_cancelled
        ):
            self._cancel(answer)

    def _end(self, answer: _Answer, output: StepOutput) -> None:
        asked, reason = answer.asked, output.finish_reason
        del self._live[asked.request_id]
        self.ledger.counts[str(reason)] += 1
        if reason == "error":
            self.ledger.blame(f"{asked.request_id} failed: {output.error}")
        elif reason == "cancelled" and not answer.is_cancelled:
            self.ledger.blame(f"{asked.request_id} was cancelled by nobody")
        elif reason == "stop":
            self.ledger.blame(f"{asked.request_id} stopped, and has nothing to stop at")
        elif reason == "length" and len(answer.tokens) != asked.expected:
            self.ledger.blame(
                f"{asked.request_id} ended with {len(answer.tokens)} tokens, expected {asked.expected}"
            )
        if asked.is_checked:
            self._to_check.append(answer)

    def _rest(self, begin: float) -> bool:
        """Let the engine run empty and look at it. False where it does not come to rest."""
        while self._engine.has_work:
            if not self._step():
                self.ledger.blame(f"the engine told nothing in {_SILENT_STEPS} steps: {self._engine.stats()}")
                return False
        for answer in self._live.values():
            self.ledger.blame(f"{answer.asked.request_id} was never ended")
        self._live.clear()
        stats = self._engine.stats()
        held = stats.blocks_in_use + stats.swap_blocks_in_use
        if held:
            self.ledger.leaked_blocks = max(self.ledger.leaked_blocks, held)
            self.ledger.blame(f"{held} blocks are held by nobody's requests: {stats}")
        if stats.running or stats.waiting:
            self.ledger.blame(
                f"{stats.running} requests run and {stats.waiting} wait, and none was asked for"
            )
        for answer in self._to_check:
            self._check(answer)
        if self._to_check:
            self._try_check(max(self._to_check, key=lambda answer: len(answer.tokens)))
        self._to_check.clear()
        self.ledger.counts["rests"] += 1
        self.ledger.sample_memory(self._clock() - begin, self._engine.decode_module.device)
        return True

    def _check(self, answer: _Answer) -> None:
        asked = answer.asked
        gaps = self._reference.gaps(asked.model, asked.prompt, answer.tokens)
        wrong = [place for place, gap in enumerate(gaps) if not gap <= self._tolerance]
        self.ledger.checked_requests += 1
        self.ledger.checked_tokens += len(gaps)
        self.ledger.wrong_tokens += len(wrong)
        self.ledger.largest_gap = max([self.ledger.largest_gap, *gaps])
        if wrong:
            self.ledger.blame(
                f"{asked.request_id} of {asked.model}: {len(wrong)} of {len(gaps)} tokens are wrong, the"
                f" first is token {wrong[0]}, {gaps[wrong[0]]:.3g} standard deviations below the largest"
            )

    def _try_check(self, answer: _Answer) -> None:
        """Hold an answer against what it would be had it read another model's KV."""
        own = answer.asked.model
        others = [name for name in self._reference.prefills if name != own]
        if others:
            gaps = self._reference.gaps(others[0], answer.asked.prompt, answer.tokens)
            self.ledger.swapped_tokens += len(gaps)
            self.ledger.found_tokens += sum(not gap <= self._tolerance for gap in gaps)


def soak_record(request: Request, is_over: Callable[[], bool] = lambda: False) -> tuple[Record, str]:
    """Soak an engine. The record, and what is wrong; nothing where all held. is_over: as in `Soak`."""
    source = request.source
    description = describe(source, request.context)
    decode = load(source, request.setting, description.config)
    prefills = soak_models(request, decode)
    engine = soak_engine(request, decode, prefills)
    reference = Reference.create(
        decode, prefills, context=request.context, kv=request.setting.kv, backend=source.backend
    )
    soak = Soak(request, engine, reference, is_over)
    seconds = soak.run()
    ledger, stats = soak.ledger, engine.stats()
    growth = ledger.growth()
    if not ledger.checked_tokens:
        ledger.blame("no answer was checked, expected some: soak for longer, or check a larger share")
    ledger.judge_the_check()
    spec = spec_of(request.setting.bits, source, description.config)
    names = [*setting_names(description, spec, request.setting), f"m{request.models}"]
    measured: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "counts": dict(ledger.counts),
        "checked": {
            "requests": ledger.checked_requests,
            "tokens": ledger.checked_tokens,
            "wrong": ledger.wrong_tokens,
            "largest_gap": ledger.largest_gap,
            "tolerance": tolerance_of(decode.dtype, request.setting.kv),
            "swapped": ledger.swapped_tokens,
            "found": ledger.found_tokens,
        },
        "leaked_blocks": ledger.leaked_blocks,
        "violations": {"count": ledger.num_violations, "first": ledger.violations},
        "memory": ledger.memory,
        "growth": growth,
        "stats": asdict(stats),
    }
    ok = not ledger.num_violations
    why = "" if ok else f"{ledger.num_violations} violations, the first: {ledger.violations[0]}"
    record = Record(
        op=SOAK,
        case=".".join(names),
        backend=backend_name(decode),
        us=round(statistics.median(soak.steps_s) * 1e6, 1) if soak.steps_s else None,
        bytes=step_weight_bytes(description.config, spec, source.dtype),
        error=None,
        ok=ok,
        fields=setting_fields(description, spec, request.setting, source.dtype)
        | {
            "models": request.models,
            "zipf": request.zipf,
            "max_batch": request.max_batch,
            "context": request.context,
            "prefill_chunk": request.prefill_chunk,
            "check_share": request.check_share,
            "seed": request.seed,
        },
        note=why,
        measured=measured,
    )
    return record, why
