"""Paired comparisons: the same items, answered by two arms."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p of McNemar's test: pairs in which only one is right, as coin tosses."""
    total = wins + losses
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**total)))


def sign_flip(differences: Sequence[float], *, rounds: int = 20_000, seed: int = 0) -> float:
    """Two-sided p that the mean difference is zero, by flipping signs: all ways up to 14 items, else drawn.

    Drawn, the p is (1 + as large or larger) / (1 + rounds) (Phipson and Smyth 2010).
    """
    values = [d for d in differences if d != 0]
    if not values:
        return 1.0
    observed = abs(sum(values)) * (1 - 1e-12)
    if len(values) <= 14:
        sums = [0.0]
        for value in values:
            sums = [s + value for s in sums] + [s - value for s in sums]
        return sum(abs(s) >= observed for s in sums) / len(sums)
    import numpy

    generator = numpy.random.default_rng(seed)
    array = numpy.asarray(values)
    larger = 0
    for start in range(0, rounds, 500):
        signs = generator.integers(0, 2, size=(min(500, rounds - start), len(values))) * 2 - 1
        larger += int((abs(signs @ array) >= observed).sum())
    return (1 + larger) / (1 + rounds)


def bootstrap_interval(
    differences: Sequence[float], *, rounds: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean, items drawn with replacement (Efron 1979)."""
    count = len(differences)
    if count == 0:
        raise ValueError("differences is empty, expected at least one item")
    draw = random.Random(seed)
    means = sorted(sum(draw.choices(differences, k=count)) / count for _ in range(rounds))
    return means[round(0.025 * rounds)], means[round(0.975 * rounds) - 1]
