"""How well a load was served: times to the first token and per token, and what met its objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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


def summarise(served: Sequence[Served], wall_s: float, objective: Objective) -> dict[str, Any]:
    """The figures of one arm, times in milliseconds.

    wall_s: from the start of the arrivals to the last token. Latencies are of the requests that were served
    whole; goodput, throughput and the counts are of all.
    """
    done = [one for one in served if one.done]
    good = sum(one.meets(objective) for one in served)
    tokens = sum(len(one.stamps_s) for one in served)
    return {
        "requests": len(served),
        "finished": len(done),
        "met": good,
        "wall_s": round(wall_s, 3),
        "goodput_s": round(good / wall_s, 4),
        "requests_s": round(len(done) / wall_s, 4),
        "tokens_s": round(tokens / wall_s, 1),
        "ttft_ms": summary([1e3 * one.ttft_s for one in done if one.ttft_s is not None]),
        "tpot_ms": summary([1e3 * one.tpot_s for one in done if one.tpot_s is not None]),
        "submission_lag_ms": summary([1e3 * one.lag_s for one in served]),
    }
