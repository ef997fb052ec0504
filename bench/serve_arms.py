"""Two ways to serve several models on one GPU, behind one face, and the loop that plays a load to either.

shared       one engine: every decode step holds the requests of all models. What SUN makes possible.
per-model    one engine a model, stepped in turn: every decode step holds the requests of one model, as it has
             to where each model has decode weights of its own.

The second is made as strong as one GPU allows, so that what is compared is sharing and nothing else. All
weights stay in memory and nothing is ever loaded; the decode weights are even the same ones, so that the
memory that real separate models would fill is left to their caches. The caches are as large in sum, and are
shared out by the popularity that the load really has, which a server could not know. Kernels, graphs, prompt
chunks and batch limit are the same. A model without requests costs no time. The models take turns step by
step: that shares the device fairly, starves nobody, and while one waits for its turn its requests gather into
a larger batch. `longest-queue` serves whoever has most unfinished requests, which reads weights for the most
tokens and lets an unpopular model wait; it is there so that the choice can be checked. So is `--overlap off`:
an engine that prepares a step while the device works tells a token with its next turn, which costs this arm a
round on the way to the first token, and saves it the host's time in every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from qsun.core import SamplingParams, StepOutput
from qsun.engine.engine import DecodeEngine
from qsun_bench.engine_suites import Order
from qsun_bench.serve_metrics import Served
from qsun_bench.workload import Arrival


class Arm(Protocol):
    """Something that serves requests, a step at a time."""

    @property
    def engines(self) -> Sequence[DecodeEngine]:
        """All its engines."""

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do or to tell."""

    def submit(self, request_id: str, model: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Take in a request."""

    def step(self) -> Sequence[StepOutput]:
        """One step; what it told."""


class SharedArm:
    """All models in the batches of one engine."""

    def __init__(self, engine: DecodeEngine) -> None:
        self._engine = engine

    @property
    def engines(self) -> Sequence[DecodeEngine]:
        return [self._engine]

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request_id: str, model: str, prompt: Sequence[int], params: SamplingParams) -> None:
        self._engine.submit(list(prompt), model=model, params=params, request_id=request_id)

    def step(self) -> Sequence[StepOutput]:
        return self._engine.step()


class PerModelArm:
    """An engine for each model, of which one takes a step at a time.

    engines: by model, each with that model alone. Raises ValueError for an engine that has others.
    """

    def __init__(self, engines: Mapping[str, DecodeEngine], order: Order = "round-robin") -> None:
        for model, engine in engines.items():
            if engine.models != (model,):
                raise ValueError(f"the engine of {model!r} has the models {engine.models}, expected it alone")
        self._engines = dict(engines)
        self._order = order
        # Who has waited longest for a turn comes first.
        self._turn = list(engines)
        self._unfinished = dict.fromkeys(engines, 0)

    @property
    def engines(self) -> Sequence[DecodeEngine]:
        return list(self._engines.values())

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self._engines.values())

    def submit(self, request_id: str, model: str, prompt: Sequence[int], params: SamplingParams) -> None:
        self._engines[model].submit(list(prompt), model=model, params=params, request_id=request_id)
        self._unfinished[model] += 1

    def step(self) -> Sequence[StepOutput]:
        ready = [model for model in self._turn if self._engines[model].has_work]
        if not ready:
            return []
        chosen = ready[0]
        if self._order == "longest-queue":
            chosen = max(ready, key=self._unfinished.__getitem__)
        self._turn.remove(chosen)
        self._turn.append(chosen)
        outputs = self._engines[chosen].step()
        self._unfinished[chosen] -= sum(output.finish_reason is not None for output in outputs)
        return outputs


def play(
    arm: Arm,
    arrivals: Sequence[Arrival],
    prompts: Sequence[Sequence[int]],
    *,
    limit_s: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Sequence[Served], float]:
    """Serve a load by the wall clock. Returns what became of each arrival, and the seconds that it took.

    arrivals: in order of time. prompts: the token ids of each. limit_s: after so long the rest is left as it
    is, cancelled and not served whole. The seconds run to the last token, or to the limit.
    """
    served = [Served(arrival) for arrival in arrivals]
    waiting = 0
    begin = clock()
    wall = 0.0
    while True:
        now = clock() - begin
        if now >= limit_s:
            wall = now
            break
        while waiting < len(arrivals) and arrivals[waiting].at_s <= now:
            arrival = arrivals[waiting]
            params = SamplingParams(
                temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True, seed=waiting
            )
            arm.submit(str(waiting), arrival.model, prompts[waiting], params)
            served[waiting].lag_s = now - arrival.at_s
            waiting += 1
        if not arm.has_work:
            if waiting == len(arrivals):
                break
            sleep(min(arrivals[waiting].at_s, limit_s) - now)
            continue
        outputs = arm.step()
        now = clock() - begin
        for output in outputs:
            one = served[int(output.request_id)]
            one.stamps_s += [now] * len(output.token_ids)
            one.error = output.error or one.error
            wall = now
    for engine in arm.engines:
        for place in range(waiting):
            engine.cancel(str(place))
        while engine.has_work:
            engine.step()
    return served, wall
