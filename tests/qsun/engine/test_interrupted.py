"""Interrupted calls: nothing is told twice or to the wrong request, and nobody waits for ever."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

import qsun.engine.step as step_module
from qsun import DecodeEngine, SamplingParams
from qsun.engine.answers import Answer
from qsun.engine.step import StepExecutor

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class Once:
    """Does what a method does, but for one call, which raises KeyboardInterrupt before or after that."""

    def __init__(self, right: Callable, *, call: int, after: bool = False) -> None:
        self.right, self.left, self.after = right, call, after

    def __get__(self, owner, _):
        def method(*args, **keywords):
            self.left -= 1
            if self.left == 0 and not self.after:
                raise KeyboardInterrupt
            result = self.right(owner, *args, **keywords)
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        return method


def run(engine: DecodeEngine) -> tuple[dict[str, list[int]], int]:
    """Tokens told of each request, and how often a call was interrupted."""
    told: dict[str, list[int]] = defaultdict(list)
    ended: set[str] = set()
    interruptions = 0
    for _ in range(60):
        if not engine.has_work:
            return told, interruptions
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            interruptions += 1
            continue
        for output in outputs:
            assert output.request_id not in ended, "told after its end"
            told[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                assert output.finish_reason == "length", output.error
                ended.add(output.request_id)
    raise AssertionError("a request waits for ever")


def submit(engine: DecodeEngine) -> None:
    for model, prompt in (("poet", [1, 2, 3]), ("clerk", [9, 8, 7]), ("cook", [5] * 9)):
        engine.submit(prompt, model=model, params=GREEDY, request_id=model)


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize(
    ("name", "after"),
    [("_collect", False), ("_launch", True), ("_tell_untold", True), ("_draw_by_host", True)],
)
def test_all_tokens_come_whatever_was_interrupted(
    make_engine, monkeypatch, overlap, first_token, name, after
) -> None:
    engine = make_engine(overlap=overlap, first_token=first_token)
    submit(engine)
    expected, _ = run(engine)
    interrupted = 0
    for call in range(1, 9):
        monkeypatch.undo()
        engine = make_engine(overlap=overlap, first_token=first_token)
        submit(engine)
        monkeypatch.setattr(StepExecutor, name, Once(getattr(StepExecutor, name), call=call, after=after))
        told, interruptions = run(engine)
        assert told == expected and engine.stats().blocks_in_use == 0
        interrupted += interruptions
    assert interrupted


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_an_interruption_while_a_token_is_told_costs_no_other_request_its_own(
    make_engine, monkeypatch, overlap
) -> None:
    engine = make_engine(overlap=overlap)
    submit(engine)
    expected, _ = run(engine)
    for call in range(1, 10):
        monkeypatch.undo()
        engine = make_engine(overlap=overlap)
        submit(engine)
        monkeypatch.setattr(Answer, "token", Once(Answer.token, call=call))
        told, interruptions = run(engine)
        lost = sum(len(tokens) for tokens in expected.values()) - sum(map(len, told.values()))
        assert interruptions == 1 and lost == 1


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_what_an_interrupted_call_left_is_not_told_to_a_new_request(
    make_engine, monkeypatch, overlap
) -> None:
    engine = make_engine(overlap=overlap)
    (expected,) = engine.generate([[9, 8, 7]], model="poet", params=GREEDY)
    stream = engine.stream([1, 2, 3], model="poet", params=GREEDY, request_id="again")
    next(stream)
    monkeypatch.setattr(StepExecutor, "_tell_untold", Once(StepExecutor._tell_untold, call=2, after=True))
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    stream.close()
    assert not engine.has_work
    outputs = engine.stream([9, 8, 7], model="poet", params=GREEDY, request_id="again")
    assert [token for output in outputs for token in output.token_ids] == list(expected.token_ids)


def test_logits_that_cannot_be_gathered_end_their_requests_alone(make_engine, monkeypatch) -> None:
    engine = make_engine(overlap="on")
    (expected,) = engine.generate([[1, 2, 3]], model="poet", params=GREEDY)

    def broken(logits, rows):
        raise MemoryError("no room")

    monkeypatch.setattr(step_module, "_rows", broken)
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=6, logprobs=1)]
    fine, failed = engine.generate([[1, 2, 3]] * 2, model="poet", params=params)
    assert fine.token_ids == expected.token_ids and fine.finish_reason == "length"
    assert failed.finish_reason == "error" and "no room" in failed.error


def test_who_ended_by_a_stop_string_takes_no_block_from_others(make_engine) -> None:
    """The token that ends it needs another block; nobody gives way for that, with overlap or without."""
    engine = make_engine(overlap="off")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    (long,) = engine.generate([[1, 2, 3]], model="poet", params=params)
    ended, most = [], 0
    for count in range(1, 30):
        stop = engine.tokenizer.decode(list(long.token_ids[:count]))[-2:]
        preemptions = []
        for overlap in ("on", "off"):
            engine = make_engine(overlap=overlap, blocks=12)
            engine.submit(
                [1, 2, 3],
                model="poet",
                request_id="a",
                params=SamplingParams(temperature=0, max_tokens=37, ignore_eos=True, stop=(stop,)),
            )
            engine.submit(
                [4] * 5,
                model="clerk",
                request_id="b",
                params=SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
            )
            outputs = []
            while engine.has_work:
                outputs += engine.step()
            preemptions.append(engine.stats().preemptions)
            ended += [output.finish_reason for output in outputs if output.request_id == "a"]
        assert preemptions[0] == preemptions[1]
        most = max(most, *preemptions)
    assert "stop" in ended and most > 0
