"""Plots of a run (matplotlib, of the extra `bench`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from qsun_bench.results import Record, ResultsError, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(run: Run, path: Path) -> None:
    """Draw a run into `path`, whose suffix chooses the format (png, svg, pdf).

    Matrix products: time over M, one panel a matrix, with the time that reading the bytes alone would take.
    Everything else: the share of the read bandwidth of each case, one bar a contender.
    Raises ResultsError when matplotlib is missing or no record was timed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ResultsError("--plot needs matplotlib: pip install 'qsun[bench]'")
    timed = [record for record in run.records if record.ok and record.us is not None]
    if not timed:
        raise ResultsError("--plot: no record was timed, nothing to draw")
    figure = _over_rows(run, timed) if all("M" in record.fields for record in timed) else _bars(run, timed)
    figure.suptitle(f"{run.header.device}, commit {run.header.commit}, {run.header.date}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _over_rows(run: Run, timed: list[Record]) -> Figure:
    from matplotlib.figure import Figure

    panels: dict[str, list[Record]] = {}
    for record in timed:
        panels.setdefault(record.case.rpartition(".")[0], []).append(record)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.2 * across, 3.2 * down))
    for i, (title, records) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        for backend in dict.fromkeys(record.backend for record in records):
            points = sorted((r.fields["M"], r.us) for r in records if r.backend == backend)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=backend)
        floor = sorted((r.fields["M"], r.bytes / run.header.read_tb_s * 1e-6) for r in records)
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", linewidth=1, label="bytes / read")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = [int(str(size)) for size, _ in floor]
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_title(f"{title}  ({records[0].fields['K']} x {records[0].fields['N']})", fontsize=8)
        axes.set_xlabel("M")
        axes.set_ylabel("us")
        axes.grid(True, which="both", linewidth=0.3)
        axes.legend(fontsize=7)
    return figure


def _bars(run: Run, timed: list[Record]) -> Figure:
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(record.case for record in timed))
    backends = list(dict.fromkeys(record.backend for record in timed))
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(cases) * len(backends)))
    axes = figure.add_subplot()
    height = 0.8 / len(backends)
    for b, backend in enumerate(backends):
        shares = {
            r.case: (r.gb_s or 0.0) / (run.header.read_tb_s * 1e3) for r in timed if r.backend == backend
        }
        places = [cases.index(case) + b * height for case in shares]
        axes.barh(places, list(shares.values()), height=height, label=backend)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("share of the read bandwidth")
    axes.legend(fontsize=7)
    return figure
