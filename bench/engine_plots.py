"""Plots of the engine: throughput against TPOT, latencies of a load over its rate, memory of a soak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsun_bench.plots import finish_axes, grid, legend, save_figure, timed_records
from qsun_bench.results import Record, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKS = ("o", "s", "^", "D", "v", "x", "P", "*")


def save_decode(run: Run, path: Path) -> None:
    """Draw a run of `decode`: a panel a model, context and mode, a line a setting, a point a batch.

    Raises ResultsError when matplotlib is missing or no record was timed.
    """
    panels: dict[str, dict[str, list[Record]]] = {}
    for record in timed_records(run):
        fields = record.fields
        panel = f"{fields['model']}, context {fields['context']}, {fields['mode']}"
        panels.setdefault(panel, {}).setdefault(setting_of(record), []).append(record)
    figure, every = grid(len(panels), 5.0, 3.6)
    for axes, (title, lines) in zip(every, panels.items(), strict=True):
        for i, (label, records) in enumerate(lines.items()):
            ordered = sorted(records, key=lambda record: int(str(record.fields["batch"])))
            x = [(record.us or 0.0) * 1e-3 for record in ordered]
            y = [record.measured["tokens_s"] for record in ordered]
            axes.plot(x, y, marker=_MARKS[i % len(_MARKS)], markersize=4, linewidth=1.2, label=label)
            for record, at, height in zip(ordered, x, y, strict=True):
                axes.annotate(str(record.fields["batch"]), (at, height), fontsize=6)
        finish_axes(axes, title, "TPOT ms (points: batch)", "tokens/s")
    _finish(run, figure, path)


def setting_of(record: Record) -> str:
    """What tells the lines of a plot apart."""
    fields = record.fields
    parts = [f"W{fields['bits']}", f"KV {fields['kv_dtype']}"]
    if fields.get("lm_head_bits") != 16:
        parts.append(f"head {fields['lm_head_bits']}")
    if "models" in fields:
        parts.append(f"{fields['models']} models")
    return ", ".join(parts)


def save_serve(run: Run, path: Path) -> None:
    """Draw a run of `serve` over the rate, a line an arm: goodput, time to first token, time per token.

    Raises ResultsError as `save_decode` does.
    """
    panels: Sequence[tuple[str, Callable[[Record], Any]]] = (
        ("goodput, requests/s", lambda record: record.measured["goodput_s"]),
        ("TTFT p95, ms", lambda record: record.measured["ttft_ms"]["p95"]),
        ("TPOT p50, ms", lambda record: record.measured["tpot_ms"]["p50"]),
    )
    lines: dict[str, list[Record]] = {}
    for record in timed_records(run):
        lines.setdefault(f"{record.backend}, {setting_of(record)}", []).append(record)
    figure, every = grid(len(panels), 4.2, 3.4)
    for axes, (title, of) in zip(every, panels, strict=True):
        for i, (label, records) in enumerate(lines.items()):
            ordered = sorted(records, key=lambda record: record.measured["offered_s"])
            x = [record.measured["offered_s"] for record in ordered]
            mark = _MARKS[i % len(_MARKS)]
            axes.plot(x, [of(r) for r in ordered], marker=mark, markersize=4, linewidth=1.2, label=label)
        finish_axes(axes, title, "offered requests/s", title)
    _finish(run, figure, path)


def save_soak(run: Run, path: Path) -> None:
    """Draw the memory of a soak over its time.

    Raises ResultsError as `save_decode` does.
    """
    records = timed_records(run)
    figure, every = grid(len(records), 5.0, 3.4)
    for axes, record in zip(every, records, strict=True):
        minutes = [sample["minute"] for sample in record.measured["memory"]]
        for name, mark in zip(("host", "device"), _MARKS, strict=False):
            gigabytes = [sample[name] * 1e-9 for sample in record.measured["memory"]]
            if any(gigabytes):
                axes.plot(minutes, gigabytes, marker=mark, markersize=3, linewidth=1.2, label=name)
        finish_axes(axes, record.case, "minute", "memory, GB")
    _finish(run, figure, path)


def _finish(run: Run, figure: Figure, path: Path) -> None:
    legend(figure)
    save_figure(run, figure, path)
