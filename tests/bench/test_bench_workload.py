"""Arrivals: seeded, of the lengths that they should have; and traces that are told what is wrong in them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from qsun_bench.percentiles import percentile
from qsun_bench.popularity import zipf_shares
from qsun_bench.results import ResultsError
from qsun_bench.workload import OUTPUTS, PROMPTS, Arrival, Lengths, poisson, read_trace


def test_arrivals_are_repeatable_and_seeded() -> None:
    load = poisson(5.0, 20.0, models=4, zipf=1.0, seed=3)
    assert load == poisson(5.0, 20.0, models=4, zipf=1.0, seed=3)
    assert load != poisson(5.0, 20.0, models=4, zipf=1.0, seed=4)
    times = [arrival.at_s for arrival in load]
    assert times == sorted(times) and times[0] == 0.0 and times[-1] < 20.0


def test_rates_make_one_load_denser() -> None:
    slow, fast = (poisson(rate, 50.0, models=4, zipf=1.0) for rate in (1.0, 4.0))
    assert len(fast) > 2 * len(slow)
    for one, other in zip(slow, fast, strict=False):
        assert (one.model, one.prompt_tokens, one.output_tokens) == (
            other.model, other.prompt_tokens, other.output_tokens,
        )  # fmt: skip


def test_the_process_is_poisson() -> None:
    times = [arrival.at_s for arrival in poisson(10.0, 1000.0, models=1, zipf=0.0)]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
    # An exponential gap is as wide as it is long, and a third of them is longer than the mean.
    assert statistics.pstdev(gaps) == pytest.approx(0.1, rel=0.07)
    assert statistics.fmean(gap > 0.1 for gap in gaps) == pytest.approx(math.exp(-1), abs=0.03)


def test_models_follow_zipf() -> None:
    load = poisson(10.0, 1000.0, models=8, zipf=1.0)
    for place, share in enumerate(zipf_shares(8, 1.0)):
        found = statistics.fmean(arrival.model == f"model-{place}" for arrival in load)
        assert found == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(("lengths", "name"), [(PROMPTS, "prompt_tokens"), (OUTPUTS, "output_tokens")])
def test_lengths_are_those_of_the_trace(lengths: Lengths, name: str) -> None:
    drawn = [getattr(arrival, name) for arrival in poisson(10.0, 1000.0, models=1, zipf=0.0)]
    assert percentile(drawn, 0.5) == pytest.approx(lengths.median, rel=0.05)
    assert percentile(drawn, 0.95) == pytest.approx(lengths.p95, rel=0.07)
    assert lengths.least <= min(drawn) and max(drawn) <= lengths.most


@pytest.mark.parametrize("values", [(10, 5, 1, 20), (10, 20, 11, 30), (10, 20, 1, 19), (10, 20, 0, 30)])
def test_lengths_that_make_no_sense(values: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 <= least <= median <= p95 <= most"):
        Lengths(*values)


@pytest.mark.parametrize(
    ("rate", "duration", "says"), [(0.0, 1.0, "rate is 0"), (1.0, 0.0, "duration_s is 0")]
)
def test_loads_that_make_no_sense(rate: float, duration: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        poisson(rate, duration, models=1, zipf=0.0)


ROWS = [
    {"arrival_s": 1.5, "model": "sql", "prompt_tokens": 30, "output_tokens": 4},
    {"arrival_s": 0, "model": "chat", "prompt_tokens": 7, "output_tokens": 9},
]


def test_a_trace_of_either_format(tmp_path: Path) -> None:
    lines = tmp_path / "trace.jsonl"
    lines.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    table = tmp_path / "trace.csv"
    table.write_text("model,arrival_s,prompt_tokens,output_tokens\nsql,1.5,30,4\nchat,0,7,9\n")
    expected = [Arrival(0.0, "chat", 7, 9), Arrival(1.5, "sql", 30, 4)]
    assert read_trace(lines) == expected and read_trace(table) == expected


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": None}, "trace.jsonl:2 has no model"),
        ({"arrival_s": -1}, "trace.jsonl:2: arrival_s is -1, expected seconds of at least 0"),
        ({"arrival_s": "soon"}, "trace.jsonl:2: arrival_s is 'soon'"),
        ({"prompt_tokens": 0}, "trace.jsonl:2: prompt_tokens is 0, expected a whole number of at least 1"),
        ({"output_tokens": 1.5}, "trace.jsonl:2: output_tokens is 1.5"),
        ({"output_tokens": True}, "trace.jsonl:2: output_tokens is True"),
    ],
)
def test_a_damaged_trace_names_the_line(change: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, [ROWS[0], ROWS[1] | change])))
    with pytest.raises(ResultsError, match=says):
        read_trace(path)


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("text", "says"), [("", "has no request"), ("{", "1 is not JSON"), ("[]", "1 is list")]
)
def test_no_trace_at_all(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ResultsError, match=says):
        read_trace(path)
