"""A decode step shares its attention out once a window, and every layer of that window gets the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsun.layers import attention as layers
from qsun.models import decoder
from qsun.modules.decode import load_decode_module


@pytest.mark.parametrize(
    ("kind", "windows"), [("llama", [None, None, None]), ("qwen2", [None, 8, 8])], ids=["one", "two"]
)
def test_one_plan_a_window(
    kind: str, windows: list[int | None], tiny, paged, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = load_decode_module(tiny(kind).path, dtype=torch.float32, device="cpu")
    assert list(decode.config.windows) == windows
    made: list[Any] = []
    used: list[Any] = []
    plan, attend = decoder.plan_paged_attention, layers.paged_attention_decode

    def watched_plan(*arguments: Any, **named: Any) -> Any:
        made.append(plan(*arguments, **named))
        return made[-1]

    def watched_attend(*arguments: Any, **named: Any) -> Any:
        used.append(named["plan"])
        return attend(*arguments, **named)

    sequence, alone = paged(decode), paged(decode)
    prompt = list(range(5, 16))
    sequence.prefill(prompt)
    alone.prefill(prompt)
    expected = alone.step(7)
    monkeypatch.setattr(decoder, "plan_paged_attention", watched_plan)
    monkeypatch.setattr(layers, "paged_attention_decode", watched_attend)
    assert torch.equal(sequence.step(7), expected)
    assert [one.problem.window for one in made] == list(dict.fromkeys(windows))
    assert [one.problem.window for one in used] == windows
    assert all(any(one is other for other in made) for one in used)
    sequence.step(8)
    assert len(made) == 2 * len(set(windows))
