"""Ours against the best peer and the floor, on made-up runs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from qsun_bench import margins, plots
from qsun_bench.results import Header, Record, ResultsError, Run
from qsun_kernels.backends.problems import BACKENDS

HEADER = Header("NVIDIA H100", "0123456789ab", "2026-01-31", "2.11.0", None, "13.0", "qsun-bench wna16", 3.0)

OURS, OTHER, _ = BACKENDS


def cell(matrix: str, M: int, backend: str, us: float | None, *, error: float | None = 0.5) -> Record:
    # 9 MB at 3 TB/s: a floor of 3 us.
    fields = {"M": M, "N": 4096, "K": 4096}
    ok = us is not None
    return Record("wna16_linear", f"{matrix}.w4g128.M{M}", backend, us, 9_000_000, error, ok, fields)


def run(*records: Record) -> Run:
    return Run(HEADER, records)


RUN = run(
    cell("a", 16, OURS, 4.0),
    cell("a", 16, OTHER, 2.0),
    cell("a", 16, "marlin", 8.0),
    cell("a", 16, "humming", 6.0),
    cell("a", 17, OURS, 6.0),
    cell("a", 17, "marlin", 3.0),
    cell("a", 17, "humming", None),
    cell("b", 16, OURS, 6.0),
    cell("b", 16, "marlin", 6.0),
    cell("b", 17, OURS, 5.0),
    cell("b", 17, "humming", None, error=None),
)


def test_a_cell_is_ours_against_the_fastest_right_peer() -> None:
    first, second, third, fourth = margins.cells(RUN)
    # The backend that is chosen by itself is what counts, although another was faster.
    assert first.us == 4.0 and first.peer is not None and first.peer.backend == "humming"
    assert first.ratio == 1.5 and first.share == pytest.approx(0.75) and first.floor_us == pytest.approx(3.0)
    assert second.peer is not None and second.peer.backend == "marlin" and second.ratio == 0.5
    assert third.ratio == 1.0
    assert fourth.peer is None and fourth.ratio is None and fourth.share == pytest.approx(0.6)


def test_the_geometric_mean() -> None:
    assert margins.geometric_mean([4.0, None, 1.0]) == pytest.approx(2.0)
    assert margins.geometric_mean([None]) is None and margins.geometric_mean([]) is None
    lines = margins.summary(RUN)
    assert lines[0] == "best peer / ours: geometric mean 0.909 over 3 cells"
    assert lines[1] == "cells below 1.0: 1 (a.w4g128 (4096 x 4096) M=17 0.50 marlin)"
    assert lines[2] == "share of the byte floor: geometric mean 57.9%"


def test_the_tables() -> None:
    ratios, peers, shares, steps = margins.build(RUN)
    assert ratios.columns == ("", "M = 16", "M = 17", "mean")
    assert ratios.rows[0] == ("a.w4g128 (4096 x 4096)", "1.50 humming", "0.50 marlin", "0.87")
    assert ratios.rows[1] == ("b.w4g128 (4096 x 4096)", "1.00 marlin", "", "1.00")
    assert peers.rows == [("marlin", "3", "1.00", "1", "0"), ("humming", "1", "1.50", "0", "2")]
    assert shares.rows[0][1:] == ("75%", "50%", "61%")
    assert steps.columns == ("", "t(17) / t(16)", "t(33) / t(32)", "faster with more tokens")
    assert steps.rows == [
        ("a.w4g128 (4096 x 4096)", "1.50", "", "none"),
        ("b.w4g128 (4096 x 4096)", "0.83", "", "16 to 17 (0.83)"),
    ]


def test_noise_is_no_fall() -> None:
    (_, steps) = margins.build(run(cell("a", 1, OURS, 4.0), cell("a", 2, OURS, 3.95)))
    assert steps.rows[0][-1] == "none"


@pytest.mark.parametrize(("error", "word"), [(7.0, "wrong"), (None, "failed")])
def test_ours_wrong_is_no_cell_won(error: float | None, word: str) -> None:
    broken = run(
        cell("a", 1, OURS, None, error=error),
        cell("a", 1, OTHER, 1.0),
        cell("a", 1, "marlin", 5.0),
        cell("a", 2, OURS, 4.0),
        cell("a", 2, "marlin", 4.0),
    )
    ratios = margins.build(broken)[0]
    assert ratios.rows[0][1:3] == (word, "1.00 marlin")
    assert f"cells without a right result of ours: 1 (a.w4g128 (4096 x 4096) M=1 {word})" in "\n".join(
        margins.summary(broken)
    )


def test_a_run_without_ours_or_without_matrices_has_no_tables() -> None:
    assert margins.build(run(cell("a", 1, "dense", 4.0))) == ()
    attention = Record("paged_attention_decode", "1x8", "cuda", 2.0, 4096, 0.1, True, {"batch": 1})
    stream = io.StringIO()
    margins.show(run(attention), stream)
    assert stream.getvalue() == ""


def test_it_is_printed_and_written_down() -> None:
    stream = io.StringIO()
    margins.show(RUN, stream)
    assert "1.50 humming" in stream.getvalue() and "steps in M" in stream.getvalue()
    text = margins.markdown(RUN)
    assert "| a.w4g128 (4096 x 4096) | 1.50 humming | 0.50 marlin | 0.87 |" in text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots_are_written(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for draw in (plots.save, plots.save_roofline):
        path = tmp_path / f"{draw.__name__}.{suffix}"
        draw(RUN, path)
        assert path.stat().st_size > 5000


def test_ours_are_lines_and_peers_are_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    plots.save_roofline(RUN, tmp_path / "x.png")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["M = 16", "M = 17"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines[OURS].get_linestyle() == "-" and lines["marlin"].get_linestyle() == "None"
    assert list(lines[OURS].get_ydata()) == [4.0, 6.0]
    assert lines["bytes / read"].get_ydata() == pytest.approx([3.0])


def test_nothing_timed_is_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ResultsError, match="no record was timed"):
        plots.save_roofline(run(replace(cell("a", 1, OURS, None), ok=False)), tmp_path / "x.png")
