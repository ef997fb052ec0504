"""Rows that the host draws hold up the step that would follow, and change nothing in the rows beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import qsun.engine.step as step_module


def needing_the_host(asks: list) -> list:
    """The same requests, half of them with options that only the host can follow."""
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
def host_check(make_engine, script):
    """Whether rows that the host draws, among others, come out as without overlap."""
    asks = needing_the_host(script.sampled_asks(12))

    def check() -> bool:
        told = script.play(make_engine(overlap="on"), asks)
        expected = script.play(make_engine(overlap="off"), asks)
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
