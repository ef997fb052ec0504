"""Percentiles on known data, Zipf's law, and requests shared out by it."""

from __future__ import annotations

import numpy
import pytest

from qsun_bench.percentiles import percentile, summary
from qsun_bench.popularity import Mix, apportion, zipf_shares


def test_percentiles_of_known_data() -> None:
    values = [float(i) for i in range(1, 102)]
    assert [percentile(values, share) for share in (0, 0.5, 0.95, 0.99, 1)] == [1, 51, 96, 100, 101]
    assert percentile([10.0, 20.0], 0.95) == pytest.approx(19.5)
    assert percentile([7.0], 0.99) == 7.0


def test_percentiles_are_those_of_numpy_in_any_order() -> None:
    values = list(numpy.random.default_rng(0).exponential(size=77))
    for share in (0.01, 0.5, 0.95, 0.99):
        assert percentile(values, share) == pytest.approx(numpy.percentile(values, 100 * share))


@pytest.mark.parametrize(("values", "share", "says"), [([], 0.5, "empty"), ([1.0], 1.1, "share is 1.1")])
def test_percentile_refuses(values: list[float], share: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        percentile(values, share)


def test_a_summary_of_nothing_holds_nothing() -> None:
    assert summary([]) == {"mean": None, "p50": None, "p95": None, "p99": None}
    assert summary([1.0, 2.0, 4.0], 2) == {"mean": 2.33, "p50": 2.0, "p95": 3.8, "p99": 3.96}


def test_zipf() -> None:
    assert zipf_shares(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_shares(4, 0.0) == pytest.approx([0.25] * 4)
    # Facts of skew: with 8 models and exponent 1 the hottest carries 2.94 times the mean load.
    assert zipf_shares(8, 1.0)[0] * 8 == pytest.approx(2.94, abs=0.01)
    with pytest.raises(ValueError, match="models is 0"):
        zipf_shares(0, 1.0)
    with pytest.raises(ValueError, match="exponent is -1"):
        zipf_shares(2, -1)


@pytest.mark.parametrize("count", [1, 7, 8, 128])
def test_shares_become_whole_requests(count: int) -> None:
    shares = zipf_shares(8, 1.0)
    found = apportion(count, shares)
    assert sum(found) == count
    assert all(abs(got - count * share) < 1 for got, share in zip(found, shares, strict=True))


def test_a_mix_is_the_same_every_time() -> None:
    mix = Mix(8, 1.0)
    assigned = mix.assign(64)
    assert assigned == mix.assign(64) and sorted(assigned) != assigned
    assert [assigned.count(model) for model in range(8)] == apportion(64, zipf_shares(8, 1.0))
    assert mix.name == "mix8z1"
