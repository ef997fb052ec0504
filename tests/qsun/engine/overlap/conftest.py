"""Scripts of requests for an engine, which steps launched ahead may not change.

On a CPU a step is computed when it is launched, but its tokens reach the host when it is collected, as on a
GPU: what the host may not know yet, it does not know here either.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from qsun import DecodeEngine, SamplingParams
from qsun.engine.cuda_graphs import batch_buckets
from qsun.engine.runner import DecodeStep, Runner

THREE = ("poet", "clerk", "cook")


@dataclass
class Ask:
    """One request of a script: what, and before which call of `step` it comes and is cancelled."""

    prompt: list[int]
    model: str
    params: SamplingParams
    at: int = 0
    cancelled_at: int | None = None


@dataclass
class Told:
    """All that an engine has told of one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


def play(engine: DecodeEngine, asks: list[Ask], *, padded: bool = True) -> list[Told]:
    """Run a script to its end.  padded: batches in buckets as with graphs, so that rows stay empty."""
    engine.prepare()
    runner = engine._book.workspace.runner
    if padded:
        runner.use_buckets(batch_buckets(engine.options.max_batch_size))
    told: dict[str, Told] = defaultdict(Told)
    call = 0
    while engine.has_work or any(ask.at >= call for ask in asks):
        for index, ask in enumerate(asks):
            if ask.at == call:
                engine.submit(ask.prompt, model=ask.model, params=ask.params, request_id=str(index))
            if ask.cancelled_at == call:
                engine.cancel(str(index))
        for output in engine.step():
            mine = told[output.request_id]
            assert mine.reason is None, "told after its end"
            mine.tokens += output.token_ids
            mine.text += output.text
            mine.logprobs += output.logprobs or ()
            mine.reason, mine.error = output.finish_reason, output.error
        call += 1
    scheduler = engine._book.workspace.scheduler
    assert not scheduler.live
    scheduler.tables.check([])
    stats = engine.stats()
    assert stats.blocks_in_use == stats.swap_blocks_in_use == runner.num_decoding == 0
    return [told[str(index)] for index in range(len(asks))]


def sampled_asks(count: int) -> list[Ask]:
    draw = random.Random(8)
    kinds = (
        dict(temperature=0.0),
        dict(temperature=0.9, top_k=20),
        dict(temperature=1.3, top_p=0.8),
        dict(temperature=0.7, min_p=0.05),
        dict(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01),
    )
    return [
        Ask(
            [draw.randrange(256) for _ in range(draw.randrange(1, 20))],
            THREE[i % 3],
            SamplingParams(seed=draw.getrandbits(64), max_tokens=draw.randrange(1, 20), **kinds[i % 5]),
            at=draw.randrange(6),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def script() -> SimpleNamespace:
    """How a script is written and played, as a fixture, for tests import no conftest."""
    return SimpleNamespace(Ask=Ask, play=play, sampled_asks=sampled_asks)


@pytest.fixture
def ahead(monkeypatch) -> list[DecodeStep]:
    """The steps that were launched before the tokens that they read were known."""
    steps: list[DecodeStep] = []
    right = Runner.decode_next

    def watched(self, extend):
        step = right(self, extend)
        if step is not None:
            steps.append(step)
        return step

    monkeypatch.setattr(Runner, "decode_next", watched)
    return steps


@pytest.fixture(scope="session", params=["decode", "prefill"])
def cases(request, tiny, reference):
    """(convention, asks, greedy answers by transformers): 64 requests of three tasks and many lengths."""
    draw = random.Random(5)
    asks, expected = [], []
    for index in range(64):
        model, length = THREE[index % 3], draw.choice((1, 2, 5, 9, 16, 17, 20))
        (prompt,), (answer,) = reference.cases(
            index,
            1,
            24,
            lambda p, m=model, n=length: reference.sun(tiny.tasks[m], tiny.base, p, n, request.param),
        )
        asks.append(Ask(prompt, model, SamplingParams(temperature=0, max_tokens=length)))
        expected.append(answer)
    return request.param, asks, expected
