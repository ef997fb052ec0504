"""Runs of `qsun-bench decode` as tables: what a serving engineer compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from qsun_bench import tables
from qsun_bench.breakdown import BETWEEN
from qsun_bench.engine_suites import DECODE, DENSE
from qsun_bench.results import Record, Run

COLUMNS = (
    "case",
    "by",
    "TPOT us",
    "p99",
    "tokens/s",
    "GB",
    "of floor",
    f"{DENSE} / this",
    "mix / one",
    "error",
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its title; its first `text_columns` are text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tables.Row, ...]
    text_columns: int = 2


def belongs(run: Run) -> bool:
    """Whether a run's records are told by these tables: those of an older form are not."""
    return any(record.op == DECODE and record.measured for record in run.records)


def build(run: Run) -> Iterator[Table]:
    """The records; then, where they were taken, memory, time to the first token, operators and host time."""
    yield Table("", COLUMNS, tuple(_row(record, run.records) for record in run.records))
    told = [record for record in run.records if record.measured]
    columns: tuple[str, ...] = ("case", "by", "decode weights", "prefill", "KV", "graphs", "peak")
    yield Table("memory, GB", columns, tuple(_memory_row(record) for record in told))
    answers = tuple(_answer_row(record) for record in told if "ttft_ms" in record.measured)
    if answers:
        columns = ("case", "by", "TTFT ms p50", "p99", "TPOT ms", "with all decoding", "generate s")
        yield Table("whole answers", columns, answers)
    for record in told:
        if "breakdown" in record.measured:
            yield _operators(record)
    host = tuple(_host_row(record) for record in told if "host" in record.measured)
    if host:
        columns = ("case", "by", "wall", "graphs", "exposed", "Python alone")
        yield Table("host, us a step", columns, host)


def show(run: Run, stream: TextIO) -> None:
    """Print them."""
    print(run.header.line(), file=stream)
    for table in build(run):
        if table.title:
            print(file=stream)
        tables.show(table.title, table.columns, table.rows, stream, text_columns=table.text_columns)


def markdown(run: Run) -> str:
    """The same for a document."""
    parts = []
    for table in build(run):
        title = f"{table.title}:\n\n" if table.title else ""
        parts.append(title + tables.markdown(table.columns, table.rows, text_columns=table.text_columns))
    return "\n\n".join(parts)


def brief(run: Run) -> str:
    """The times alone, for a document."""
    table = next(build(run))
    return tables.markdown(table.columns, table.rows, text_columns=table.text_columns)


def baseline_of(record: Record, records: Sequence[Record]) -> Record | None:
    """The same batch with 16-bit projections, KV and lm_head: SUN, where the record is QSUN's."""
    same = ("model", "layers", "batch", "context", "tokens", "mode", "models", "zipf", "dtype")
    for other in records:
        dense = other.backend == DENSE and other.fields.get("kv_dtype") == other.fields.get("dtype")
        if not dense or other.fields.get("lm_head_bits") != 16 or other.us is None:
            continue
        if all(other.fields.get(name) == record.fields.get(name) for name in same):
            return other
    return None


def _row(record: Record, records: Sequence[Record]) -> tables.Row:
    error = "none" if record.error is None else f"{record.error:.2g}"
    if record.us is None or not record.measured:
        verdict = "FAILED" if record.failed else "WRONG"
        return (record.case, record.backend, verdict, "", "", "", "", "", "", error)
    measured = record.measured
    base = baseline_of(record, records)
    ratio = "" if base is None or base.us is None or base is record else f"{base.us / record.us:.2f}x"
    mix = measured.get("ratio")
    return (
        record.case,
        record.backend,
        f"{record.us:.1f}",
        f"{measured['tpot_us']['p99']:.1f}",
        f"{measured['tokens_s']:.1f}",
        f"{record.bytes * 1e-9:.3g}",
        f"{measured['of_floor']:.0%}",
        ratio,
        "" if mix is None else f"{mix:.3f}",
        error,
    )


def _memory_row(record: Record) -> tables.Row:
    memory = record.measured["memory"]
    cells = [memory[name] for name in ("weights", "prefill", "kv", "graphs", "peak")]
    return (record.case, record.backend, *("" if cell is None else f"{cell * 1e-9:.3g}" for cell in cells))


def _answer_row(record: Record) -> tables.Row:
    measured = record.measured
    settled = measured["settled_tpot_ms"]["p50"]
    return (
        record.case,
        record.backend,
        f"{measured['ttft_ms']['p50']:.1f}",
        f"{measured['ttft_ms']['p99']:.1f}",
        f"{measured['tpot_us']['p50'] * 1e-3:.2f}",
        "" if settled is None else f"{settled:.2f}",
        f"{measured['wall_s']:.2f}",
    )


def _operators(record: Record) -> Table:
    found: Mapping[str, Any] = record.measured["breakdown"]
    step = found["step_us"]
    rows = [
        (name, f"{part['us']:.1f}", f"{part['us'] / step:.0%}", f"{part['launches']:g}")
        for name, part in found["operators"].items()
    ]
    between = found[BETWEEN]["us"]
    rows.append((BETWEEN, f"{between:.1f}", f"{between / step:.0%}", ""))
    title = f"operators of {record.case} by {record.backend}, {step:.1f} us a traced step"
    return Table(title, ("operator", "us", "of step", "launches"), tuple(rows), text_columns=1)


def _host_row(record: Record) -> tables.Row:
    host = record.measured["host"]
    cells = (host[name] for name in ("wall_us", "device_us", "exposed_us", "python_us"))
    return (record.case, record.backend, *(f"{cell:.1f}" for cell in cells))
