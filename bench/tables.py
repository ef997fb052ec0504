"""Runs as tables: for the terminal (rich where it is installed, else plain) and as Markdown for the docs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from qsun_bench.results import Record, Run

Row = Sequence[str]


def show(
    title: str, columns: Row, rows: Sequence[Row], stream: TextIO | None = None, *, text_columns: int = 1
) -> None:
    """Print a table under its title; the first `text_columns` are text, the others are aligned right."""
    stream = stream or sys.stdout
    if title:
        print(title, file=stream)
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < text_columns else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        # A pipe has no width: let the table keep its own instead of wrapping at 80 columns.
        width = None if stream.isatty() else 200
        Console(file=stream, width=width, highlight=False, markup=False).print(table)
    else:
        print(plain(columns, rows, text_columns), file=stream)


def plain(columns: Row, rows: Sequence[Row], text_columns: int) -> str:
    """The table in columns of spaces."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = []
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(columns: Row, rows: Sequence[Row], *, text_columns: int = 1) -> str:
    """The table in Markdown; the first `text_columns` are text, the others are aligned right."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def speed_up(record: Record, baselines: Mapping[str, Record]) -> str:
    """How many times faster than the baseline on the same case; empty when either was wrong or missing."""
    base = baselines.get(record.case)
    if base is None or base is record or record.us is None or base.us is None or not (record.ok and base.ok):
        return ""
    return f"{base.us / record.us:.2f}x"


COLUMNS = ("case", "backend", "us", "GB/s", "of read", "speed-up", "error")


def record_row(record: Record, run_read_tb_s: float, baselines: Mapping[str, Record]) -> Row:
    """One record under COLUMNS."""
    error = "none" if record.error is None else f"{record.error:.2g}"
    if not record.ok or record.us is None or record.gb_s is None:
        verdict = "FAILED" if record.failed else "WRONG"
        return (record.case, record.backend, verdict, "", "", "", error)
    share = record.gb_s / (run_read_tb_s * 1e3)
    return (
        record.case,
        record.backend,
        f"{record.us:.1f}",
        f"{record.gb_s:.4g}",
        f"{share:.0%}",
        speed_up(record, baselines),
        error,
    )


def plan_cells(record: Record) -> Row:
    """What a plan takes, and the call together with it: as much as a model of one layer would wait."""
    if record.plan_us is None or record.us is None:
        return ("", "")
    return (f"{record.plan_us:.1f}", f"{record.us + record.plan_us:.1f}")


def show_run(run: Run, baseline: str, stream: TextIO | None = None) -> None:
    """The whole run, in the order of its records."""
    baselines = {record.case: record for record in run.records if record.backend == baseline}
    columns = [*COLUMNS]
    columns[5] = f"vs {baseline}" if baseline else "speed-up"
    rows = [record_row(record, run.header.read_tb_s, baselines) for record in run.records]
    if any(record.plan_us is not None for record in run.records):
        columns += ["plan us", "us + plan"]
        rows = [(*row, *plan_cells(record)) for row, record in zip(rows, run.records, strict=True)]
    show(run.header.line(), columns, rows, stream, text_columns=2)
