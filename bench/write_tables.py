"""A run of the fused write as a table: one launch against several, and what either takes above the floor.

The floor is the time that the bytes read and written would take at the read bandwidth of the run.
"""

from __future__ import annotations

from typing import Final, TextIO

from qsun_bench import tables
from qsun_bench.margins import Table
from qsun_bench.peers import separate
from qsun_bench.results import Record, Run

_OP: Final = "write_kv_cache"


def belongs(run: Run) -> bool:
    """Whether it is a run of the fused write."""
    return any(record.op == _OP for record in run.records)


def build(run: Run) -> Table:
    """A line a case and contender, in the order of the run."""
    apart = {record.case: record for record in run.records if record.backend == separate.NAME}
    lines = [_line(record, apart.get(record.case), run.header.read_tb_s) for record in run.records]
    columns = ("", "by", "us", "separate / this", "KB", "floor, us", "above the floor, us")
    return Table("the fused write against a launch a step", columns, lines, text_columns=2)


def show(run: Run, stream: TextIO) -> None:
    """Print it."""
    table = build(run)
    print(file=stream)
    tables.show(table.title, table.columns, table.rows, stream, text_columns=table.text_columns)


def markdown(run: Run) -> str:
    """The same for a document."""
    table = build(run)
    return tables.markdown(table.columns, table.rows, text_columns=table.text_columns)


def _line(record: Record, apart: Record | None, read_tb_s: float) -> tuple[str, ...]:
    floor = record.bytes / read_tb_s * 1e-6
    size = (f"{record.bytes / 1e3:.1f}", f"{floor:.2f}")
    if not record.ok or record.us is None:
        return (record.case, record.backend, "failed" if record.failed else "wrong", "", *size, "")
    times = ""
    if apart is not None and apart is not record and apart.ok and apart.us is not None:
        times = f"{apart.us / record.us:.2f}"
    return (record.case, record.backend, f"{record.us:.2f}", times, *size, f"{record.us - floor:.2f}")
