"""Steps launched before the last one's tokens are known: the same tokens, told once, and nothing left behind.

On a CPU a step is computed when it is launched, but its tokens reach the host when it is collected, as on a
GPU: what the host may not know yet, it does not know here either.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field, replace

import pytest

import qsun.engine.step as step_module
from qsun import DecodeEngine, SamplingParams
from qsun.core import StepOutput
from qsun.engine.cuda_graphs import batch_buckets
from qsun.engine.decode_inputs import DecodeInputs
from qsun.engine.runner import DecodeStep, Runner
from qsun.engine.scheduler import Scheduler
from qsun.engine.step import StepExecutor

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


@pytest.fixture(scope="module", params=["decode", "prefill"])
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


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("batch", [1, 3, 17, 64])
def test_tokens_equal_transformers_while_requests_join_and_leave(
    make_engine, cases, ahead, batch, overlap
) -> None:
    first_token, asks, expected = cases
    # Many at once, then one with nearly every step.
    asks = [replace(ask, at=max(0, i - batch // 2)) for i, ask in enumerate(asks[:batch])]
    engine = make_engine(
        first_token=first_token, overlap=overlap, prefill_chunk=40, max_batch_size=max(2, batch // 2)
    )
    told = play(engine, asks)
    assert [t.tokens for t in told] == expected[:batch]
    assert [t.error for t in told] == [None] * batch
    assert bool(ahead) == (overlap == "on")


def test_tokens_of_a_steady_batch_never_pass_through_the_host(make_engine, cases, ahead, monkeypatch) -> None:
    """All but the first step of a batch in which nobody joins are launched ahead, ends by length included."""
    first_token, asks, _ = cases
    if first_token == "prefill":
        pytest.skip("the same after the first token")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (30, 18, 30, 11)]
    asks = [replace(ask, params=own) for ask, own in zip(asks, params, strict=False)]
    launches: list[bool] = []
    right = DecodeInputs.stage

    def watched(self, *, from_host):
        launches.append(from_host)
        right(self, from_host=from_host)

    engine = make_engine(overlap="on", prefill_chunk=1000)
    engine.prepare()
    monkeypatch.setattr(DecodeInputs, "stage", watched)
    play(engine, asks)
    # Rows move, which takes known tokens, when three are left of four (a bucket less would do for two).
    assert len(launches) == 30 and len(ahead) == launches.count(False) >= 27
    assert engine.stats().dropped_tokens == 0


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


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_draws_depend_on_the_request_alone(make_engine, ahead, first_token) -> None:
    asks = sampled_asks(20)
    together, apart = (
        play(make_engine(overlap=overlap, first_token=first_token, prefill_chunk=30), asks)
        for overlap in ("on", "off")
    )
    assert together == apart and ahead
    alone = [play(make_engine(overlap="on", first_token=first_token), [replace(a, at=0)])[0] for a in asks]
    assert together == alone
    assert len({tuple(told.tokens) for told in together}) > 15


def needing_the_host() -> list[Ask]:
    asks = sampled_asks(12)
    changes = (
        dict(repetition_penalty=1.3),
        {},
        dict(logprobs=2),
        {},
        dict(min_tokens=4),
        dict(presence_penalty=0.5, frequency_penalty=0.5, logprobs=0),
    )
    return [
        replace(ask, at=5 * i, params=replace(ask.params, max_tokens=5 + i, **changes[i % len(changes)]))
        for i, ask in enumerate(asks)
    ]


@pytest.fixture
def host_check(make_engine):
    """Whether rows that the host draws, among others, come out as without overlap."""
    asks = needing_the_host()

    def check() -> bool:
        told = play(make_engine(overlap="on"), asks)
        expected = play(make_engine(overlap="off"), asks)
        same = [
            (a.tokens, a.text, a.reason) == (b.tokens, b.text, b.reason)
            and [entry.token_id for entry in a.logprobs] == [entry.token_id for entry in b.logprobs]
            and [entry.logprob for entry in a.logprobs]
            == pytest.approx([entry.logprob for entry in b.logprobs], abs=1e-4)
            for a, b in zip(told, expected, strict=True)
        ]
        return all(same)

    return check


def test_rows_that_the_host_draws_among_others(host_check, ahead) -> None:
    assert host_check() and ahead


def test_following_a_step_whose_rows_the_host_draws_is_caught(host_check, monkeypatch) -> None:
    monkeypatch.setattr(step_module._Launched, "can_be_followed", property(lambda self: True))
    assert not host_check()


HOT = SamplingParams(temperature=1000.0, max_tokens=40)


@pytest.fixture
def ending_check(make_engine, reference):
    """Requests that end at any moment by an end id, a stop id or a stop string, and others in their place."""
    # So hot that all 300 tokens are as likely.
    stops = (dict(), dict(stop_token_ids=tuple(range(0, 300, 20))), dict(stop=("a", "b", "c", "d")))
    asks = [Ask([i], "poet", replace(HOT, seed=i, **stops[i % 3]), at=i // 8) for i in range(24)]
    expected = play(make_engine(overlap="off", max_batch_size=6), asks)
    assert {told.reason for told in expected} == {"stop", "length"}

    def check() -> list[str]:
        engine = make_engine(overlap="on", max_batch_size=6)
        try:
            told = play(engine, asks)
        except AssertionError as failure:
            return [str(failure)]
        found = [
            f"request {index}: {got} instead of {wanted}"
            for index, (got, wanted) in enumerate(zip(told, expected, strict=True))
            if got != wanted
        ]
        if not engine.stats().dropped_tokens:
            found.append("no request ended while a step was under way: nothing was tested")
        return found

    return check


def test_ends_while_a_step_is_under_way(ending_check) -> None:
    assert ending_check() == []


def test_a_stale_token_is_caught(ending_check, monkeypatch) -> None:
    """The next step reads what the host knew last, one token behind."""
    right = DecodeInputs.stage
    monkeypatch.setattr(DecodeInputs, "stage", lambda self, from_host: right(self, from_host=True))
    assert ending_check()


def test_telling_the_token_too_many_is_caught(ending_check, monkeypatch) -> None:
    right = StepExecutor._collect

    def naive(self, launched):
        members = () if launched.decode is None else launched.decode.members
        over = [(sequence, row) for sequence, row in members if sequence.state == "finished"]
        right(self, launched)
        for sequence, row in over:
            tokens = (launched.decode.tokens()[row],)
            request = sequence.request
            self.outputs.append(StepOutput(request.request_id, request.model, tokens, "", None, None))

    monkeypatch.setattr(StepExecutor, "_collect", naive)
    assert ending_check()


def test_going_on_with_a_request_that_has_ended_is_caught(ending_check, monkeypatch) -> None:
    monkeypatch.setattr(Runner, "leave", lambda self, sequence: None)
    assert ending_check()


def test_collecting_the_step_before_the_last_twice_is_caught(ending_check, monkeypatch) -> None:
    """One result buffer instead of two: the step under way overwrites what was not read."""
    right = DecodeInputs.fetch

    def naive(self):
        self._results[1] = self._results[0]
        return right(self)

    monkeypatch.setattr(DecodeInputs, "fetch", naive)
    assert ending_check()


def test_counters_are_those_of_the_tokens_that_were_told(make_engine) -> None:
    asks = [Ask([i] * (1 + i % 5), "poet", replace(HOT, seed=i)) for i in range(12)]
    snapshots = []
    for overlap in ("on", "off"):
        engine = make_engine(overlap=overlap, prefill_chunk=1000)
        told = play(engine, asks)
        stats = engine.stats()
        assert stats.output_tokens == sum(len(t.tokens) for t in told)
        assert stats.host_seconds > 0 and stats.wait_seconds >= 0
        snapshots.append(replace(stats, dropped_tokens=0, host_seconds=0.0, wait_seconds=0.0))
        assert bool(stats.dropped_tokens) == (overlap == "on")
    assert snapshots[0] == snapshots[1]


@pytest.mark.parametrize(
    ("options", "happened"),
    [
        (dict(blocks=24, prefill_chunk=12, prefix_reuse=False), ("rebuilds", "rebuilt_tokens")),
        (dict(blocks=24, prefill_chunk=12, swap_blocks=400), ("swaps",)),
        (dict(blocks=24, prefill_chunk=9, block_size=3, swap_blocks=4), ("preemptions",)),
    ],
    ids=["rebuilt", "swapped", "either"],
)
def test_preemptions_between_steps_launched_ahead(make_engine, cases, ahead, options, happened) -> None:
    first_token, asks, expected = cases
    asks = [replace(ask, at=i // 2) for i, ask in enumerate(asks[:24])]
    engine = make_engine(first_token=first_token, overlap="on", **options)
    assert [told.tokens for told in play(engine, asks)] == expected[:24]
    assert ahead
    for name in happened:
        assert getattr(engine.stats(), name) > 0, f"{name}: the case did not test what it is for"


@pytest.mark.parametrize("call", range(1, 14))
def test_cancelling_while_a_step_is_under_way(make_engine, cases, call) -> None:
    """The cancelled one was told a beginning of its answer; the others get theirs, one in its place."""
    first_token, asks, _ = cases
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    asks = [replace(ask, params=params) for ask in asks[:3]]
    expected = play(make_engine(first_token=first_token, overlap="off"), asks)
    asks[1].cancelled_at = call
    # Waits for the cancelled one's place.
    later = replace(asks[0], at=1)
    engine = make_engine(first_token=first_token, overlap="on", max_batch_size=3)
    told = play(engine, [*asks, later])
    assert [told[i].tokens for i in (0, 2, 3)] == [expected[i].tokens for i in (0, 2, 0)]
    tokens = told[1].tokens
    assert tokens == expected[1].tokens[: len(tokens)] and len(tokens) == min(call - 1, 12)
    assert told[1].reason == ("cancelled" if len(tokens) < 12 else "length")


@pytest.mark.parametrize("seed", range(6))
def test_random_scripts_with_little_memory(make_engine, seed) -> None:
    """Everything at once: draws, penalties, stops, cancels, preemptions, and requests that wait."""
    draw = random.Random(seed)
    asks = []
    for ask in sampled_asks(24):
        extra = draw.choice(({}, {}, {}, dict(repetition_penalty=1.2), dict(stop=("e",)), dict(min_tokens=3)))
        tokens = draw.randrange(4, 24)
        params = replace(ask.params, seed=draw.getrandbits(32), max_tokens=tokens, **extra)
        cancelled = draw.choice((None, None, None, None, draw.randrange(30)))
        asks.append(replace(ask, params=params, at=draw.randrange(20), cancelled_at=cancelled))
    options = dict(
        blocks=draw.choice((16, 24, 60)),
        swap_blocks=draw.choice((0, 10, 100)),
        prefill_chunk=draw.choice((4, 16, 64)),
        max_batch_size=draw.choice((3, 7, 20)),
        first_token=draw.choice(("decode", "prefill")),
    )
    on, off = (play(make_engine(overlap=overlap, **options), asks) for overlap in ("on", "off"))
    for ask, got, expected in zip(asks, on, off, strict=True):
        if "cancelled" in (got.reason, expected.reason):
            shorter = min(len(got.tokens), len(expected.tokens))
            assert ask.cancelled_at is not None and got.tokens[:shorter] == expected.tokens[:shorter]
        else:
            assert got == expected


def test_what_a_step_gained_is_told_by_the_next_call(make_engine) -> None:
    engine = make_engine(overlap="on")
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    (expected,) = engine.generate("some text", model="poet", params=params)
    engine.submit("some text", model="poet", params=params)
    told = []
    for _ in range(4):
        assert engine.has_work
        told.append([token for output in engine.step() for token in output.token_ids])
    assert told == [[], *([token] for token in expected.token_ids)]
    assert not engine.has_work and engine.step() == []


def test_a_request_that_comes_is_not_kept_waiting(make_engine) -> None:
    """Three calls: its prompt, its first token drawn, its first token told."""
    engine = make_engine(overlap="on")
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine.submit("the first", model="poet", params=long, request_id="old")
    for _ in range(5):
        engine.step()
    engine.submit("the second", model="cook", params=long, request_id="new")
    gained = [{output.request_id for output in engine.step()} for _ in range(3)]
    assert gained[0] == {"old"} and gained[2] == {"old", "new"}


def test_never_looking_for_other_work_is_caught(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(Scheduler, "has_other_work", lambda self, num_decoding: False)
    with pytest.raises(AssertionError):
        test_a_request_that_comes_is_not_kept_waiting(make_engine)


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_step_launched_ahead_that_fails(make_engine, monkeypatch, where) -> None:
    """What was drawn before is told first; then the batch ends in errors, and the engine goes on."""
    engine = make_engine(overlap="on")
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (expected,) = engine.generate("some text", model="poet", params=params)
    engine.submit("some text", model="poet", params=params, request_id="r")
    outputs = [engine.step() for _ in range(4)]

    def broken(*_):
        raise RuntimeError("a fuse blew")

    monkeypatch.setattr(
        *((Runner, "_decode_forward") if where == "launch" else (DecodeStep, "tokens")), broken
    )
    while engine.has_work:
        outputs.append(engine.step())
    monkeypatch.undo()
    told = [output for step in outputs for output in step]
    tokens = [token for output in told for token in output.token_ids]
    # The token under way is lost only where nobody could read it.
    assert tokens == list(expected.token_ids[: 4 if where == "launch" else 3])
    assert told[-1].finish_reason == "error" and "a fuse blew" in told[-1].error
    assert engine.stats().blocks_in_use == 0
    assert engine.generate("some text", model="poet", params=params)[0].token_ids == expected.token_ids


@pytest.mark.parametrize("call", range(2, 9))
def test_an_interrupted_step_is_computed_again(make_engine, monkeypatch, call) -> None:
    """Whatever interrupts a call, tokens that were not collected are drawn again, and are the same.

    A block may have been taken for the step that was launched ahead, which is then the next one's.
    """
    engine = make_engine(overlap="on")
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    (expected,) = engine.generate("some text", model="poet", params=params)
    engine = make_engine(overlap="on")
    engine.prepare()
    for part in (part for layer in engine._book.workspace.kv_cache.layers for part in layer):
        part.fill_(float("nan"))
    engine.submit("some text", model="poet", params=params, request_id="r")
    outputs = [output for _ in range(call) for output in engine.step()]
    right = StepExecutor._collect

    def interrupted(self, launched):
        monkeypatch.setattr(StepExecutor, "_collect", right)
        raise KeyboardInterrupt

    monkeypatch.setattr(StepExecutor, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    outputs += [output for _ in range(3) for output in engine.step()]
    # Whoever joins has all rows filled from what the sequences say.
    engine.submit("another text", model="cook", params=params, request_id="other")
    while engine.has_work:
        outputs += engine.step()
    tokens = [token for output in outputs if output.request_id == "r" for token in output.token_ids]
    assert tokens == list(expected.token_ids)


@pytest.mark.damaged
def test_an_unknown_overlap_is_refused(make_engine) -> None:
    with pytest.raises(ValueError, match="overlap must be one of 'auto', 'on', 'off', got 'maybe'"):
        make_engine(overlap="maybe")
