"""What a soak asks of an engine: requests of several models, some of which are cancelled, or cannot be.

Everything is drawn from one seed, step by step and not by the clock. (Which steps the arrivals meet still
follows the machine, since a soak lasts a time and not a number of steps.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qsun.core import SamplingParams
from qsun_bench.popularity import zipf_shares

_BURST = 0.3
"""Chance that requests come before a step; then as many as a die says."""
_LARGEST_BURST = 6
_LULL = 1 / 300
"""Chance that a lull begins, in which nothing comes."""
_LONGEST_LULL = 60
_COMMON_BEGINNINGS = 2
_HAS_BEGINNING = 0.5
_TOO_LONG = 0.03
"""Chance of a prompt that no context holds."""
_TO_THE_END = 0.05
"""Chance of an answer that is asked for longer than the context is."""
_CANCELLED = 0.1
_SAMPLED = 0.2


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. expected: tokens that it gets; 0 where it has to be refused. cancel_at: how many it may
    get before it is cancelled; None lets it end. is_checked: whether its tokens are held against a reference.
    """

    request_id: str
    model: str
    prompt: Sequence[int]
    params: SamplingParams
    expected: int
    cancel_at: int | None
    is_checked: bool


class Traffic:
    """Requests without end.

    names: of the models, the most popular first; popularity follows Zipf's law. context: tokens that a
    request may come to. check_share: of the requests, that are checked.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        zipf: float,
        context: int,
        vocabulary: int,
        check_share: float,
        seed: int,
    ) -> None:
        self._draw = random.Random(f"soak {seed}")
        self._names = names
        self._shares = zipf_shares(len(names), zipf)
        self._context = context
        self._vocabulary = vocabulary
        self._check_share = check_share
        # The same for all models: whose blocks they are is for the engine to know.
        self._beginnings = [
            self._tokens(self._draw.randint(context // 16, context // 4)) for _ in range(_COMMON_BEGINNINGS)
        ]
        self._count = 0
        self._quiet = 0

    def before_step(self) -> Iterator[Asked]:
        """The requests that come before the next step."""
        if self._quiet:
            self._quiet -= 1
            return
        if self._draw.random() < _LULL:
            self._quiet = self._draw.randint(1, _LONGEST_LULL)
            return
        if self._draw.random() < _BURST:
            for _ in range(self._draw.randint(1, _LARGEST_BURST)):
                yield self._request()

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(self._vocabulary) for _ in range(count)]

    def _request(self) -> Asked:
        draw, context = self._draw, self._context
        (model,) = draw.choices(self._names, self._shares)
        prompt = self._tokens(draw.randint(1, context // 4))
        if draw.random() < _HAS_BEGINNING:
            prompt = draw.choice(self._beginnings) + prompt
        if draw.random() < _TOO_LONG:
            prompt = self._tokens(context + draw.randint(0, 8))
        room = context - len(prompt)
        most = draw.randint(1, context // 2)
        if draw.random() < _TO_THE_END:
            most = context
        expected = max(0, min(most, room))
        is_checked = draw.random() < self._check_share
        temperature = 0.0 if is_checked or draw.random() >= _SAMPLED else 0.8
        cancel_at = draw.randint(0, expected) if expected and draw.random() < _CANCELLED else None
        self._count += 1
        params = SamplingParams(
            temperature=temperature,
            top_p=1.0 if temperature == 0.0 else 0.95,
            seed=self._count,
            max_tokens=most,
            ignore_eos=True,
        )
        return Asked(
            f"soak-{self._count}", model, prompt, params, expected, cancel_at, is_checked and expected > 0
        )
