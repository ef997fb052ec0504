"""How requests are shared out among models: Zipf's law, as measured for served models (MuxServe, Punica)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


def zipf_shares(models: int, exponent: float) -> Sequence[float]:
    """The share of model i = 1..models, proportional to i ** -exponent; they add up to 1.

    exponent: 0 makes all equally popular. Raises ValueError for no model or a negative exponent.
    """
    if models < 1:
        raise ValueError(f"models is {models}, expected at least 1")
    if not 0 <= exponent < math.inf:
        raise ValueError(f"exponent is {exponent}, expected a finite number of at least 0")
    weights = [i**-exponent for i in range(1, models + 1)]
    return [weight / math.fsum(weights) for weight in weights]


def apportion(count: int, shares: Sequence[float]) -> Sequence[int]:
    """How many of `count` each share gets: whole numbers that add up, by largest remainders."""
    quotas = [count * share for share in shares]
    found = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (found[i] - quotas[i], i))
    for i in by_remainder[: count - sum(found)]:
        found[i] += 1
    return found


@dataclass(frozen=True, slots=True)
class Mix:
    """A batch whose requests belong to several models."""

    models: int
    zipf: float

    @property
    def name(self) -> str:
        return f"mix{self.models}z{self.zipf:g}"

    def assign(self, batch: int) -> Sequence[int]:
        """The model of each request: as many of each as its share of the batch, in a fixed random order."""
        counts = apportion(batch, zipf_shares(self.models, self.zipf))
        models = [model for model, count in enumerate(counts) for _ in range(count)]
        random.Random(0).shuffle(models)
        return models
