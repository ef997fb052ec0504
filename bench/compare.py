"""Two runs side by side: what became faster, what slower, what wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qsun_bench.results import Record, Run


@dataclass(frozen=True, slots=True)
class Pair:
    """The same contender on the same problem in two runs; None where a run lacks it."""

    before: Record | None
    after: Record | None

    @property
    def name(self) -> tuple[str, str]:
        """(case, backend)."""
        record = self.before or self.after
        assert record is not None
        return record.case, record.backend

    @property
    def ratio(self) -> float | None:
        """Time before over after, above 1 when it became faster; None unless both were right and timed."""
        if self.before is None or self.after is None or not (self.before.ok and self.after.ok):
            return None
        if self.before.us is None or self.after.us is None:
            return None
        return self.before.us / self.after.us


def pairs(before: Run, after: Run) -> Sequence[Pair]:
    """Every problem of either run, in the order of the second and then what only the first has."""
    old = {record.key: record for record in before.records}
    new = {record.key: record for record in after.records}
    found = [Pair(old.get(key), record) for key, record in new.items()]
    return [*found, *(Pair(record, None) for key, record in old.items() if key not in new)]


def rows(compared: Sequence[Pair]) -> Sequence[Sequence[str]]:
    """(case, backend, us before, us after, ratio)."""
    return [
        (
            *pair.name,
            _time(pair.before),
            _time(pair.after),
            "" if pair.ratio is None else f"{pair.ratio:.3f}x",
        )
        for pair in compared
    ]


def _time(record: Record | None) -> str:
    if record is None:
        return "-"
    return "WRONG" if not record.ok or record.us is None else f"{record.us:.1f}"


def geometric_mean(compared: Sequence[Pair]) -> float | None:
    """Of the ratios; None when there are none."""
    ratios = [pair.ratio for pair in compared if pair.ratio is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def worse(compared: Sequence[Pair], slowdown: float) -> Sequence[Pair]:
    """The pairs that became slower than `slowdown` times, or wrong, or vanished."""
    found = []
    for pair in compared:
        was_right = pair.before is not None and pair.before.ok
        lost = was_right and (pair.after is None or not pair.after.ok)
        if lost or (pair.ratio is not None and pair.ratio < 1 / slowdown):
            found.append(pair)
    return found
