"""How well a load was served: times to the first token and per token, and what met its objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from qsun_bench.percentiles import summary
from qsun_bench.workload import Arrival


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request is promised: seconds to its first token, and seconds a token after it."""

    ttft_s: float
    tpot_s: float


@dataclass(slots=True)
class Served:
    """What became of one arrival. stamps_s: when its tokens were told, on the clock of the arrivals.

    lag_s: how long after its arrival it was submitted, since a step was running.
    """

    arrival: Arrival
    stamps_s: list[float] = field(default_factory=list)
    lag_s: float = 0.0
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether it got all its tokens."""
        return self.error is None and len(self.stamps_s) == self.arrival.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """From its arrival, not from its submission: waiting for a step counts."""
        return self.stamps_s[0] - self.arrival.at_s if self.stamps_s else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token, the first excluded; None with fewer than two."""
        count = len(self.stamps_s)
        return (self.stamps_s[-1] - self.stamps_s[0]) / (count - 1) if count > 1 else None

    def meets(self, objective: Objective) -> bool:
        """Whether it was served whole and as promised; an answer of one token has no time per token."""
        if not self.done or self.ttft_s is None:
            return False
        return self.ttft_s <= objective.ttft_s and (self.tpot_s or 0.0) <= objective.tpot_s


PROMISED_TPOT_MS: Final = (10, 15, 20, 25, 30, 40, 50, 75, 100)
"""Times per token for which goodput is told beside the one that was asked for: a promise is a choice."""


def summarise(
    served: Sequence[Served], wall_s: float, objective: Objective, span_s: float | None = None
) -> dict[str, Any]:
    """The figures of one arm, times in milliseconds.

    wall_s: from the start of the arrivals to the last token. span_s: the time in which requests arrived, over
    which goodput is told, so that the answers of the last ones, alone on the device, count for no arm; None
    is wall_s. Latencies are of the requests that were served whole, the rest is of all.
    """
    done = [one for one in served if one.done]
    good = sum(one.meets(objective) for one in served)
    tokens = sum(len(one.stamps_s) for one in served)
    span_s = span_s or wall_s
    return {
        "requests": len(served),
        "finished": len(done),
        "met": good,
        "wall_s": round(wall_s, 3),
        "goodput_s": round(good / span_s, 4),
        "goodput_by_tpot_ms": {
            str(promised): round(
                sum(one.meets(replace(objective, tpot_s=promised / 1e3)) for one in served) / span_s, 4
            )
            for promised in PROMISED_TPOT_MS
        },
        "requests_s": round(len(done) / wall_s, 4),
        "tokens_s": round(tokens / wall_s, 1),
        "ttft_ms": summary([1e3 * one.ttft_s for one in done if one.ttft_s is not None]),
        "tpot_ms": summary([1e3 * one.tpot_s for one in done if one.tpot_s is not None]),
        "submission_lag_ms": summary([1e3 * one.lag_s for one in served]),
    }
