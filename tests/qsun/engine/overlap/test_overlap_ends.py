"""Requests that end or are cancelled while a step of theirs is under way: what it gains is told to nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsun import SamplingParams
from qsun.core import StepOutput
from qsun.engine.decode_inputs import DecodeInputs
from qsun.engine.runner import Runner
from qsun.engine.step import StepExecutor

HOT = SamplingParams(temperature=1000.0, max_tokens=40)


@pytest.fixture
def ending_check(make_engine, script):
    """Requests that end at any moment by an end id, a stop id or a stop string, and others in their place."""
    # So hot that all 300 tokens are as likely.
    stops = (dict(), dict(stop_token_ids=tuple(range(0, 300, 20))), dict(stop=("a", "b", "c", "d")))
    asks = [script.Ask([i], "poet", replace(HOT, seed=i, **stops[i % 3]), at=i // 8) for i in range(24)]
    expected = script.play(make_engine(overlap="off", max_batch_size=6), asks)
    assert {told.reason for told in expected} == {"stop", "length"}

    def check() -> list[str]:
        engine = make_engine(overlap="on", max_batch_size=6)
        try:
            told = script.play(engine, asks)
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


def test_counters_are_those_of_the_tokens_that_were_told(make_engine, script) -> None:
    asks = [script.Ask([i] * (1 + i % 5), "poet", replace(HOT, seed=i)) for i in range(12)]
    snapshots = []
    for overlap in ("on", "off"):
        engine = make_engine(overlap=overlap, prefill_chunk=1000)
        told = script.play(engine, asks)
        stats = engine.stats()
        assert stats.output_tokens == sum(len(t.tokens) for t in told)
        assert stats.host_seconds > 0 and stats.wait_seconds >= 0
        snapshots.append(replace(stats, dropped_tokens=0, host_seconds=0.0, wait_seconds=0.0))
        assert bool(stats.dropped_tokens) == (overlap == "on")
    assert snapshots[0] == snapshots[1]


@pytest.mark.parametrize("call", range(1, 14))
def test_cancelling_while_a_step_is_under_way(make_engine, script, cases, call) -> None:
    """The cancelled one was told a beginning of its answer; the others get theirs, one in its place."""
    first_token, asks, _ = cases
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    # Of one model, so that one step reads all prompts.
    asks = [replace(ask, params=params, model="poet") for ask in asks[:3]]
    expected = script.play(make_engine(first_token=first_token, overlap="off"), asks)
    asks[1].cancelled_at = call
    # Waits for the cancelled one's place.
    later = replace(asks[0], at=1)
    engine = make_engine(first_token=first_token, overlap="on", max_batch_size=3)
    told = script.play(engine, [*asks, later])
    assert [told[i].tokens for i in (0, 2, 3)] == [expected[i].tokens for i in (0, 2, 0)]
    tokens = told[1].tokens
    assert tokens == expected[1].tokens[: len(tokens)] and len(tokens) == min(call - 1, 12)
    assert told[1].reason == ("cancelled" if len(tokens) < 12 else "length")
