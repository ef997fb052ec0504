"""qsun-bench tune wna16 --backend cuda: what it lists, chooses, writes and refuses. Timing is faked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsun_bench import panel_ways, tune_chain, tune_layer_device, tune_panels
from qsun_bench.cli import main
from qsun_bench.panel_ways import Cell, Kernel, Machine, Way

CELL = Cell(4096, 4096, 16)
TILES = (
    (16, 1),
    (32, 1),
    (16, 2),
    (32, 2),
    (48, 2),
    (64, 2),
    (96, 2),
    (128, 2),
    (128, 3),
    (128, 4),
    (256, 2),
)


def shared_bytes(kernel: Kernel, cell: Cell, way: Way) -> int:
    """About what the library says: stages of codes and of x."""
    if kernel == "gemm_sm90":
        token_tile, warp_groups, _, stages, _ = way
        return stages * (token_tile * 256 + warp_groups * 4224)
    token_tiles, row_tiles, warps, stages, *_ = way
    return int(warps * stages * (row_tiles * 1056 + min(cell.M, 8 * token_tiles) * 272))


MACHINE = Machine(132, 227 << 10, TILES, shared_bytes)


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


@pytest.fixture
def extension() -> Any:
    """The binding, where it is built."""
    return pytest.importorskip("qsun_kernels._C")


# ---- candidates


@pytest.mark.parametrize("kernel", panel_ways.KERNELS)
def test_candidates_hold_what_the_table_holds(kernel: Kernel) -> None:
    for ((K, N), M), (way, _) in panel_ways.table().fastest_of(kernel).items():
        assert way in panel_ways.candidates(kernel, Cell(K, N, M), MACHINE), (kernel, K, N, M, way)


@pytest.mark.parametrize(
    ("kernel", "M"),
    [
        (kernel, M)
        for kernel in panel_ways.KERNELS
        for M in (1, 8, 16, 64, 256)
        if kernel != "stream" or M <= 16
    ],
)
def test_candidates_are_distinct_and_fit(kernel: Kernel, M: int) -> None:
    for K, N in ((4096, 4096), (8192, 57344), (576, 1536)):
        cell = Cell(K, N, M)
        found = panel_ways.candidates(kernel, cell, MACHINE)
        assert len(set(found)) == len(found)
        assert all(len(way) == len(panel_ways.fields(kernel)) for way in found)
        assert all(shared_bytes(kernel, cell, way) <= MACHINE.shared_memory for way in found)


def test_the_library_runs_what_is_listed(extension: Any) -> None:
    """Every candidate becomes a configuration of the library, and the library knows its memory."""
    from qsun_bench import tune_panels_device

    machine = tune_panels_device.machine_of(132, 227 << 10)
    assert set(map(tuple, machine.tiles)) == set(TILES)
    for kernel in panel_ways.KERNELS:
        found = panel_ways.candidates(kernel, CELL, machine)
        assert found
        for way in found:
            assert 0 < machine.shared_bytes(kernel, CELL, way) <= machine.shared_memory
            made = tune_panels_device.config(kernel, CELL, way, 132)
            assert all(
                getattr(made, {"in_cluster": "adds_in_cluster"}.get(name, name)) == value
                for name, value in zip(panel_ways.fields(kernel), way, strict=True)
                if name != "waves"
            )


def test_sums_in_a_cluster_are_tried_where_they_can_be() -> None:
    ways = panel_ways.candidates("gemm_sm90", Cell(4096, 4096, 256), MACHINE)
    clusters = [way for way in ways if way[4]]
    assert clusters and all(way[0] >= 64 and 2 <= way[2] <= 8 for way in clusters)
    assert all((*way[:4], 0) in ways for way in clusters)


def test_waves_become_row_blocks() -> None:
    cell = Cell(4096, 6144, 1)  # 384 row tiles
    of = [
        panel_ways.settings("stream", cell, (1, 2, 8, 2, 1, waves), 132)["row_blocks"] for waves in range(4)
    ]
    assert of == [192, 132, 264, 384]


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
    text = tune_panels.sweep_text("gemm_sm90", old, new, "H100, 2026-12-01")
    assert text == (
        "# about\n# H100, 2026-12-01: 64x64 M=32.\n64 64 16 16 1 1 4 0 5.000\n"
        "64 64 32 48 2 1 3 0 4.250\n64 64 32 32 1 1 4 0 5.500\n"
    )
    assert tune_panels.sweep_text("gemm_sm90", old, [], "H100") == old


def test_a_sweep_from_nothing_says_what_it_is() -> None:
    found = [tune_panels.Found("stream", Cell(64, 64, 1), None, {(1, 2, 8, 2, 1, 0): 1.5})]
    text = tune_panels.sweep_text("stream", "", found, "H100, 2026-12-01")
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert "K N M token_tiles row_tiles warps stages copy_engine waves us" in head
    assert "after 60 ms of the same load" in head and max(map(len, text.splitlines())) <= 110
    assert text.endswith("\n64 64 1 1 2 8 2 1 0 1.500\n")


def test_the_plan() -> None:
    every = tune_panels.plan(panel_ways.KERNELS, ["decode7"], ())
    assert len(every) == 7 * (len(panel_ways.STREAM_TOKENS) + len(panel_ways.GEMM_TOKENS))
    few = tune_panels.plan(("gemm_sm90",), ["llama-3.1-8b.o", "llama-3.1-70b.qkv"], (1, 256))
    assert few == [("gemm_sm90", Cell(4096, 4096, 256)), ("gemm_sm90", Cell(8192, 10240, 256))]


# ---- the chain


class FakeChain:
    """A layer's time: of each product its own, and more where two neighbours run the same way."""

    def __init__(self, own: Callable[[str, tune_chain.Launch], float]) -> None:
        self.own = own
        self.timed = 0

    def time(self, M: int, chain: tune_chain.Chain) -> float:
        self.timed += 1
        launches = list(chain.values())
        clash = sum(one[1][-1] == two[1][-1] for one, two in itertools.pairwise(launches))
        return sum(self.own(*item) for item in chain.items()) + 5.0 * clash


START: tune_chain.Chain = {product: ("stream", (0,)) for product in tune_chain.PRODUCTS}
TRIED: dict[str, list[tune_chain.Launch]] = {
    product: [("stream", (0,)), ("stream", (1,)), ("gemm_sm90", (7,))] for product in tune_chain.PRODUCTS
}


def test_the_chain_counts_not_the_product_alone() -> None:
    """Alone every product is fastest with (0,); one after another they are not."""
    trials = FakeChain(lambda product, launch: 1.0 + launch[1][0])
    found = tune_chain.descend(1, START, TRIED, trials)
    assert found.before == 4.0 + 15.0 and found.after < found.before
    launches = [found.chain[product] for product in tune_chain.PRODUCTS]
    assert all(one != two for one, two in itertools.pairwise(launches))
    assert found.after == trials.time(1, found.chain)


def test_what_a_product_adds_and_the_kernel_that_is_taken() -> None:
    trials = FakeChain(lambda product, launch: 2.0 if launch[0] == "gemm_sm90" else 3.0)
    found = tune_chain.descend(16, START, {**TRIED, "o": TRIED["o"][:2]}, trials)
    for product in tune_chain.PRODUCTS:
        kernel, way = found.chain[product]
        assert found.best[product, kernel][0] == way
        others = [us for (name, by), (_, us) in found.best.items() if name == product and by != kernel]
        assert all(us > found.best[product, kernel][1] for us in others)
    assert ("o", "gemm_sm90") not in found.best


def test_what_is_near_the_best_is_tried_as_well() -> None:
    """From (0,) on, each step finds a better neighbour, up to (4,), which no list holds."""
    trials = FakeChain(lambda product, launch: 10.0 - min(launch[1][0], 4))
    tried: dict[str, list[tune_chain.Launch]] = {product: [("stream", (0,))] for product in TRIED}

    def around(product: str, launch: tune_chain.Launch) -> list[tune_chain.Launch]:
        return [("stream", (launch[1][0] + step,)) for step in (-1, 1)]

    found = tune_chain.descend(1, START, tried, trials, around)
    assert max(way[0] for _, way in found.chain.values()) == 4
    assert found.after < found.before


def test_near_is_one_number_away_whatever_the_stages() -> None:
    way = (1, 2, 16, 2, 1, 1)
    listed = [way, (1, 2, 16, 3, 1, 1), (1, 2, 12, 4, 1, 1), (1, 4, 8, 2, 1, 1), (1, 2, 16, 2, 0, 0)]
    assert tune_chain.near(("stream", way), listed) == [("stream", other) for other in listed[:3]]


def test_lucky_timings_do_not_win() -> None:
    """Each first timing of a launch looks fast; timed again in turn, none is faster than the start."""
    seen: set[object] = set()

    class Lucky:
        def time(self, M: int, chain: tune_chain.Chain) -> float:
            key = tuple(chain.items())
            lucky = key not in seen and dict(chain) != dict(START)
            seen.add(key)
            return 10.0 if dict(chain) == dict(START) else (5.0 if lucky else 11.0)

    found = tune_chain.descend(1, START, TRIED, Lucky())
    assert found.chain == START and found.after == found.before == 10.0


def test_a_launch_that_is_refused_is_said_and_left_out() -> None:
    def own(product: str, launch: tune_chain.Launch) -> float:
        if launch[0] == "gemm_sm90":
            raise RuntimeError("perm is given")
        return 1.0

    # The words of a way are those of its kernel's fields.
    tried = {
        product: [*TRIED[product][:2], ("gemm_sm90", (16, 1, 2, 4, 0))] for product in tune_chain.PRODUCTS
    }
    found = tune_chain.descend(4, START, tried, FakeChain(own))  # type: ignore[arg-type]
    assert len(found.refusals) == 4
    assert found.refusals[0] == (
        "refused: qkv M=4 gemm_sm90 token_tile=16 warp_groups=1 split_k=2 stages=4 in_cluster=0: "
        "RuntimeError: perm is given"
    )


def test_the_start_is_what_the_library_launches(extension: Any) -> None:
    if "90a" not in extension.build_info()["archs"]:
        pytest.skip("built without sm_90a")
    props = extension.DeviceProps(
        compute_major=9, compute_minor=0, sm_count=132, shared_memory_per_block=232448, l2_bytes=50 << 20
    )
    for M in tune_chain.TOKENS:
        for product, (kernel, way) in tune_chain.start(M, panel_ways.SOURCE).items():
            cell = tune_chain.cell(product, M)
            said = extension.describe_wna16_panels(M, cell.N, cell.K, 4, 1, False, False, props)
            settings = panel_ways.settings(kernel, cell, way, 132)
            want = {
                name: {True: "yes", False: "no"}.get(value, str(value))
                if isinstance(value, bool)
                else str(value)
                for name, value in settings.items()
            }
            assert said.split()[0] == kernel
            assert dict(re.findall(r"(\w+)=(\w+)", said)) == want


def test_the_table_takes_the_chain_and_other_tokens_stay(tmp_path: Path) -> None:
    table = panel_ways.table()
    for kernel in panel_ways.KERNELS:
        text = (panel_ways.SOURCE / f"{kernel}_sweep.txt").read_text()
        (tmp_path / f"{kernel}_sweep.txt").write_text(text)
    assert table.in_chain("stream", tmp_path) == {}
    assert table.chosen("stream", tmp_path) == table.fastest_of("stream", tmp_path)
    way, late = (1, 2, 16, 2, 1, 1), (16, 1, 2, 4, 0)

    def found(M: int, us: float) -> tune_chain.ChainFound:
        best = {("qkv", "stream"): (way, us), ("o", "gemm_sm90"): (late, us)}
        return tune_chain.ChainFound(M, 50.0, 45.0, START, best, ())  # type: ignore[arg-type]

    first = tune_chain.text([found(1, 6.5), found(16, 7.5)], "H100, 2026-12-01")
    (tmp_path / table.CHAIN).write_text(tune_chain.text([found(1, 6.25)], "H100, 2026-12-02", first))
    text = (tmp_path / table.CHAIN).read_text()
    assert "stream 4096 6144 1 1 2 16 2 1 1 6.250\n" in text and "6.500" not in text and "7.500" in text
    assert "# M = 16: 50.00 us" in text and max(map(len, text.splitlines())) <= 110
    assert table.chosen("stream", tmp_path)[(4096, 6144), 1] == (way, 6.25)
    assert table.chosen("gemm_sm90", tmp_path)[(4096, 4096), 16] == (late, 7.5)
    untouched = table.fastest_of("gemm_sm90", tmp_path)[(4096, 4096), 32]
    assert table.chosen("gemm_sm90", tmp_path)[(4096, 4096), 32] == untouched
    assert "    {4096, 6144, 1, 6.25f, 1, 2, 16, 2, 1, 1},\n" in table.header(tmp_path)


# ---- the command


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A device that says whatever `trials` and `chain` say."""
    pytest.importorskip("qsun_kernels._C")
    from qsun_bench import tune_panels_device

    chain = FakeChain(lambda product, launch: float(sum(launch[1])))
    state = SimpleNamespace(trials=FakeTrials(), chain=chain)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune_panels_device, "why_not", lambda: None)
    monkeypatch.setattr(tune_panels_device, "machine", lambda device: MACHINE)
    monkeypatch.setattr(tune_panels_device, "where", lambda device: "Fake 9000, 2026-12-01")
    monkeypatch.setattr(tune_panels_device, "RowTrials", lambda *arguments: state.trials)
    monkeypatch.setattr(tune_layer_device, "LayerTrials", lambda *arguments: state.chain)
    yield state


def test_the_command_writes_sweeps_and_table(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in panel_ways.SOURCE.iterdir() if path.is_file()}
    arguments = ["tune", "wna16", "--backend", "cuda", "--kernel", "gemm_sm90", "--m", "32", "--quick"]
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "4096x4096 M=32" in said and f"written: {tmp_path / 'new' / 'stream_sweep.txt'}" in said
    sweep = (tmp_path / "new" / "gemm_sm90_sweep.txt").read_text()
    assert "# Fake 9000, 2026-12-01: 4096x4096 M=32.\n" in sweep
    way = next(iter(fake_gpu.trials.refined))
    best = min((sum(w) + 0.5, w) for w in fake_gpu.trials.refined)
    assert way in panel_ways.candidates("gemm_sm90", Cell(4096, 4096, 32), MACHINE)
    table = panel_ways.table()
    assert table.fastest((sweep), serves_fewer=False)[(4096, 4096), 32] == (best[1], best[0])
    assert (tmp_path / "new" / "stream_sweep.txt").read_bytes() == before["stream_sweep.txt"]
    assert (tmp_path / "new" / "choices_table.h").read_text() == table.header(tmp_path / "new")
    after = {path.name: path.read_bytes() for path in panel_ways.SOURCE.iterdir() if path.is_file()}
    assert after == before, "without --write the tables in use stay"


def test_the_chain_command(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "wna16", "--backend", "cuda", "--chain", "--m", "1,16", "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "gate_up" in said and "us before" in said
    text = (tmp_path / panel_ways.table().CHAIN).read_text()
    assert "# M = 1: " in text and "# M = 16: " in text and "Fake 9000, 2026-12-01" in text
    assert (tmp_path / "choices_table.h").read_text() == panel_ways.table().header(tmp_path)


def test_a_wrong_way_makes_the_exit_code_one(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "wna16", "--backend", "cuda", "--kernel", "stream", "--m", "1", "--quick", "--out"]
    fake_gpu.trials = FakeTrials(wrong=lambda way: way[2] == 4)
    assert main([*arguments, str(tmp_path / "a")]) == 1
    assert "WRONG: 4096x4096 M=1 stream token_tiles=1 row_tiles=2 warps=4 " in capsys.readouterr().err
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
        (
            ["--backend", "cuda", "--kernel", "wide"],
            "--kernel: got 'wide', expected some of stream, gemm_sm90",
        ),
        (["--backend", "cuda", "--m", "5"], "--m: got 5, expected some of (1, 2, 4, 8, 16) for stream"),
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
    for kernel in panel_ways.KERNELS:
        way, us = panel_ways.table().fastest_of(kernel, tmp_path)[(4096, 4096), 16]
        assert way and 2.0 < us < 100.0
    assert main([*arguments[:4], "--chain", *arguments[4:]]) == 0, capsys.readouterr().err
    chain = panel_ways.table().in_chain("stream", tmp_path)
    assert chain and all(0 < us < 200 for _, us in chain.values())
