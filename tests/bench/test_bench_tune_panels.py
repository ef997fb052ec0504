"""qsun-bench tune wna16 --backend cuda: what it measures, keeps, writes and refuses. Timing is faked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsun_bench import panel_ways, tune_panels
from qsun_bench.cli import main
from qsun_bench.panel_ways import Cell, Kernel, Machine, Way

CELL = Cell(4096, 4096, 16)
ESTIMATE = (8, 4, 2, 16, 6)
MACHINE = Machine(
    132, 227 << 10, ((16, 1), (32, 1), (64, 2)), lambda kernel, cell, way: 30_000, lambda cell: ESTIMATE
)
"""Where every block takes as much shared memory, and tiles_sm80 is launched one way."""


class FakeTrials:
    """Times by way: the sum of its numbers, and 0.5 more when timed well."""

    def __init__(
        self,
        wrong: Callable[[Way], bool] = lambda way: False,
        raising: Callable[[Way], bool] = lambda way: False,
    ) -> None:
        self.wrong, self.raising = wrong, raising
        self.glanced: list[Way] = []
        self.refined: list[Way] = []

    def check(self, kernel: Kernel, cell: Cell, way: Way) -> str | None:
        if self.raising(way):
            raise RuntimeError("shared memory is 9; expected at most 8\nmore")
        return "error 0.5" if self.wrong(way) else None

    def glance(self, kernel: Kernel, cell: Cell, way: Way) -> float:
        self.glanced.append(way)
        return float(sum(way))

    def refine(self, kernel: Kernel, cell: Cell, ways: Sequence[Way]) -> Sequence[float]:
        self.refined += ways
        return [sum(way) + 0.5 for way in ways]


def search(trials: FakeTrials, before: Way | None = None, kernel: Kernel = "gemm_sm90") -> tune_panels.Found:
    return tune_panels.search(kernel, CELL, MACHINE, trials, before)


# ---- one cell


def test_the_fastest_are_timed_again_and_kept_in_order() -> None:
    trials = FakeTrials()
    found = search(trials)
    listed = sorted(panel_ways.candidates("gemm_sm90", CELL, MACHINE), key=sum)
    assert sorted(trials.glanced, key=sum) == listed
    assert [sum(way) for way in trials.refined] == [sum(way) for way in listed[: tune_panels.KEPT]]
    assert list(found.ways.values()) == sorted(found.ways.values()) and len(found.ways) == tune_panels.KEPT
    assert min(found.ways.values()) == sum(listed[0]) + 0.5


def test_the_way_in_use_is_timed_beside_the_fastest() -> None:
    slow = (64, 2, 16, 8, 0)
    found = search(FakeTrials(), before=slow)
    assert len(found.ways) == tune_panels.KEPT + 1 and list(found.ways)[-1] == slow


def test_what_is_wrong_or_refused_is_not_timed() -> None:
    trials = FakeTrials(wrong=lambda way: way[2] == 3, raising=lambda way: way[2] == 4)
    found = search(trials)
    assert trials.glanced and not {way[2] for way in trials.glanced} & {3, 4}
    assert {refusal.wrong for refusal in found.refusals if refusal.way[2] == 3} == {True}
    said = {str(refusal).split(": ", 3)[-1] for refusal in found.refusals if refusal.way[2] == 4}
    assert said == {"shared memory is 9; expected at most 8"}


def test_where_nothing_is_right_nothing_is_kept() -> None:
    found = search(FakeTrials(wrong=lambda way: True))
    assert not found.ways and found.refusals


# ---- the sweep's text


def test_new_cells_replace_old_ones_and_others_stay() -> None:
    old = "# about\n64 64 16 16 1 1 4 0 5.000\n64 64 32 32 1 1 4 0 6.000\n64 64 32 32 1 2 4 0 7.000\n"
    ways = {(48, 2, 1, 3, 0): 4.25, (32, 1, 1, 4, 0): 5.5}
    new = [
        tune_panels.Found("gemm_sm90", Cell(64, 64, 32), None, ways),
        tune_panels.Found("stream", Cell(64, 64, 16), None, {(2, 2, 8, 2, 1, 1): 1.0}),
        tune_panels.Found("gemm_sm90", Cell(64, 64, 16), None),
    ]
    text = tune_panels.sweep_text("gemm_sm90", 4, old, new, "H100, 2026-12-01")
    assert text == (
        "# about\n# H100, 2026-12-01: W4 64x64 M=32.\n64 64 16 16 1 1 4 0 5.000\n"
        "64 64 32 48 2 1 3 0 4.250\n64 64 32 32 1 1 4 0 5.500\n"
    )
    assert tune_panels.sweep_text("gemm_sm90", 4, old, [], "H100") == old
    assert tune_panels.sweep_text("gemm_sm90", 2, old, new, "H100") == old, "cells of another width"


def test_a_sweep_from_nothing_says_what_it_is() -> None:
    found = [tune_panels.Found("stream", Cell(64, 64, 1, 3), None, {(1, 2, 8, 2, 1, 0): 1.5})]
    text = tune_panels.sweep_text("stream", 3, "", found, "H100, 2026-12-01")
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "K N M token_tiles row_tiles warps stages copy_engine waves us" in head
    assert " W3, bfloat16, groups of 128" in head
    assert "after 60 ms of the same load" in head and max(map(len, text.splitlines())) <= 110
    assert text.endswith("\n64 64 1 1 2 8 2 1 0 1.500\n")


def test_the_plan() -> None:
    every = tune_panels.plan(panel_ways.KERNELS, ["decode7"], (), (4,))
    assert len(every) == 7 * sum(len(tokens) for tokens in panel_ways.TOKENS.values())
    few = tune_panels.plan(("gemm_sm90",), ["llama-3.1-8b.o", "llama-3.1-70b.qkv"], (1, 256), (4,))
    assert few == [("gemm_sm90", Cell(4096, 4096, 256)), ("gemm_sm90", Cell(8192, 10240, 256))]
    widths = tune_panels.plan(("stream",), ["llama-3.1-8b.o"], (1,), (2, 8))
    assert widths == [("stream", Cell(4096, 4096, 1, 2)), ("stream", Cell(4096, 4096, 1, 8))]


def test_each_weight_has_trials_of_its_own_smallest_first() -> None:
    """A width is another weight: trials serve the cells of one, and a time limit leaves the largest out."""
    todo = [("stream", Cell(K, 64, M, bits)) for K in (8192, 4096) for bits in (2, 3) for M in (1, 8)]
    asked = []

    def trials_of(cell: Cell, most_tokens: int) -> FakeTrials:
        asked.append((*cell.weight, most_tokens))
        return FakeTrials()

    done = [
        found.cell
        for found in tune_panels.tune(todo, MACHINE, trials_of, lambda: len(asked) > 3, panel_ways.SOURCE)  # type: ignore[arg-type]
    ]
    assert asked == [(4096, 64, 2, 8), (4096, 64, 3, 8), (8192, 64, 2, 8), (8192, 64, 3, 8)]
    assert done == [cell for _, cell in sorted(todo, key=lambda one: one[1].weight)][:6]


def test_the_way_in_use_is_that_of_the_width_or_of_w4(tmp_path: Path) -> None:
    def in_use(kernel: Kernel, cell: Cell) -> Way | None:
        return tune_panels.in_use(kernel, cell, tmp_path, MACHINE)

    (tmp_path / "stream_sweep.txt").write_text("64 64 1 1 2 8 2 1 0 5.0\n64 64 2 1 2 8 3 1 0 6.0\n")
    (tmp_path / "stream_w2_sweep.txt").write_text("64 64 1 1 4 8 6 1 0 3.0\n")
    four, two = (1, 2, 8, 2, 1, 0), (1, 4, 8, 6, 1, 0)
    assert in_use("stream", Cell(64, 64, 1, 2)) == two
    assert in_use("stream", Cell(64, 64, 1, 3)) == in_use("stream", Cell(64, 64, 1)) == four
    assert in_use("stream", Cell(64, 64, 2, 2)) == (1, 2, 8, 3, 1, 0)
    assert in_use("stream", Cell(64, 64, 4, 2)) is None
    assert in_use("tiles_sm80", Cell(64, 64, 32)) == ESTIMATE
    (tmp_path / "tiles_sm80_sweep.txt").write_text("64 64 32 4 1 4 1 6 4.0\n")
    assert in_use("tiles_sm80", Cell(64, 64, 32)) == (4, 1, 4, 1, 6)
    assert in_use("tiles_sm80", Cell(64, 64, 64)) == ESTIMATE


# ---- the command


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A device that says whatever `trials` say."""
    pytest.importorskip("qsun_kernels._C")
    from qsun_bench import tune_panels_device

    state = SimpleNamespace(trials=FakeTrials())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune_panels_device, "why_not", lambda: None)
    monkeypatch.setattr(tune_panels_device, "machine", lambda device: MACHINE)
    monkeypatch.setattr(tune_panels_device, "where", lambda device: "Fake 9000, 2026-12-01")
    monkeypatch.setattr(tune_panels_device, "RowTrials", lambda *arguments: state.trials)
    yield state


def test_the_command_writes_sweeps_and_table(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in panel_ways.SOURCE.iterdir() if path.is_file()}
    arguments = ["tune", "wna16", "--backend", "cuda", "--kernel", "gemm_sm90", "--m", "32", "--quick"]
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "W4 4096x4096 M=32" in said
    written = said.partition("written: ")[2].strip().split(", ")
    assert str(tmp_path / "new" / "stream_sweep.txt") in written
    sweep = (tmp_path / "new" / "gemm_sm90_sweep.txt").read_text()
    assert "# Fake 9000, 2026-12-01: W4 4096x4096 M=32.\n" in sweep
    way = next(iter(fake_gpu.trials.refined))
    best = min((sum(w) + 0.5, w) for w in fake_gpu.trials.refined)
    assert way in panel_ways.candidates("gemm_sm90", Cell(4096, 4096, 32), MACHINE)
    table = panel_ways.table()
    assert table.fastest((sweep), serves_fewer=False)[(4096, 4096), 32] == (best[1], best[0])
    assert (tmp_path / "new" / "stream_sweep.txt").read_bytes() == before["stream_sweep.txt"]
    assert (tmp_path / "new" / "choices_table.h").read_text() == table.header(tmp_path / "new")
    after = {path.name: path.read_bytes() for path in panel_ways.SOURCE.iterdir() if path.is_file()}
    assert after == before, "without --write the tables in use stay"


def test_cells_that_are_written_one_by_one_share_a_heading(tmp_path: Path) -> None:
    """The command writes after each cell. Other days keep their headings, and no cell is named twice."""
    way = (64, 2, 1, 4, 0)
    cells = [Cell(K, 4096, M) for K in (4096, 14336) for M in (32, 48, 64, 96)]
    for cell in (*cells, cells[0]):
        found = tune_panels.Found("gemm_sm90", cell, None, {way: 1.0})
        tune_panels.write(tmp_path, [found], "Fake 9000, 2026-12-01")
    tune_panels.write(tmp_path, [found], "Fake 9000, 2026-12-02")
    lines = (tmp_path / "gemm_sm90_sweep.txt").read_text().splitlines()
    at = next(place for place, line in enumerate(lines) if "2026-12-01" in line)
    notes = [line for line in lines[at:] if line.startswith("#")]
    heading = " ".join(note.removeprefix("# ") for note in notes[:-1])
    assert heading == "Fake 9000, 2026-12-01: " + ", ".join(map(str, cells)) + "."
    assert notes[-1] == "# Fake 9000, 2026-12-02: W4 4096x4096 M=32." and len(notes[0]) > 80


def test_the_command_keeps_widths_apart(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "wna16", "--backend", "cuda", "--kernel", "stream", "--m", "1", "--quick"]
    assert main([*arguments, "--bits", "2,3", "--out", str(tmp_path)]) == 0
    assert "W2 4096x4096 M=1" in capsys.readouterr().out
    table = panel_ways.table()
    entries = []
    for bits in (2, 3):
        name = table.sweep_name("stream", bits)
        assert name == f"stream_w{bits}_sweep.txt"
        way, us = table.chosen("stream", tmp_path, bits)[(4096, 4096), 1]
        assert way in fake_gpu.trials.refined and us == sum(way) + 0.5
        entries.append(f"    {{{bits}, 4096, 4096, 1, {us:.2f}f, {', '.join(map(str, way))}}},\n")
    four = "stream_sweep.txt"
    assert (tmp_path / four).read_text() == (panel_ways.SOURCE / four).read_text()
    header = (tmp_path / "choices_table.h").read_text()
    assert header == table.header(tmp_path) and all(entry in header for entry in entries)
    # Again, where the fastest is refused: its own lines are replaced, those of the other width stay.
    other = (tmp_path / "stream_w3_sweep.txt").read_text()
    fastest = table.chosen("stream", tmp_path, 2)[(4096, 4096), 1][0]
    fake_gpu.trials = FakeTrials(raising=lambda way: way == fastest)
    assert main([*arguments, "--bits", "2", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "stream_w3_sweep.txt").read_text() == other
    assert table.chosen("stream", tmp_path, 2)[(4096, 4096), 1][0] != fastest


def test_tiles_before_sm_90_are_measured_when_they_are_named(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "wna16", "--backend", "cuda", "--quick", "--m", "32", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "tiles_sm80" not in capsys.readouterr().out.partition("written: ")[0]
    (tmp_path / "tiles_sm80_sweep.txt").write_text("")
    fake_gpu.trials = FakeTrials()
    assert main([*arguments, "--kernel", "tiles_sm80"]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "tiles_sm80  " in line)
    cell = Cell(4096, 4096, 32)
    listed = panel_ways.candidates("tiles_sm80", cell, MACHINE)
    # What the library would launch is timed first, and again beside the fastest.
    assert fake_gpu.trials.glanced == [ESTIMATE, *listed]
    assert f"{sum(ESTIMATE) + 0.5:.2f}" in shown
    text = (tmp_path / "tiles_sm80_sweep.txt").read_text()
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "K N M token_tiles row_groups column_groups split_k stages us. Forced on a GPU" in head
    assert "replays without programmatic dependent launch" in head
    way, us = panel_ways.table().chosen("tiles_sm80", tmp_path)[(4096, 4096), 32]
    assert us == min(map(sum, listed)) + 0.5
    entry = f"    {{4, 4096, 4096, 32, {us:.2f}f, {', '.join(map(str, way))}}},\n"
    assert entry in (tmp_path / "choices_table.h").read_text()


def test_a_wrong_way_makes_the_exit_code_one(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "wna16", "--backend", "cuda", "--kernel", "stream", "--m", "1", "--quick", "--out"]
    fake_gpu.trials = FakeTrials(wrong=lambda way: way[2] == 4)
    assert main([*arguments, str(tmp_path / "a")]) == 1
    assert "WRONG: W4 4096x4096 M=1 stream token_tiles=1 row_tiles=2 warps=4 " in capsys.readouterr().err
    fake_gpu.trials = FakeTrials(wrong=lambda way: True)
    assert main([*arguments, str(tmp_path / "b")]) == 1
    assert "nothing is written" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_when_the_time_is_over_it_says_what_is_left(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "wna16", "--backend", "cuda", "--quick", "--budget", "1e-9", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "not measured: 14 of 14 cells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kernel", "stream"], "--kernel: expected only with --backend cuda"),
        (["--chain"], "--chain: expected only with --backend cuda"),
        (["--bits", "2"], "--bits: expected only with --backend cuda"),
        (["--backend", "cuda", "--bits", "5"], "--bits: got '5', expected some of 2, 3, 4, 8"),
        (["--backend", "cuda", "--chain", "--bits", "2"], "--bits: expected without --chain"),
        (
            ["--backend", "cuda", "--kernel", "wide"],
            "--kernel: got 'wide', expected some of stream, gemm_sm90, tiles_sm80",
        ),
        (["--backend", "cuda", "--m", "5"], "--m: got 5, expected some of (1, 2, 4, 8, 16) for stream"),
        (
            ["--backend", "cuda", "--kernel", "tiles_sm80", "--m", "16"],
            "--m: got 16, expected some of (24, 32, 48, 64) for tiles_sm80",
        ),
        (
            ["--backend", "cuda", "--kernel", "stream,tiles_sm80", "--bits", "3"],
            "--bits: got (3,), expected with tiles_sm80 some of (4, 8)",
        ),
        (["--backend", "cuda", "--chain", "--m", "5"], "--m: got (5,), expected with --chain some of"),
        (["--backend", "cuda", "--chain", "--kernel", "stream"], "--kernel: expected without --chain"),
        (["--backend", "cuda", "--out", str(panel_ways.SOURCE)], "holds the tables in use, expected another"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", "wna16", *arguments])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for chain in ([], ["--chain"]):
        out = tmp_path / "new"
        assert main(["tune", "wna16", "--backend", "cuda", *chain, "--out", str(out)]) == 4
        assert "backend 'cuda' cannot run wna16_linear: no CUDA device" in capsys.readouterr().err
        assert not out.exists()


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.sm90
def test_a_quick_run_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every candidate of one small cell of each kernel is right, and the times are of this world."""
    arguments = ["tune", "wna16", "--backend", "cuda", "--quick", "--m", "16", "--out", str(tmp_path)]
    assert main(arguments) == 0, capsys.readouterr().err
    for kernel in panel_ways.SM90_KERNELS:
        way, us = panel_ways.table().fastest_of(kernel, tmp_path)[(4096, 4096), 16]
        assert way and 2.0 < us < 100.0
    tiles = [*arguments[:5], "--kernel", "tiles_sm80", "--m", "32", "--bits", "4,8", *arguments[7:]]
    assert main(tiles) == 0, capsys.readouterr().err
    narrow = [*arguments[:5], "--kernel", "stream", "--m", "1", "--bits", "2,3", *arguments[7:]]
    assert main(narrow) == 0, capsys.readouterr().err
    for kernel, M, bits in (("tiles_sm80", 32, 4), ("tiles_sm80", 32, 8), ("stream", 1, 2), ("stream", 1, 3)):
        _, us = panel_ways.table().fastest_of(kernel, tmp_path, bits)[(4096, 4096), M]
        assert 1.0 < us < 100.0
    assert main([*arguments[:4], "--chain", *arguments[4:]]) == 0, capsys.readouterr().err
    chain = panel_ways.table().in_chain("stream", tmp_path)
    assert chain and all(0 < us < 200 for _, us in chain.values())
