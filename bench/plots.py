"""Plots of runs (matplotlib, of the extra `bench`). Ours are lines, peers are marks, the floor is dotted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun_bench import results
from qsun_bench.kv_choice import DEFAULT_BLOCK_SIZE
from qsun_bench.results import Record, ResultsError, Run
from qsun_kernels.backends.problems import BACKENDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_OURS = ("#0072b2", "#56b4e9", "#999999")
# Apart in shape as well as in colour: prints in grey, and readers who see no difference between the colours.
_PEERS = (
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#000000", "x"),
    ("#8c510a", "P"),
    ("#7570b3", "*"),
)


def save(run: Run, path: Path) -> None:
    """Draw a run into `path`, whose suffix chooses the format (png, svg, pdf).

    Matrix products: time over M, one panel a matrix, with the time that reading the bytes alone would take.
    Everything else: the share of the read bandwidth of each case, one bar a contender.
    Raises ResultsError when matplotlib is missing or no record was timed.
    """
    timed = timed_records(run)
    draw = _over_rows if all("M" in record.fields for record in timed) else _bars
    save_figure(run, draw(run, timed), path)


def save_roofline(run: Run, path: Path) -> None:
    """Draw the matrix products of a run as time over bytes, one panel an M, against the floor.

    The floor is the bytes at the read bandwidth in the header. Raises ResultsError as `save` does.
    """
    save_figure(
        run, _over_bytes(run, [record for record in timed_records(run) if "M" in record.fields]), path
    )


def save_recorded(root: Path, folder: Path) -> Sequence[Path]:
    """Draw every recorded run under `root` into `folder` as SUITE-DEVICE.svg; matrix products as
    SUITE-DEVICE-roofline.svg, too, and skewed batches as SUITE-DEVICE-skew.svg; the accuracy study as
    accuracy.svg. Returns what was drawn.
    """
    from qsun_bench import accuracy, views

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for source in sorted((root / results.RESULTS).glob("*/*.json")):
        run = results.parse(source.read_text(), str(source))
        name = f"{source.stem}-{source.parent.name}"
        plots: list[tuple[str, Callable[[Run, Path], None]]] = [(f"{name}.svg", views.plot)]
        if any("M" in record.fields and record.ok for record in run.records):
            plots.append((f"{name}-roofline.svg", save_roofline))
        if has_skew(run):
            plots.append((f"{name}-skew.svg", save_skew))
        for file, draw in plots:
            draw(run, folder / file)
            drawn.append(folder / file)
    if (root / accuracy.FILE).is_file():
        accuracy.plot(accuracy.read(root), folder / "accuracy.svg")
        drawn.append(folder / "accuracy.svg")
    return drawn


def timed_records(run: Run) -> list[Record]:
    """The records that can be drawn. Raises ResultsError when there are none, or no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ResultsError("--plot needs matplotlib: pip install 'qsun[bench]'")
    timed = [record for record in run.records if record.ok and record.us is not None]
    if not timed:
        raise ResultsError("--plot: no record was timed, nothing to draw")
    return timed


def save_figure(run: Run, figure: Figure, path: Path) -> None:
    """Write a figure with the run it is of above it."""
    figure.suptitle(f"{run.header.device}, commit {run.header.commit}, {run.header.date}", fontsize=9)
    figure.savefig(path, dpi=150)


def _floor(run: Run, record: Record) -> float:
    return record.bytes / run.header.read_tb_s * 1e-6


def grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most three beside each other; inches a panel."""
    from matplotlib.figure import Figure

    across = min(3, count)
    down = -(-count // across)
    figure = Figure(figsize=(width * across, height * down + 0.4), layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(count)]


def _draw_times(
    axes: Axes, backends: Iterable[str], records: Sequence[Record], over: Callable[[Record], float]
) -> None:
    """Time over something, a contender at a time. backends: of the whole figure, so that styles agree."""
    ours = [name for name in BACKENDS if name in backends]
    peers = [name for name in backends if name not in BACKENDS]
    for backend in (*ours, *peers):
        points = sorted((over(r), r.us or 0.0) for r in records if r.backend == backend)
        if not points:
            continue
        if backend in ours:
            style: dict[str, Any] = {
                "color": _OURS[ours.index(backend)],
                "linestyle": "-",
                "marker": "o",
                "markersize": 3,
            }
        else:
            colour, marker = _PEERS[peers.index(backend) % len(_PEERS)]
            style = {"color": colour, "linestyle": "none", "marker": marker, "markersize": 4.0}
        axes.plot(*zip(*points, strict=True), linewidth=1.2, label=backend, **style)


def finish_axes(axes: Axes, title: str, below: str, beside: str) -> None:
    """Names and grid of a panel."""
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(below, fontsize=8)
    axes.set_ylabel(beside, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, which="both", linewidth=0.3)


def _finish_times(axes: Axes, title: str, below: str) -> None:
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    finish_axes(axes, title, below, "us")


def _plain_numbers(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of each decade, written out: a reader compares times, not exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure) -> None:
    """One for all panels: their styles agree."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=6, fontsize=7)


def _over_rows(run: Run, timed: list[Record]) -> Figure:
    panels: dict[str, list[Record]] = {}
    for record in timed:
        panels.setdefault(record.case.rpartition(".")[0], []).append(record)
    backends = list(dict.fromkeys(record.backend for record in timed))
    figure, every = grid(len(panels), 4.2, 3.2)
    for axes, (title, records) in zip(every, panels.items(), strict=True):
        _draw_times(axes, backends, records, lambda r: float(str(r.fields["M"])))
        floor = sorted({(int(str(r.fields["M"])), _floor(run, r)) for r in records})
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", linewidth=1, label="bytes / read")
        axes.set_xscale("log", base=2)
        sizes = [size for size, _ in floor]
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        _finish_times(axes, f"{title}  ({records[0].fields['K']} x {records[0].fields['N']})", "M")
    legend(figure)
    return figure


def _over_bytes(run: Run, timed: list[Record]) -> Figure:
    panels: dict[int, list[Record]] = {}
    for record in timed:
        panels.setdefault(int(str(record.fields["M"])), []).append(record)
    backends = list(dict.fromkeys(record.backend for record in timed))
    figure, every = grid(len(panels), 4.2, 3.2)
    for axes, (M, records) in zip(every, sorted(panels.items()), strict=True):
        _draw_times(axes, backends, records, lambda r: r.bytes * 1e-6)
        floor = sorted({(r.bytes * 1e-6, _floor(run, r)) for r in records})
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", linewidth=1, label="bytes / read")
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        _finish_times(axes, f"M = {M}", f"MB read and written ({run.header.read_tb_s:.3g} TB/s dotted)")
    legend(figure)
    return figure


def _bars(run: Run, timed: list[Record]) -> Figure:
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(record.case for record in timed))
    backends = list(dict.fromkeys(record.backend for record in timed))
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(cases) * len(backends)), layout="constrained")
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


def has_skew(run: Run) -> bool:
    """Whether some batch was timed at several skews: then `save_skew` has something to draw."""
    return bool(_by_total(run.records))


def save_skew(run: Run, path: Path) -> None:
    """Draw time over skew into `path`: batches with equally many requests, tokens and heads, one panel each.

    Skew is the longest request over the mean one, 1 for a uniform batch; a kernel that balances its work by
    the tokens is a flat line. Raises ResultsError as `save` does, and when no batch was timed at two skews.
    """
    panels = _by_total(timed_records(run))
    if not panels:
        raise ResultsError("--plot: no batch was timed at two skews, nothing to draw")
    backends = list(dict.fromkeys(record.backend for records in panels.values() for record in records))
    figure, every = grid(len(panels), 4.2, 3.2)
    for axes, (title, records) in zip(every, panels.items(), strict=True):
        _draw_times(axes, backends, records, _skew)
        floor = sorted({(_skew(r), _floor(run, r)) for r in records})
        axes.plot(*zip(*floor, strict=True), color="black", linestyle=":", linewidth=1, label="bytes / read")
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        _finish_times(axes, title, "longest request / mean request")
    legend(figure)
    save_figure(run, figure, path)


def _lengths(record: Record) -> list[int]:
    lengths = record.fields.get("seq_lens")
    return lengths if isinstance(lengths, list) else []


def _skew(record: Record) -> float:
    lengths = _lengths(record)
    return max(lengths) * len(lengths) / sum(lengths)


def _unusual_cache(record: Record) -> str:
    """What the cache holds and its blocks, where they are not the usual ones."""
    kv, block_size = record.fields.get("kv_dtype"), record.fields.get("block_size")
    codes = "" if kv == record.fields.get("dtype") else f" {kv}"
    return codes if block_size in (None, DEFAULT_BLOCK_SIZE) else f"{codes} blocks of {block_size}"


def _by_total(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The timed records whose batches differ in skew alone, where there are two skews at least."""
    found: dict[str, list[Record]] = {}
    for record in records:
        lengths = _lengths(record)
        if record.ok and record.us is not None and sum(lengths) > 0:
            cache = record.case.partition(".")[0] + _unusual_cache(record)
            found.setdefault(f"{cache}: {len(lengths)} requests, {sum(lengths)} tokens", []).append(record)
    return {title: same for title, same in found.items() if len({_skew(record) for record in same}) > 1}
