"""`qsun-bench tune wna16 --backend cuda`: the fastest ways to launch the matmuls on panel weights.

For each kernel, weight, width of its codes and number of tokens every candidate is checked and timed briefly;
the fastest few are timed again, in turn and after a while of the same load, and written to the sweep that the
library's table of choices is made from (csrc/wna16/choices_table.py). Cells that were not measured keep their
lines.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qsun_bench import panel_ways, tables
from qsun_bench.panel_ways import Cell, Kernel, Machine, Way
from qsun_bench.shapes import matrices

KEPT = 6
"""Ways of a cell that are timed again and written."""

LOAD_MS = 60.0
"""Of the same load before times count: the clock has settled by then."""

_WIDTH = 110
_ABOUT: Mapping[Kernel, str] = {
    "stream": "Ways to launch wna16_stream_kernel, up to the {kept} fastest of each matrix and number of "
    "tokens: K N M {fields} us. waves: blocks a multiprocessor, among which the row tiles are dealt evenly, "
    "or 0: a block for every row_tiles of them.",
    "gemm_sm90": "Ways to launch wna16_gemm_sm90_kernel, up to the {kept} fastest of each matrix and number "
    "of tokens: K N M {fields} us.",
    "tiles_sm80": "Ways to launch wna16_tiles_sm80_kernel, up to the {kept} fastest of each matrix and "
    "number of tokens: K N M {fields} us. Forced on a GPU that would take gemm_sm90, with no more shared "
    "memory than an A100 has.",
}
HOW = (
    "W{bits}, bfloat16, groups of 128, symmetric; CUDA-graph replays {how} programmatic dependent launch "
    f"over copies that overflow the L2 three times, random data, after {LOAD_MS:.0f} ms of the same load."
)


class Trials(Protocol):
    """One matrix on a device."""

    def check(self, kernel: Kernel, cell: Cell, way: Way) -> str | None:
        """None, or what is wrong with the result of a call."""

    def glance(self, kernel: Kernel, cell: Cell, way: Way) -> float:
        """Microseconds a call, quickly."""

    def refine(self, kernel: Kernel, cell: Cell, ways: Sequence[Way]) -> Sequence[float]:
        """Microseconds a call of each, timed in turn under the load that they make."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A way that was not taken. wrong: it ran, and its result was wrong."""

    cell: Cell
    kernel: Kernel
    way: Way
    reason: str
    wrong: bool

    def __str__(self) -> str:
        kind = "WRONG" if self.wrong else "refused"
        return f"{kind}: {self.cell} {panel_ways.in_words(self.kernel, self.way)}: {self.reason}"


@dataclass(slots=True)
class Found:
    """What was found for a kernel and a cell: the fastest ways with their microseconds, and what was refused.

    before: the way in use so far, None where the table has none.
    """

    kernel: Kernel
    cell: Cell
    before: Way | None
    ways: Mapping[Way, float] = field(default_factory=dict)
    refusals: Sequence[Refusal] = ()


def plan(
    kernels: Sequence[Kernel], shapes: Sequence[str], tokens: Sequence[int], widths: Sequence[int]
) -> Sequence[tuple[Kernel, Cell]]:
    """What is measured: every kernel at every matrix of each width, at its own numbers of tokens or those of
    `tokens`.
    """
    found = []
    for sizes, name in matrices(shapes):
        N, K = sizes.linears[name]
        for bits, kernel in itertools.product(widths, kernels):
            own = [M for M in panel_ways.TOKENS[kernel] if not tokens or M in tokens]
            found += [(kernel, Cell(K, N, M, bits)) for M in own]
    return list(dict.fromkeys(found))


def in_use(kernel: Kernel, cell: Cell, folder: Path, machine: Machine) -> Way | None:
    """The way that the table made from `folder` has for a cell: of its own width, or else W4's. Where it has
    neither, tiles_sm80 is launched by the library's estimate.
    """
    for bits in dict.fromkeys((cell.bits, panel_ways.table().MAIN_BITS)):
        found: Mapping[tuple[tuple[int, int], int], tuple[Way, float]]
        found = panel_ways.table().chosen(kernel, folder, bits)
        if (entry := found.get((cell.matrix, cell.M))) is not None:
            return entry[0]
    return machine.estimate(cell) if kernel == "tiles_sm80" else None


def search(kernel: Kernel, cell: Cell, machine: Machine, trials: Trials, before: Way | None) -> Found:
    """The fastest right ways of one cell, with the one in use so far among those timed again."""
    refusals: list[Refusal] = []
    glances: dict[Way, float] = {}
    listed = panel_ways.candidates(kernel, cell, machine)
    for way in dict.fromkeys([*([] if before is None else [before]), *listed]):
        # A way that the library refuses (too much shared memory, not compiled) comes as any exception.
        try:
            wrong = trials.check(kernel, cell, way)
            if wrong is None:
                glances[way] = trials.glance(kernel, cell, way)
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            refusals.append(Refusal(cell, kernel, way, said, wrong=False))
            continue
        if wrong is not None:
            refusals.append(Refusal(cell, kernel, way, wrong, wrong=True))
    fastest = sorted(glances, key=glances.__getitem__)[:KEPT]
    if before in glances and before not in fastest:
        fastest.append(before)
    times = trials.refine(kernel, cell, fastest) if fastest else []
    ways = dict(sorted(zip(fastest, times, strict=True), key=lambda item: item[1]))
    return Found(kernel, cell, before, ways, refusals)


def sweep_text(kernel: Kernel, bits: int, old: str, new: Sequence[Found], where: str) -> str:
    """The sweep of a width with the new cells in the place of the old. where: device and date of the new."""
    measured = _measured(kernel, bits, new)
    kept: dict[Cell, list[str]] = {}
    notes = []
    for line in old.splitlines():
        if line.startswith("#"):
            notes.append(line)
            continue
        K, N, M = map(int, line.split()[:3])
        cell = Cell(K, N, M, bits)
        if cell not in measured:
            kept.setdefault(cell, []).append(line)
    if not notes:
        about = _ABOUT[kernel].format(kept=KEPT, fields=" ".join(panel_ways.fields(kernel)))
        how = "without" if kernel == "tiles_sm80" else "with"
        notes = _comment(f"{about} {HOW.format(bits=bits, how=how)}")
    if measured:
        notes = _with_cells(notes, where, sorted(measured))
    for cell, ways in measured.items():
        kept[cell] = [
            " ".join(map(str, (cell.K, cell.N, cell.M, *way))) + f" {us:.3f}" for way, us in ways.items()
        ]
    return "\n".join([*notes, *(line for cell in sorted(kept) for line in kept[cell]), ""])


def _measured(kernel: Kernel, bits: int, new: Sequence[Found]) -> Mapping[Cell, Mapping[Way, float]]:
    return {one.cell: one.ways for one in new if one.kernel == kernel and one.cell.bits == bits and one.ways}


def _with_cells(notes: Sequence[str], where: str, cells: Sequence[Cell]) -> list[str]:
    """The notes with these cells in the heading of `where`, which is the last one if it is there."""
    starts = [place for place, note in enumerate(notes) if note.startswith(f"# {where}: ")]
    at = starts[-1] if starts else len(notes)
    before = " ".join(note.removeprefix("# ") for note in notes[at:])
    said = before.removeprefix(f"{where}: ").removesuffix(".")
    named = dict.fromkeys([*(said.split(", ") if said else []), *map(str, cells)])
    return [*notes[:at], *_comment(f"{where}: " + ", ".join(named) + ".")]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")


def write(folder: Path, new: Sequence[Found], where: str) -> Sequence[Path]:
    """Write the sweeps and the table of choices that `folder` is to hold; files that it lacks begin as those
    of the sources. What was written, in that order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kernel, bits in itertools.product(panel_ways.KERNELS, panel_ways.table().BITS):
        path = folder / panel_ways.table().sweep_name(kernel, bits)
        before = path if path.exists() else panel_ways.SOURCE / path.name
        if not before.exists() and not _measured(kernel, bits, new):
            continue
        old = before.read_text() if before.exists() else ""
        path.write_text(sweep_text(kernel, bits, old, new, where))
        written.append(path)
    written.append(write_table(folder))
    return written


def write_table(folder: Path) -> Path:
    """Make the table of choices from the sweeps of `folder`."""
    chain = panel_ways.table().CHAIN
    if not (folder / chain).exists() and (panel_ways.SOURCE / chain).exists():
        (folder / chain).write_text((panel_ways.SOURCE / chain).read_text())
    path = folder / "choices_table.h"
    path.write_text(panel_ways.table().header(folder))
    return path


def tune(
    todo: Sequence[tuple[Kernel, Cell]],
    machine: Machine,
    trials_of: Callable[[Cell, int], Trials],
    is_over: Callable[[], bool],
    folder: Path,
) -> Iterator[Found]:
    """Each cell as it is done, until the time is over.

    trials_of: the trials of a weight (the cell's, whatever its M) for up to so many tokens.
    folder: whose sweeps hold the ways in use.
    """
    by_weight: dict[tuple[int, int, int], list[tuple[Kernel, Cell]]] = {}
    for kernel, cell in todo:
        by_weight.setdefault(cell.weight, []).append((kernel, cell))
    # The largest say least that the others do not, and take longest.
    for weight in sorted(by_weight, key=lambda sizes: sizes[0] * sizes[1]):
        if is_over():
            return
        members = by_weight[weight]
        trials = trials_of(members[0][1], max(cell.M for _, cell in members))
        for kernel, cell in members:
            if is_over():
                return
            yield search(kernel, cell, machine, trials, in_use(kernel, cell, folder, machine))
        del trials


def show(found: Sequence[Found]) -> None:
    """Print the fastest way of each cell beside the one in use so far."""
    rows = []
    for one in found:
        if not one.ways:
            rows.append((str(one.cell), one.kernel, "-", "-", "-", "nothing ran"))
            continue
        way, us = next(iter(one.ways.items()))
        before = None if one.before is None else one.ways.get(one.before)
        rows.append(
            (
                str(one.cell),
                one.kernel,
                f"{us:.2f}",
                "-" if before is None else f"{before:.2f}",
                "-" if before is None else f"{before / us:.3f}",
                " ".join(map(str, way)) + (" (as before)" if way == one.before else ""),
            )
        )
    columns = ("cell", "kernel", "us", "before", "gain", "way")
    tables.show("the fastest ways", columns, rows, text_columns=2)
