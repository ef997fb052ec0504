"""Steps launched before the last one's tokens are known give the same tokens, whatever else happens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qsun import SamplingParams
from qsun.engine.decode_inputs import DecodeInputs


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("batch", [1, 3, 17, 64])
def test_tokens_equal_transformers_while_requests_join_and_leave(
    make_engine, script, cases, ahead, batch, overlap
) -> None:
    first_token, asks, expected = cases
    # Many at once, then one with nearly every step.
    asks = [replace(ask, at=max(0, i - batch // 2)) for i, ask in enumerate(asks[:batch])]
    engine = make_engine(
        first_token=first_token, overlap=overlap, prefill_chunk=40, max_batch_size=max(2, batch // 2)
    )
    told = script.play(engine, asks)
    assert [t.tokens for t in told] == expected[:batch]
    assert [t.error for t in told] == [None] * batch
    assert bool(ahead) == (overlap == "on")


def test_tokens_of_a_steady_batch_never_pass_through_the_host(
    make_engine, script, cases, ahead, monkeypatch
) -> None:
    """All but the first step of a batch in which nobody joins are launched ahead, ends by length included."""
    first_token, asks, _ = cases
    if first_token == "prefill":
        pytest.skip("the same after the first token")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (30, 18, 30, 11)]
    # Of one model, so that one step reads all prompts.
    asks = [replace(ask, params=own, model="poet") for ask, own in zip(asks, params, strict=False)]
    launches: list[bool] = []
    right = DecodeInputs.stage

    def watched(self, *, from_host):
        launches.append(from_host)
        right(self, from_host=from_host)

    engine = make_engine(overlap="on", prefill_chunk=1000)
    engine.prepare()
    monkeypatch.setattr(DecodeInputs, "stage", watched)
    script.play(engine, asks)
    # Rows move, which takes known tokens, when three are left of four (a bucket less would do for two).
    assert len(launches) == 30 and len(ahead) == launches.count(False) >= 27
    assert engine.stats().dropped_tokens == 0


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_draws_depend_on_the_request_alone(make_engine, script, ahead, first_token) -> None:
    asks = script.sampled_asks(20)
    together, apart = (
        script.play(make_engine(overlap=overlap, first_token=first_token, prefill_chunk=30), asks)
        for overlap in ("on", "off")
    )
    assert together == apart and ahead
    alone = [
        script.play(make_engine(overlap="on", first_token=first_token), [replace(a, at=0)])[0] for a in asks
    ]
    assert together == alone
    assert len({tuple(told.tokens) for told in together}) > 15


@pytest.mark.parametrize(
    ("options", "happened"),
    [
        (dict(blocks=24, prefill_chunk=12, prefix_reuse=False), ("rebuilds", "rebuilt_tokens")),
        (dict(blocks=24, prefill_chunk=12, swap_blocks=400), ("swaps",)),
        (dict(blocks=24, prefill_chunk=9, block_size=3, swap_blocks=4), ("preemptions",)),
    ],
    ids=["rebuilt", "swapped", "either"],
)
def test_preemptions_between_steps_launched_ahead(
    make_engine, script, cases, ahead, options, happened
) -> None:
    first_token, asks, expected = cases
    asks = [replace(ask, at=i // 2) for i, ask in enumerate(asks[:24])]
    engine = make_engine(first_token=first_token, overlap="on", **options)
    assert [told.tokens for told in script.play(engine, asks)] == expected[:24]
    assert ahead
    for name in happened:
        assert getattr(engine.stats(), name) > 0, f"{name}: the case did not test what it is for"


@pytest.mark.parametrize("seed", range(6))
def test_random_scripts_with_little_memory(make_engine, script, seed) -> None:
    """Everything at once: draws, penalties, stops, cancels, preemptions, and requests that wait."""
    draw = random.Random(seed)
    asks = []
    for ask in script.sampled_asks(24):
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
    on, off = (script.play(make_engine(overlap=overlap, **options), asks) for overlap in ("on", "off"))
    for ask, got, expected in zip(asks, on, off, strict=True):
        if "cancelled" in (got.reason, expected.reason):
            shorter = min(len(got.tokens), len(expected.tokens))
            assert ask.cancelled_at is not None and got.tokens[:shorter] == expected.tokens[:shorter]
        else:
            assert got == expected
