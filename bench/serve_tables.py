"""Runs of `qsun-bench serve` as a table: the two arms under each other, load by load."""

from __future__ import annotations

from typing import TextIO

from qsun_bench import tables
from qsun_bench.engine_suites import ARMS, PER_MODEL, SERVE, SHARED
from qsun_bench.results import Record, Run

COLUMNS = (
    "case", "arm", "req/s offered", "met", "goodput/s", f"vs {PER_MODEL}", "tokens/s",
    "TTFT ms p50", "p95", "p99", "TPOT ms p50", "p95", "p99", "batch", "left",
)  # fmt: skip


def belongs(run: Run) -> bool:
    """Whether a run is of this kind."""
    return any(record.op == SERVE for record in run.records)


def rows(run: Run) -> tuple[tables.Row, ...]:
    """In order of the offered rate, the arms of a case together."""
    order = list(dict.fromkeys(record.case for record in run.records))
    found = sorted(
        run.records, key=lambda record: (record.measured.get("offered_s", 0), order.index(record.case))
    )
    return tuple(_row(record, run) for record in found)


def best(run: Run) -> tuple[tables.Row, ...]:
    """The best goodput of either arm at any rate that it was offered, and their ratio.

    A row where all rates are of one setting and both arms were asked to keep the same promise, else none.
    """
    told = [r for r in run.records if r.ok and r.measured and "rate" in r.fields]
    promises = {(r.case.rpartition(".r")[0], r.fields["slo_ttft_ms"], r.fields["slo_tpot_ms"]) for r in told}
    if len(promises) != 1 or {r.backend for r in told} != set(ARMS):
        return ()
    ((_, ttft, tpot),) = promises
    found = [max((r for r in told if r.backend == arm), key=_goodput) for arm in ARMS]
    cells = [f"{_goodput(r):.3g} of {r.measured['offered_s']:.3g}" for r in found]
    shared, other = map(_goodput, found)
    return ((f"{ttft:g}", f"{tpot:g}", *cells, f"{shared / other:.2f}x" if other else ""),)


def _goodput(record: Record) -> float:
    return float(record.measured["goodput_s"])


_BEST_COLUMNS = ("TTFT promised, ms", "TPOT", *ARMS, f"{SHARED} / {PER_MODEL}")
_BEST_TITLE = "best goodput, requests a second, of how many offered"


def show(run: Run, stream: TextIO) -> None:
    """Print it."""
    tables.show(run.header.line(), COLUMNS, rows(run), stream, text_columns=2)
    if found := best(run):
        print(file=stream)
        tables.show(_BEST_TITLE, _BEST_COLUMNS, found, stream, text_columns=0)
    for record in run.records:
        if record.ok and record.note:
            print(record.note, file=stream)
            break


def markdown(run: Run) -> str:
    """The same for a document."""
    table = tables.markdown(COLUMNS, rows(run), text_columns=2)
    return f"{table}\n\n{_BEST_TITLE}:\n\n{brief(run)}" if best(run) else table


def brief(run: Run) -> str:
    """The best goodput of either arm alone, for a document."""
    if found := best(run):
        return tables.markdown(_BEST_COLUMNS, found, text_columns=0)
    return "The recorded run holds no two arms that kept the same promise."


def _row(record: Record, run: Run) -> tables.Row:
    if not record.ok or not record.measured:
        return (record.case, record.backend, "FAILED", *[""] * (len(COLUMNS) - 3))
    measured = record.measured
    base = next(
        (
            r
            for r in run.records
            if r.case == record.case and r.backend == PER_MODEL and r.ok and r is not record
        ),
        None,
    )
    goodput = measured["goodput_s"]
    other = 0.0 if base is None else base.measured["goodput_s"]
    ttft, tpot = measured["ttft_ms"], measured["tpot_ms"]
    times = [f"{ttft[p]:.1f}" for p in ("p50", "p95", "p99")] + [
        f"{tpot[p]:.2f}" for p in ("p50", "p95", "p99")
    ]
    return (
        record.case,
        record.backend,
        f"{measured['offered_s']:.3g}",
        f"{measured['met']}/{measured['requests']}",
        f"{goodput:.3g}",
        f"{goodput / other:.2f}x" if other else "",
        f"{measured['tokens_s']:.1f}",
        *times,
        f"{measured['mean_batch']:.1f}",
        str(measured["unfinished"]),
    )
