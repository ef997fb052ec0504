"""Chunks of prompts launched before the tokens of the last step are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsun import SamplingParams
from qsun.engine.runner import DecodeStep, Runner
from qsun.engine.scheduler import Scheduler
from qsun.engine.step import StepExecutor

LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What the engine did, in order: "prompt", "decode" for launches, "tokens" when it waited for some."""
    entries: list[str] = []

    def watch(owner, name, entry):
        right = getattr(owner, name)

        def watched(*arguments, **options):
            entries.append(entry)
            return right(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(Runner, "prefill", "prompt")
    watch(Runner, "decode", "decode")
    watch(DecodeStep, "tokens", "tokens")
    return entries


def read_a_long_prompt_beside_an_answer(make_engine, log, params: SamplingParams = LONG) -> list[str]:
    """The log of the calls in which a prompt of several chunks is read while another request decodes."""
    engine = make_engine(overlap="on", prefill_chunk=8)
    engine.submit([1, 2, 3], model="poet", params=params, request_id="old")
    for _ in range(4):
        engine.step()
    engine.submit(list(range(1, 33)), model="cook", params=LONG, request_id="new")
    log.clear()
    for _ in range(4):
        engine.step()
    return log[:]


def test_chunks_are_launched_before_the_last_step_is_waited_for(make_engine, log) -> None:
    entries = read_a_long_prompt_beside_an_answer(make_engine, log)
    # The first chunk needs the admission, which is planned with known tokens; the others wait for nothing.
    assert entries == ["tokens", "prompt", "decode", *(3 * ["prompt", "tokens", "decode"])]


def test_a_token_that_the_host_draws_waits_for_no_chunk(make_engine, log) -> None:
    """It is drawn on the device as well, behind whatever was launched before."""
    entries = read_a_long_prompt_beside_an_answer(make_engine, log, replace(LONG, logprobs=0))
    assert entries == 4 * ["tokens", "prompt", "decode"]


def test_waiting_before_every_chunk_is_caught(make_engine, log, monkeypatch) -> None:
    monkeypatch.setattr(Scheduler, "next_chunks", lambda self: [])
    with pytest.raises(AssertionError):
        test_chunks_are_launched_before_the_last_step_is_waited_for(make_engine, log)


def test_without_overlap_nothing_is_begun(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(StepExecutor, "_begin", lambda self: pytest.fail("begun"))
    engine = make_engine(overlap="off", prefill_chunk=8)
    (answer,) = engine.generate([list(range(1, 33))], model="cook", params=LONG)
    assert len(answer.token_ids) == 40


class Event:
    """A mark on a stream: when somebody has waited for it, all passes launched before it have ended."""

    def __init__(self, under_way: list[int]) -> None:
        self.under_way = under_way
        self.before = tuple(under_way)

    def synchronize(self) -> None:
        self.under_way[:] = [number for number in self.under_way if number not in self.before]


def most_passes_under_way(make_engine, monkeypatch) -> int:
    """Chunks of a lone long prompt that are launched and that nobody has waited for, at most."""
    under_way: list[int] = []
    most = launched = 0
    right = Runner.prefill

    def watched(self, stack, chunks):
        nonlocal most, launched
        launched += 1
        under_way.append(launched)
        most = max(most, len(under_way))
        return right(self, stack, chunks)

    monkeypatch.setattr(Runner, "prefill", watched)
    monkeypatch.setattr(Runner, "mark", lambda self: Event(under_way))
    engine = make_engine(overlap="on", prefill_chunk=4)
    engine.generate([list(range(1, 60))], model="cook", params=replace(LONG, max_tokens=2))
    # For the last one a decode step is waited for, which is launched behind it.
    assert launched == 15 and len(under_way) <= 1
    return most


def test_a_long_prompt_is_not_launched_to_its_end_at_once(make_engine, monkeypatch) -> None:
    """One chunk ahead of the device keeps it busy; who comes meanwhile would wait behind all of them."""
    assert most_passes_under_way(make_engine, monkeypatch) == 2


def test_running_ahead_of_the_device_is_caught(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    with pytest.raises(AssertionError):
        most_passes_under_way(make_engine, monkeypatch)


def test_a_module_that_fails_in_a_chunk_begun_early_ends_its_requests_alone(
    make_engine, log, monkeypatch
) -> None:
    engine = make_engine(overlap="on", prefill_chunk=8)
    (expected,) = engine.generate([[1, 2, 3]], model="poet", params=LONG)
    engine.submit([1, 2, 3], model="poet", params=LONG, request_id="old")
    engine.step()
    engine.submit(list(range(1, 33)), model="cook", params=LONG, request_id="new")
    outputs = [engine.step(), engine.step()]
    right = StepExecutor._begin

    def broken(self):
        def fail(*_):
            raise RuntimeError("a fuse blew")

        monkeypatch.setattr(Runner, "prefill", fail)
        return right(self)

    monkeypatch.setattr(StepExecutor, "_begin", broken)
    while engine.has_work:
        outputs.append(engine.step())
    told = [output for step in outputs for output in step]
    (error,) = [output for output in told if output.finish_reason == "error"]
    assert error.request_id == "new" and "a fuse blew" in error.error and "cook" in error.error
    tokens = [token for output in told if output.request_id == "old" for token in output.token_ids]
    assert tokens == list(expected.token_ids) and engine.stats().blocks_in_use == 0
