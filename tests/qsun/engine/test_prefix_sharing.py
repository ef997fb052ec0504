"""Requests of one model with a common beginning: their decode steps look for the blocks that they share."""

from __future__ import annotations

from typing import Any

import pytest

from qsun import SamplingParams
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
