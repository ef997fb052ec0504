"""Norms that are left to the next product, in the engine: the same tokens, and which norms those are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsun import DecodeEngine, SamplingParams
from qsun.layers import residual
from qsun.layers.linear import QuantLinear

MOST_ROWS = 16


@pytest.fixture
def left(monkeypatch) -> list[int]:
    """The rows of every norm that was left; the library says yes wherever its kernels might."""
    rows: list[int] = []
    leave_norm = QuantLinear.leave_norm

    def watched(self: QuantLinear, x: torch.Tensor, *arguments: Any) -> Any:
        rows.append(x.shape[0])
        return leave_norm(self, x, *arguments)

    monkeypatch.setattr(residual, "norm_may_pend", lambda rows, weight, reader: 0 < rows <= MOST_ROWS)
    monkeypatch.setattr(QuantLinear, "leave_norm", watched)
    return rows


def answers(path: Any, task: Any, prompts: list[list[int]]) -> list[list[int]]:
    engine = DecodeEngine.from_pretrained(
        path,
        bits=4,
        group_size=32,
        dtype=torch.float32,
        device="cpu",
        memory="4MiB",
        block_size=4,
    )
    engine.add_model("poet", task)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [completion.token_ids for completion in engine.generate(prompts, model="poet", params=params)]


@pytest.mark.parametrize("requests", [1, 5, 20])
def test_tokens_are_those_without(tiny, left, monkeypatch, requests) -> None:
    """Batches of up to 16 rows leave norms; more rows, and the last layer's norm, do not."""
    generator = torch.Generator().manual_seed(requests)
    prompts = [
        torch.randint(3, 250, (3 + index % 7,), generator=generator).tolist() for index in range(requests)
    ]
    got = answers(tiny.paths["base"], tiny.paths["poet"], prompts)
    assert all(len(tokens) == 12 for tokens in got)
    assert all(rows <= MOST_ROWS for rows in left)
    if requests <= MOST_ROWS:
        assert len(left) > 0
    layers = tiny.base.config.num_hidden_layers
    assert len(left) % (2 * layers - 1) == 0  # of each pass: o, and down of all layers but the last
    monkeypatch.undo()
    assert got == answers(tiny.paths["base"], tiny.paths["poet"], prompts)
