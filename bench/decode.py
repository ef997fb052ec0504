"""`qsun-bench decode`: time per output token, for every setting, batch and context that is asked for.

Every record is one setting on one batch. What is told of it beside `us`, in `Record.measured`:

    tpot_us           {mean, p50, p95, p99} of the time of a token; `us` is the median
    tokens_s          tokens a second of the whole batch
    floor_us          `bytes` at the read bandwidth of the run: no step can be faster
    of_floor          floor over us: 1 is the limit
    memory            {weights, prefill, kv, graphs, peak} in bytes; peak is CUDA's allocator's, None on a CPU
    kv_token_bytes    what the engine's cache takes for a token
    one_model_us      with a mix of models: the same batch of one model, and `ratio`, the mix over it
    host, breakdown   with --host and --breakdown: see `host_time` and `breakdown`
    wall_s, ttft_ms, settled_tpot_ms   with --generate: see `decode_generate`
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qsun.modules.decode import DecodeModule
from qsun.modules.quantize import DENSE_BITS
from qsun_bench.cases import Json
from qsun_bench.decode_measure import (
    EXTRA_TOKENS,
    Case,
    Figures,
    longest_of,
    measure_generate,
    measure_steps,
    planned_bytes,
)
from qsun_bench.decode_steps import WARM_UP
from qsun_bench.engine_models import (
    Description,
    Setting,
    Source,
    backend_name,
    describe,
    free_bytes,
    head_spec_of,
    load,
    refusal,
    release,
    setting_fields,
    setting_names,
    spec_of,
    step_weight_bytes,
)
from qsun_bench.engine_suites import DECODE, DENSE, KvDtype
from qsun_bench.gate import Verdict
from qsun_bench.popularity import Mix
from qsun_bench.prefill_models import model_names, prefill_bytes, prefill_modules
from qsun_bench.results import Record
from qsun_bench.step_gate import judge_setting
from qsun_kernels.quant import QuantSpec

Generate = Literal["no", "also", "only"]
_KINDS: Mapping[Generate, tuple[bool, ...]] = {"no": (False,), "also": (False, True), "only": (True,)}

Outcome = tuple[Record | None, str]
"""A record, and why it is wrong or did not come; no record where memory does not hold the case."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; empty and None mean the default for the source.

    tokens: of every request, that are timed. prefill_chunk: prompt tokens a step, with `generate`.
    mix: also with requests of several models. generate: whole answers, prompts included, behind the bare
    steps or alone.
    """

    source: Source
    bits: tuple[int, ...] = ()
    kv: tuple[KvDtype, ...] = ("auto",)
    lm_head_bits: tuple[int, ...] = (DENSE_BITS,)
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    tokens: int | None = None
    prefill_chunk: int | None = None
    mix: Mix | None = None
    host: bool = False
    breakdown: bool = False
    generate: Generate = "no"


def decode_records(request: Request, read_bytes_s: float) -> Iterator[Outcome]:
    """A record for every setting, context and batch, in the order of the options.

    read_bytes_s: the read bandwidth of this run, from which floors are told.
    What the installed engine refuses becomes a failed record with the engine's own reason. Raises ValueError
    for more layers than the shape has, BackendUnavailable for a named backend that cannot run at all, and
    whatever loading a checkpoint raises.
    """
    cases = _cases(request)
    longest = max(case.context + case.tokens for case in cases) + EXTRA_TOKENS
    description = describe(request.source, longest)
    bits = request.bits or ((4, DENSE_BITS) if description.stored is None else (description.stored.bits,))
    for of_weights, of_head in itertools.product(bits, request.lm_head_bits):
        settings = [Setting(of_weights, kv, of_head) for kv in request.kv]
        yield from _Bench(request, description, read_bytes_s, cases).run(settings)
        release(request.source.device)


def _cases(request: Request) -> Sequence[Case]:
    """What is run in each setting: one model, then the mix; the setting itself is filled in later."""
    at_scale, smoke = request.source.at_scale, request.source.smoke
    batches = request.batches or ((1, 8, 32, 64, 128) if at_scale else (1, 8))
    contexts = request.contexts or ((1024,) if at_scale else (32,) if smoke else (256,))
    tokens = request.tokens or (192 if at_scale else 8 if smoke else 64)
    chunk = request.prefill_chunk or (8192 if at_scale else 512)
    return [
        Case(Setting(), batch, context, tokens, chunk, mix, generate)
        for generate in _KINDS[request.generate]
        for context in contexts
        for batch in batches
        for mix in ((None,) if request.mix is None else (None, request.mix))
    ]


@dataclass(frozen=True, slots=True)
class _Bench:
    """Settings that share one module."""

    request: Request
    description: Description
    read_bytes_s: float
    cases: Sequence[Case]

    def run(self, settings: Sequence[Setting]) -> Iterator[Outcome]:
        source, label = self.request.source, self.description.label
        taken = []
        for setting in settings:
            reason = refusal(setting)
            if reason is None:
                taken.append(setting)
            else:
                yield self._refused(setting, reason)
        if not taken:
            return
        weights, room = self._weight_bytes(taken[0]), free_bytes(source.device)
        # Random weights are drawn on the device; a checkpoint's loading tells by itself.
        if source.checkpoint is None and weights > room:
            yield None, f"{label} {taken[0]} takes {weights} bytes, {room} are free"
            return
        # Before the weights come: what a step is judged by takes memory as well.
        judged: dict[Setting, Verdict] = {}
        for setting in taken:
            verdict = judge_setting(source, setting, self.description.config)
            release(source.device)
            if verdict.error is None:
                yield self._refused(setting, verdict.reason)
            else:
                judged[setting] = verdict
        if not judged:
            return
        module = load(source, taken[0], self.description.config)
        for generate in (False, True):
            yield from self._timed(module, judged, generate)

    def _refused(self, setting: Setting, reason: str) -> Outcome:
        """One record for a setting that never came to a batch."""
        return Record(
            op=DECODE,
            case=".".join(self._names(setting)),
            backend=DENSE if setting.bits == DENSE_BITS else self.request.source.backend or "auto",
            us=None,
            bytes=self._weight_bytes(setting),
            error=None,
            ok=False,
            fields=self._setting_fields(setting),
            note=reason,
        ), reason

    def _timed(
        self, module: DecodeModule, judged: dict[Setting, Verdict], generate: bool
    ) -> Iterator[Outcome]:
        source, label = self.request.source, self.description.label
        cases = [case for case in self.cases if case.generate == generate]
        prefills = None
        if cases and generate and any(verdict.ok for verdict in judged.values()):
            size, room = prefill_bytes(module.config, source.dtype), free_bytes(source.device)
            if source.checkpoint is None and size > room:
                yield None, f"{label}: a 16-bit prefill module takes {size} bytes, {room} are free"
                return
            models = 1 if self.request.mix is None else self.request.mix.models
            prefills = prefill_modules(source, module, model_names(models))
        name = backend_name(module)
        for setting, verdict in judged.items():
            one_model: dict[tuple[int, int], float] = {}
            for case in cases:
                case = replace(case, setting=setting)
                release(source.device)
                longest, most = longest_of(case), module.config.max_position_embeddings
                if longest > most:
                    yield (
                        None,
                        f"{label} {setting}: requests come to {longest} tokens, the model takes {most}",
                    )
                    continue
                if planned_bytes(module, case) > free_bytes(source.device):
                    why = f"the KV of {case.batch} x {case.context} tokens does not fit beside the weights"
                    yield None, f"{label} {setting}: {why}"
                    continue
                figures = None
                if verdict.ok and prefills is not None:
                    used = prefills if case.mix is not None else prefills[:1]
                    figures = measure_generate(module, used, case, source.backend)
                elif verdict.ok:
                    figures = measure_steps(
                        module,
                        case,
                        source.backend,
                        host=self.request.host and case.mix is None,
                        breakdown=self.request.breakdown and case.mix is None,
                    )
                place = (case.context, case.batch)
                if figures is not None and case.mix is None:
                    one_model[place] = figures.us
                yield self._record(case, name, verdict, figures, one_model.get(place)), verdict.reason

    def _weight_bytes(self, setting: Setting) -> int:
        source, config = self.request.source, self.description.config
        head = head_spec_of(setting.lm_head_bits, config)
        return step_weight_bytes(config, self._spec(setting), source.dtype, head)

    def _record(
        self,
        case: Case,
        backend: str,
        verdict: Verdict,
        figures: Figures | None,
        one_model_us: float | None = None,
    ) -> Record:
        measured: dict[str, Any] = {}
        size = self._weight_bytes(case.setting)
        if figures is not None:
            # Contexts grow while they are timed: the bytes are those of the middle step.
            positions = case.context + case.tokens // 2 + (0 if case.generate else WARM_UP)
            size += round(case.batch * positions * figures.kv_token_bytes)
            floor = size / self.read_bytes_s * 1e6
            measured = dict(figures.measured) | {
                "kv_token_bytes": figures.kv_token_bytes,
                "floor_us": round(floor, 1),
                "of_floor": round(floor / figures.us, 4),
            }
            if case.mix is not None and one_model_us is not None:
                measured |= {"one_model_us": one_model_us, "ratio": round(figures.us / one_model_us, 4)}
        return Record(
            op=DECODE,
            case=self._name(case),
            backend=backend,
            us=None if figures is None else round(figures.us, 1),
            bytes=size,
            error=verdict.error,
            ok=verdict.ok,
            fields=self._fields(case),
            note=verdict.reason if figures is None else figures.note,
            measured=measured,
        )

    def _name(self, case: Case) -> str:
        parts = [*self._names(case.setting), f"b{case.batch}", f"c{case.context}"]
        if case.generate:
            parts.append("generate")
        if case.mix is not None:
            parts.append(case.mix.name)
        return ".".join(parts)

    def _names(self, setting: Setting) -> Sequence[str]:
        return setting_names(self.description, self._spec(setting), setting)

    def _spec(self, setting: Setting) -> QuantSpec | None:
        return self.description.stored or spec_of(setting.bits, self.request.source, self.description.config)

    def _setting_fields(self, setting: Setting) -> dict[str, Json]:
        return setting_fields(self.description, self._spec(setting), setting, self.request.source.dtype)

    def _fields(self, case: Case) -> dict[str, Json]:
        fields = self._setting_fields(case.setting) | {
            "batch": case.batch,
            "context": case.context,
            "tokens": case.tokens,
            "mode": "generate" if case.generate else "steps",
        }
        if case.generate:
            fields["prefill_chunk"] = case.prefill_chunk
        if case.mix is not None:
            fields |= {"models": case.mix.models, "zipf": case.mix.zipf}
        return fields
