"""Ours against the best peer and against the floor, cell by cell.

A cell is one case. Ours is the first that the run has for it in the order in which backends are chosen by
themselves, not the luckiest. The best peer is the fastest one whose result was right. The floor is the time
that reading the cell's bytes alone would take at the read bandwidth of the same run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from qsun_bench import tables
from qsun_bench.results import Record, Run
from qsun_bench.variants import OURS
from qsun_kernels.backends.problems import BACKENDS

# Two timings of the same launch differ by less.
_NOISE = 0.02
# Where a tile of 16 or 32 tokens is full, the next token needs another.
_STEPS = ((16, 17), (32, 33))
STEPS = "steps in M"


@dataclass(frozen=True, slots=True)
class Cell:
    """ours: our record. peer: the fastest right peer. floor_us: see the module. None where there is none."""

    matrix: str
    M: int
    ours: Record | None
    peer: Record | None
    floor_us: float

    @property
    def us(self) -> float | None:
        """Our time, None unless our result was right."""
        return self.ours.us if self.ours is not None and self.ours.ok else None

    @property
    def ratio(self) -> float | None:
        """Time of the best peer over ours, above 1 where we are faster."""
        if self.us is None or self.peer is None or self.peer.us is None:
            return None
        return self.peer.us / self.us

    @property
    def share(self) -> float | None:
        """The floor over our time: 1 is the floor."""
        return None if self.us is None else self.floor_us / self.us


def cells(run: Run) -> Sequence[Cell]:
    """The cells of the matrix products of a run, in its order."""
    by_case: dict[str, list[Record]] = {}
    for record in run.records:
        if "M" in record.fields:
            by_case.setdefault(record.case, []).append(record)
    found = []
    for case, records in by_case.items():
        ours = {record.backend: record for record in records if record.backend in BACKENDS}
        peers = [r for r in records if r.backend not in OURS and r.ok and r.us is not None]
        first = records[0]
        label = f"{case.rpartition('.')[0]} ({first.fields['K']} x {first.fields['N']})"
        found.append(
            Cell(
                label,
                int(str(first.fields["M"])),
                next((ours[name] for name in BACKENDS if name in ours), None),
                min(peers, key=lambda r: r.us or math.inf, default=None),
                first.bytes / run.header.read_tb_s * 1e-6,
            )
        )
    return found


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that there are; None when there are none."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True, slots=True)
class Table:
    """A table under a heading, for the terminal or for a document."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def build(run: Run) -> Sequence[Table]:
    """The tables of a run: best peer over ours, share of the floor, each peer, steps in M.

    Empty when the run has no matrix product of ours.
    """
    found = cells(run)
    if not any(cell.us is not None for cell in found):
        return ()
    grid = {(cell.matrix, cell.M): cell for cell in found}
    matrices = list(dict.fromkeys(cell.matrix for cell in found))
    sizes = sorted({cell.M for cell in found})
    columns = [f"M = {M}" for M in sizes]
    ratios, shares = [], []
    for matrix in matrices:
        row = [grid.get((matrix, M)) for M in sizes]
        ratio_mean = geometric_mean(cell.ratio for cell in row if cell is not None)
        share_mean = geometric_mean(cell.share for cell in row if cell is not None)
        ratios.append((matrix, *(_ratio(cell) for cell in row), _number(ratio_mean)))
        shares.append((matrix, *(_share(cell) for cell in row), _percent(share_mean)))
    built = []
    if any(cell.ratio is not None for cell in found):
        built.append(Table("best peer / ours (above 1: ours is faster)", ("", *columns, "mean"), ratios))
        built.append(_by_peer(run, found))
    built.append(Table("share of the byte floor", ("", *columns, "mean"), shares))
    built.append(_steps(matrices, sizes, grid))
    return built


def _ratio(cell: Cell | None) -> str:
    if cell is None or cell.ours is None:
        return ""
    if cell.us is None:
        return "failed" if cell.ours.failed else "wrong"
    if cell.ratio is None or cell.peer is None:
        return ""
    return f"{cell.ratio:.2f} {cell.peer.backend}"


def _share(cell: Cell | None) -> str:
    return "" if cell is None else _percent(cell.share)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _by_peer(run: Run, found: Sequence[Cell]) -> Table:
    """Each peer on its own: over how many cells, the mean of its time over ours, where it is faster."""
    ours = {cell.ours.case: cell.us for cell in found if cell.ours is not None and cell.us is not None}
    rows = []
    for peer in dict.fromkeys(r.backend for r in run.records if r.backend not in OURS):
        records = [r for r in run.records if r.backend == peer and r.case in ours]
        values = [r.us / ours[r.case] for r in records if r.ok and r.us is not None]
        faster = sum(value < 1 for value in values)
        refused = sum(not r.ok for r in records)
        mean = _number(geometric_mean(values))
        rows.append((peer, str(len(values)), mean, str(faster), str(refused)))
    return Table("peer / ours", ("", "cells", "mean", "peer faster", "wrong or failed"), rows)


def _steps(matrices: Sequence[str], sizes: Sequence[int], grid: dict[tuple[str, int], Cell]) -> Table:
    """Whether our time grows with M and how it jumps where a tile of tokens overflows."""

    def time(matrix: str, M: int) -> float | None:
        cell = grid.get((matrix, M))
        return None if cell is None else cell.us

    rows = []
    for matrix in matrices:
        jumps = []
        for before, after in _STEPS:
            low, high = time(matrix, before), time(matrix, after)
            jumps.append("" if low is None or high is None else f"{high / low:.2f}")
        timed = [(M, us) for M in sizes if (us := time(matrix, M)) is not None]
        falling = [
            f"{M} to {N} ({after / before:.2f})"
            for (M, before), (N, after) in itertools.pairwise(timed)
            if after < before * (1 - _NOISE)
        ]
        rows.append((matrix, *jumps, ", ".join(falling) or "none"))
    columns = ("", *(f"t({after}) / t({before})" for before, after in _STEPS), "faster with more tokens")
    return Table(STEPS, columns, rows)


def summary(run: Run) -> Sequence[str]:
    """What the tables come to, a line each."""
    found = cells(run)
    compared = [cell for cell in found if cell.ratio is not None]
    lines = []
    mean = geometric_mean(cell.ratio for cell in compared)
    if mean is not None:
        lines.append(f"best peer / ours: geometric mean {mean:.3f} over {len(compared)} cells")
        below = [f"{cell.matrix} M={cell.M} {_ratio(cell)}" for cell in compared if (cell.ratio or 0) < 1]
        lines.append(f"cells below 1.0: {len(below)}" + (f" ({'; '.join(below)})" if below else ""))
    broken = [
        f"{cell.matrix} M={cell.M} {_ratio(cell)}"
        for cell in found
        if cell.ours is not None and cell.us is None
    ]
    if broken:
        lines.append(f"cells without a right result of ours: {len(broken)} ({'; '.join(broken)})")
    share = geometric_mean(cell.share for cell in found)
    if share is not None:
        lines.append(f"share of the byte floor: geometric mean {share:.1%}")
    return lines


def show(run: Run, stream: TextIO) -> None:
    """Print the tables and what they come to; nothing for a run without a matrix product of ours."""
    for table in build(run):
        print(file=stream)
        tables.show(table.title, table.columns, table.rows, stream, text_columns=table.text_columns)
    for line in summary(run):
        print(line, file=stream)


def markdown(run: Run) -> str:
    """The same for a document."""
    parts = [
        f"{table.title}:\n\n{tables.markdown(table.columns, table.rows, text_columns=table.text_columns)}"
        for table in build(run)
    ]
    return "\n\n".join([*parts, "  \n".join(summary(run))])
