"""How a run is shown: every kind of run has its own table and its own plot."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from qsun_bench import decode_tables, engine_plots, margins, plots, serve_tables, tables
from qsun_bench.results import Run


def show(run: Run, baseline: str, stream: TextIO) -> None:
    """Print a run; `baseline` is the contender that operators' speed-ups are told against."""
    if decode_tables.belongs(run):
        decode_tables.show(run, stream)
    elif serve_tables.belongs(run):
        serve_tables.show(run, stream)
    else:
        tables.show_run(run, baseline, stream)
        margins.show(run, stream)


def markdown(run: Run) -> str | None:
    """A run of the engine for a document; None for one of operators, and of an older form."""
    if decode_tables.belongs(run):
        return decode_tables.markdown(run)
    return serve_tables.markdown(run) if serve_tables.belongs(run) else None


def plot(run: Run, path: Path) -> None:
    """Draw a run. Raises ResultsError when matplotlib is missing or nothing was timed."""
    if decode_tables.belongs(run):
        engine_plots.save_decode(run, path)
    elif serve_tables.belongs(run):
        engine_plots.save_serve(run, path)
    else:
        plots.save(run, path)
