"""Percentiles of a sample, by the definition that numpy and most load generators use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` of the sample lies, linear between neighbours (Hyndman and Fan, type 7).

    share: in [0, 1]; 0.5 is the median. Raises ValueError for an empty sample or another share.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("values is empty, expected at least one")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected a number in [0, 1]")
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float | None]:
    """{mean, p50, p95, p99}, rounded; all None for an empty sample."""
    if not values:
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    found = {"mean": math.fsum(values) / len(values)}
    found |= {f"p{round(100 * share)}": percentile(values, share) for share in (0.5, 0.95, 0.99)}
    return {name: round(value, digits) for name, value in found.items()}
