"""Two runs side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qsun_bench import compare
from qsun_bench.results import Header, Record, Run

HEADER = Header("cpu (test)", "0123456789ab", "2026-01-31", "2.13.0", None, None, "qsun-bench wna16", 0.02)
A = Record("wna16_linear", "m.M1", "cuda", 10.0, 4096, 0.5, True, {"M": 1, "bits": 4})
B = Record("wna16_linear", "m.M2", "cuda", 12.0, 4096, 0.5, True, {"M": 2, "bits": 4})


def test_ratios_and_their_mean() -> None:
    before = Run(HEADER, (A, B))
    after = Run(HEADER, (replace(A, us=5.0), replace(B, us=24.0)))
    compared = compare.pairs(before, after)
    assert [pair.ratio for pair in compared] == [2.0, 0.5]
    assert compare.geometric_mean(compared) == pytest.approx(1.0)
    assert compare.rows(compared)[0] == ("m.M1", "cuda", "10.0", "5.0", "2.000x")


def test_a_wrong_result_has_no_ratio() -> None:
    wrong = replace(A, us=None, error=9.0, ok=False)
    (pair,) = compare.pairs(Run(HEADER, (A,)), Run(HEADER, (wrong,)))
    assert pair.ratio is None
    assert compare.rows([pair])[0][3] == "WRONG"
    assert compare.geometric_mean([pair]) is None
    assert compare.worse([pair], 2.0) == [pair]


def test_a_different_problem_of_the_same_name_is_not_compared() -> None:
    other = replace(A, us=1.0, fields={"M": 1, "bits": 2})
    compared = compare.pairs(Run(HEADER, (A,)), Run(HEADER, (other,)))
    assert [pair.ratio for pair in compared] == [None, None]


def test_what_became_worse() -> None:
    before = Run(HEADER, (A, B))
    after = Run(HEADER, (replace(A, us=10.4),))
    compared = compare.pairs(before, after)
    assert [pair.name for pair in compare.worse(compared, 1.05)] == [("m.M2", "cuda")]
    assert [pair.name for pair in compare.worse(compared, 1.01)] == [("m.M1", "cuda"), ("m.M2", "cuda")]
