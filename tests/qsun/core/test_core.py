"""The nouns: what sampling parameters are refused, and who writes which position."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qsun.core import Request, SamplingParams, Sequence
from qsun.errors import RequestError

ABSURD = [
    ("temperature", -0.1, ">= 0"),
    ("temperature", float("nan"), ">= 0"),
    ("temperature", float("inf"), ">= 0"),
    ("temperature", "hot", ">= 0"),
    ("temperature", 10**400, ">= 0"),
    ("temperature", True, ">= 0"),
    ("top_k", -1, ">= 0"),
    ("top_k", 2.5, ">= 0"),
    ("top_p", 0.0, r"\(0, 1\]"),
    ("top_p", 1.5, r"\(0, 1\]"),
    ("top_p", None, r"\(0, 1\]"),
    ("min_p", -0.5, r"\[0, 1\]"),
    ("min_p", 1.01, r"\[0, 1\]"),
    ("repetition_penalty", 0.0, r"\[0.01, 100\]"),
    ("repetition_penalty", -2, r"\[0.01, 100\]"),
    ("repetition_penalty", 1e-320, r"\[0.01, 100\]"),
    ("repetition_penalty", 1e308, r"\[0.01, 100\]"),
    ("presence_penalty", 2.5, r"\[-2, 2\]"),
    ("frequency_penalty", -2.5, r"\[-2, 2\]"),
    ("frequency_penalty", float("nan"), r"\[-2, 2\]"),
    ("seed", -1, r"\[0, 2\*\*64\)"),
    ("seed", 2**64, r"\[0, 2\*\*64\)"),
    ("seed", 1.0, r"\[0, 2\*\*64\)"),
    ("logprobs", -1, r"\[0, 100\]"),
    ("logprobs", 101, r"\[0, 100\]"),
    ("stop", "text", "tuple or list"),
    ("stop", ("",), "non-empty"),
    ("stop", (3,), "non-empty"),
    ("stop_token_ids", 7, "tuple or list"),
    ("stop_token_ids", (-1,), ">= 0"),
    ("stop_token_ids", ("eos",), ">= 0"),
    ("max_tokens", 0, ">= 1"),
    ("max_tokens", None, ">= 1"),
    ("min_tokens", 129, r"\[0, max_tokens = 128\]"),
    ("min_tokens", -1, r"\[0, max_tokens = 128\]"),
    ("ignore_eos", 1, "True or False"),
]


@pytest.mark.damaged
@pytest.mark.parametrize(("name", "value", "expected"), ABSURD, ids=lambda value: repr(value)[:24])
def test_absurd_sampling_values_are_refused_by_name(name: str, value: object, expected: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must .*{expected}.*got ") as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)
    shown = value[0] if isinstance(value, tuple) else value
    assert repr(shown) in str(caught.value)


def test_bounds_are_accepted() -> None:
    params = SamplingParams(
        temperature=0,
        top_p=1,
        min_p=1,
        seed=2**64 - 1,
        logprobs=0,
        min_tokens=128,
        stop=["a"],
        stop_token_ids=[3],
    )
    assert params.greedy and params.stop == ("a",) and params.stop_token_ids == (3,)
    assert hash(params) == hash(params)


@pytest.mark.parametrize(("first_token", "prefill_length"), [("decode", 3), ("prefill", 4)])
def test_who_writes_which_position(first_token, prefill_length: int) -> None:
    request = Request("r", "m", (5, 6, 7, 8), SamplingParams(), 0, 0, 8)
    sequence = Sequence(request, "m", prefill_length, [5, 6, 7, 8], first_token=first_token)
    assert sequence.fill_target == prefill_length
    assert sequence.awaits_prefill_logits == (first_token == "prefill")
    sequence.tokens += [1, 2]
    assert sequence.fill_target == 5 and not sequence.awaits_prefill_logits
    assert sequence.output_token_ids == [1, 2] and sequence.num_output == 2
    writers = [sequence.writer(position) for position in range(6)]
    assert writers == ["prefill"] * prefill_length + ["decode"] * (6 - prefill_length)
    sequence.given = True
    assert sequence.writer(0) == "given" and sequence.writer(5) == "decode"


def test_the_nouns_and_the_scheduler_import_no_torch() -> None:
    code = (
        "import sys, qsun.core, qsun.engine.scheduler, qsun.kv_cache.block_tables\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
