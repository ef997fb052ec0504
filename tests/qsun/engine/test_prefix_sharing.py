"""Requests of one model with a common beginning: their decode steps look for the blocks that they share."""

from __future__ import annotations

from typing import Any

import pytest

from qsun import SamplingParams
from qsun.layers import prefill_attention
from qsun.models import decoder

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
COMMON = [1, 2, 3, 4, 5, 6, 7, 8]  # two blocks


def tables_of(engine: Any, monkeypatch: pytest.MonkeyPatch, model: list[str]) -> tuple[list[Any], list[Any]]:
    """What plans got for block tables, and the answers; the second request comes when the first one's KV is
    there.
    """
    seen: list[Any] = []
    plan = decoder.plan_paged_attention

    def watched(*arguments: Any, **named: Any) -> Any:
        table = named["block_table"]
        seen.append(None if table is None else table.tolist())
        return plan(*arguments, **named)

    monkeypatch.setattr(decoder, "plan_paged_attention", watched)
    engine.generate([[*COMMON, 9]], model=model[:1], params=PARAMS)
    answers = engine.generate([[*COMMON, 9], [*COMMON, 10, 11]], model=model, params=PARAMS)
    return seen, [answer.token_ids for answer in answers]


def test_a_step_is_given_the_blocks_to_look_at(make_engine, monkeypatch) -> None:
    with_sharing, answers = tables_of(make_engine(), monkeypatch, ["poet", "poet"])
    assert all(table is not None for table in with_sharing)
    both = [table for table in with_sharing if len(table) == 2]
    assert both and all(one[:2] == other[:2] and one[2] != other[2] for one, other in both)
    monkeypatch.undo()
    without, same_answers = tables_of(make_engine(prefix_reuse=False), monkeypatch, ["poet", "poet"])
    assert without and all(table is None for table in without)
    assert answers == same_answers


def test_two_models_share_no_block(make_engine, monkeypatch) -> None:
    tables, _ = tables_of(make_engine(), monkeypatch, ["poet", "cook"])
    both = [table for table in tables if len(table) == 2]
    assert both and all(not set(one[:3]) & set(other[:3]) for one, other in both)


def test_many_ends_of_one_long_beginning_take_the_memory_of_one(make_engine, monkeypatch) -> None:
    """Their chunks fit one step and all see the beginning, which is read back once for each: not at once.

    Memory is left for what one chunk at the end of the longest context reads.
    """
    common = [*range(100, 148)]  # twelve blocks
    prompts = [[*common, i, i, i] for i in range(8)]
    options = dict(max_model_len=64, max_batch_size=8)
    plain = make_engine(prefix_reuse=False, **options)
    expected = plain.generate([[*common, 9], *prompts], model="poet", params=PARAMS)
    gathered: list[int] = []
    right = prefill_attention._gathered

    def watched(cache: Any, scale: Any, runs: Any, q: Any) -> Any:
        gathered.append(len(runs) // cache.shape[1])
        return right(cache, scale, runs, q)

    monkeypatch.setattr(prefill_attention, "_gathered", watched)
    engine = make_engine(**options)
    answers = engine.generate([[*common, 9]], model="poet", params=PARAMS)
    gathered.clear()
    answers += engine.generate(prompts, model="poet", params=PARAMS)
    assert engine.stats().prefix_hit_tokens == 8 * len(common)
    assert gathered and max(gathered) <= 16, "more blocks than the longest sequence has"
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
