"""Runs of `qsun-bench soak` as a table."""

from __future__ import annotations

from typing import TextIO

from qsun_bench import tables
from qsun_bench.engine_suites import SOAK
from qsun_bench.results import Record, Run

COLUMNS = (
    "case", "by", "minutes", "requests", "ended", "cancelled", "refused", "tokens", "swaps", "rebuilds",
    "reused tokens", "checked", "wrong", "of another's KV", "leaked blocks", "growth: host MB", "device MB",
    "objects", "violations",
)  # fmt: skip


def belongs(run: Run) -> bool:
    """Whether a run is of this kind."""
    return any(record.op == SOAK for record in run.records)


def rows(run: Run) -> tuple[tables.Row, ...]:
    """A line a record."""
    return tuple(_row(record) for record in run.records)


def show(run: Run, stream: TextIO) -> None:
    """Print it, and the first violations."""
    tables.show(run.header.line(), COLUMNS, rows(run), stream, text_columns=2)
    for record in run.records:
        for violation in record.measured["violations"]["first"]:
            print(violation, file=stream)


def markdown(run: Run) -> str:
    """The same for a document."""
    return tables.markdown(COLUMNS, rows(run), text_columns=2)


def _row(record: Record) -> tables.Row:
    measured = record.measured
    counts, checked, stats = measured["counts"], measured["checked"], measured["stats"]
    return (
        record.case,
        record.backend,
        f"{measured['seconds'] / 60:.1f}",
        str(counts.get("asked", 0)),
        str(counts.get("length", 0)),
        str(counts.get("cancelled", 0)),
        str(counts.get("refused", 0)),
        str(counts.get("tokens", 0)),
        str(stats["swaps"]),
        str(stats["rebuilds"]),
        str(stats["prefix_hit_tokens"]),
        f"{checked['tokens']} of {checked['requests']}",
        str(checked["wrong"]),
        f"{checked['found']} of {checked['swapped']}",
        str(measured["leaked_blocks"]),
        *(
            _grown(measured["growth"][name], unit)
            for name, unit in (("host", 1e-6), ("device", 1e-6), ("objects", 1))
        ),
        str(measured["violations"]["count"]),
    )


def _grown(count: int | None, unit: float) -> str:
    return "" if count is None else f"{count * unit:.3g}"
