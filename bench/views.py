"""How a run is shown: every kind of run has its own table and its own plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TextIO

from qsun_bench import (
    attention_tables,
    decode_tables,
    engine_plots,
    format_tables,
    margins,
    plots,
    serve_tables,
    soak_tables,
    tables,
    write_tables,
)
from qsun_bench.margins import Table
from qsun_bench.results import Run


def show(run: Run, baseline: str, stream: TextIO) -> None:
    """Print a run; `baseline` is the contender that operators' speed-ups are told against."""
    if decode_tables.belongs(run):
        decode_tables.show(run, stream)
    elif serve_tables.belongs(run):
        serve_tables.show(run, stream)
    elif soak_tables.belongs(run):
        soak_tables.show(run, stream)
    else:
        tables.show_run(run, baseline, stream)
        margins.show(run, stream)
        if attention_tables.belongs(run):
            attention_tables.show(run, stream)
        if write_tables.belongs(run):
            write_tables.show(run, stream)
        format_tables.show(run, stream)


def markdown(run: Run) -> str | None:
    """A run of the engine or of writes for a document; None for other operators, and of an older form."""
    if decode_tables.belongs(run):
        return decode_tables.markdown(run)
    if write_tables.belongs(run):
        return write_tables.markdown(run)
    if soak_tables.belongs(run):
        return soak_tables.markdown(run)
    return serve_tables.markdown(run) if serve_tables.belongs(run) else None


def _those_of(*makers: Callable[[Run], Table | None]) -> Callable[[Run], str]:
    """Tables that a run may have no case for: a document may ask for them before they are recorded."""

    def text(run: Run) -> str:
        found = [_under_title(table) for make in makers if (table := make(run)) is not None]
        return "\n\n".join(found) or "The recorded run has no such case."

    return text


def _under_title(table: Table) -> str:
    body = tables.markdown(table.columns, table.rows, text_columns=table.text_columns)
    return f"{table.title}:\n\n{body}"


FURTHER: Mapping[str, Callable[[Run], str]] = {
    "margins": margins.markdown,
    "codes": _those_of(attention_tables.codes),
    "sweeps": _those_of(attention_tables.groups, attention_tables.blocks),
    "triton": _those_of(attention_tables.triton),
    "brief": decode_tables.brief,
    "goodput": serve_tables.brief,
    **{name: partial(format_tables.markdown, view=name) for name in format_tables.VIEWS},
}
"""Further views of a run for a document, by the name behind the colon of a block."""


def plot(run: Run, path: Path) -> None:
    """Draw a run. Raises ResultsError when matplotlib is missing or nothing was timed."""
    if decode_tables.belongs(run):
        engine_plots.save_decode(run, path)
    elif serve_tables.belongs(run):
        engine_plots.save_serve(run, path)
    elif soak_tables.belongs(run):
        engine_plots.save_soak(run, path)
    else:
        plots.save(run, path)
