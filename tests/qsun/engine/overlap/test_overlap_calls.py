"""What each call of `step` tells when steps are launched ahead, and calls that fail or are interrupted."""

from __future__ import annotations

import pytest

from qsun import SamplingParams
from qsun.engine.runner import DecodeStep, Runner
from qsun.engine.scheduler import Scheduler
from qsun.engine.step import StepExecutor


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
