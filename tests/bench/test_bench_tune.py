"""qsun-bench tune: what it chooses, writes and refuses. Running and timing are faked: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsun_bench import tune
from qsun_bench.cases.wna16 import DECODE_M
from qsun_bench.cli import build_parser, main
from qsun_bench.tune import Matrix, Row, Search
from qsun_bench.tune_candidates import candidates
from qsun_kernels.backends.triton import wna16_configs, wna16_tuned
from qsun_kernels.backends.triton.wna16_configs import TilesConfig

MATRIX = Matrix(4, 4096, 4096, DECODE_M)


class FakeTrials:
    """Times by configuration: the more shared memory, the slower; what is wrong or raises is said."""

    def __init__(
        self,
        wrong: Callable[[TilesConfig], bool] = lambda config: False,
        unsteady: Callable[[TilesConfig], bool] = lambda config: False,
        raising: Callable[[TilesConfig], bool] = lambda config: False,
        us: Callable[[TilesConfig], float] = lambda config: float(config.block_n * config.step_k),
    ) -> None:
        self.wrong, self.unsteady, self.raising, self.us = wrong, unsteady, raising, us
        self.timed: list[TilesConfig] = []

    def check(self, tokens: int, config: TilesConfig) -> str | None:
        if self.raising(config):
            raise RuntimeError("out of resources\nand a second line")
        return "error 0.5" if self.wrong(config) else None

    def stress(self, tokens: int, config: TilesConfig) -> str | None:
        return "3 of 40 calls do not repeat" if self.unsteady(config) else None

    def glance(self, tokens: int, config: TilesConfig) -> float:
        self.timed.append(config)
        return self.us(config)

    def time(self, tokens: int, config: TilesConfig) -> float:
        return self.us(config) + 0.125


def searched(trials: FakeTrials, tokens: tuple[int, ...] = (1,)) -> Search:
    search = Search(replace(MATRIX, tokens=tokens))
    search.run(trials, 132, lambda: False)
    return search


def listed(tokens: int = 1) -> list[TilesConfig]:
    """Candidates, the fastest by the fake's default first."""
    return sorted(candidates(4, tokens, MATRIX.N, MATRIX.K, 132), key=FakeTrials().us)


def fastest(wanted: Callable[[TilesConfig], bool]) -> float:
    return min(FakeTrials().us(config) for config in listed() if wanted(config))


def test_the_fastest_right_configuration_is_taken() -> None:
    search = searched(FakeTrials())
    (row,) = search.rows
    assert row.key == (4, 4096, 4096, 1) and row.us == fastest(lambda config: True) + 0.125
    assert not search.refusals and not search.unsolved


def test_a_wrong_configuration_is_neither_timed_nor_taken() -> None:
    trials = FakeTrials(wrong=lambda config: config.block_n == 16)
    search = searched(trials)
    (row,) = search.rows
    assert row.us == fastest(lambda config: config.block_n != 16) + 0.125
    assert trials.timed and all(config.block_n != 16 for config in trials.timed)
    refused = [refusal.config for refusal in search.refusals]
    assert refused and all(refusal.wrong for refusal in search.refusals)
    assert set(refused) == {config for config in listed() if config.block_n == 16}
    assert str(search.refusals[0]).startswith("WRONG: W4 4096x4096 M=1 TilesConfig(")


def test_what_raises_is_refused_with_its_reason_and_the_others_go_on() -> None:
    search = searched(FakeTrials(raising=lambda config: config.ahead))
    assert search.rows and not search.rows[0].config.ahead
    assert {r.reason for r in search.refusals} == {"RuntimeError: out of resources"}
    assert not any(refusal.wrong for refusal in search.refusals)


def test_what_fails_under_stress_is_not_taken_even_when_all_finalists_do() -> None:
    # More configurations are the fastest, and unsteady, than there are finalists.
    unsteady = listed()[: 2 * tune.FINALISTS + 1]
    search = searched(FakeTrials(unsteady=lambda config: config in unsteady))
    (row,) = search.rows
    assert row.config not in unsteady
    assert row.us == fastest(lambda config: config not in unsteady) + 0.125
    assert all(refusal.wrong for refusal in search.refusals)


def test_where_nothing_is_right_nothing_is_chosen() -> None:
    search = searched(FakeTrials(wrong=lambda config: True), tokens=(1, 16))
    assert not search.rows and list(search.unsolved) == [1, 16]


def test_two_and_four_tokens_try_the_fastest_of_one_and_eight() -> None:
    search = searched(FakeTrials(), tokens=(1, 2, 4, 8))
    assert [row.tokens for row in search.rows] == [1, 8, 2, 4]
    assert 0 < len(search.times[2]) < len(search.times[1])
    assert {config.block_m for config in search.times[2]} == {8}


def test_a_number_of_tokens_that_the_time_does_not_reach_to_the_end_is_left_out() -> None:
    trials = FakeTrials()
    enough = len(listed(1)) + 3
    search = Search(replace(MATRIX, tokens=(1, 16)))
    search.run(trials, 132, lambda: len(trials.timed) >= enough)
    assert [row.tokens for row in search.rows] == [1] and not search.unsolved


def test_candidates_have_what_the_table_has() -> None:
    for bits, N, K, tokens, config in wna16_configs.tuned():
        assert config in candidates(bits, tokens, N, K, 132), (bits, N, K, tokens, config)


def test_the_plan_is_what_the_table_holds() -> None:
    planned = [(m.bits, m.N, m.K, M) for m in tune.plan(quick=False) for M in m.tokens]
    assert planned == [row.key for row in tune.table_rows()]
    assert tune.plan(quick=True) == [MATRIX]


def read(text: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int, TilesConfig]]:
    """The rows of a table's text, read as the kernel reads its table."""
    namespace: dict[str, object] = {"__name__": "read"}
    exec(compile(text, tune.FILE_NAME, "exec"), namespace)
    monkeypatch.setattr(wna16_configs, "TUNED", namespace["TUNED"])
    return list(wna16_configs.tuned())


def test_the_text_is_read_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    old = tune.table_rows()
    config = TilesConfig(8, 32, 256, 4, 2, 4, 1, ahead=True, prefetch=256)
    new = Row(4, 4096, 4096, 16, config, 7.25)
    text = tune.table_text(tune.merged([new], old), "Measured in a test. " + "Many words. " * 30)
    assert max(map(len, text.splitlines())) <= 110
    got = read(text, monkeypatch)
    want = [(*row.key, new.config if row.key == new.key else row.config) for row in old]
    assert got == want
    assert "    (4, 4096, 4096, 16, (8, 32, 256, 4, 2, 4, 1, 1, 256), 7.25),\n" in text


def test_rewriting_the_shipped_rows_changes_nothing() -> None:
    namespace: dict[str, object] = {"__name__": "read"}
    exec(tune.table_text(tune.merged([], tune.table_rows()), "Nothing measured."), namespace)
    assert namespace["TUNED"] == wna16_tuned.TUNED


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A device that compiles at once and says whatever `trials` says."""
    pytest.importorskip("triton")
    from qsun_bench import tune_device
    from qsun_kernels.backends.triton import launch

    state = SimpleNamespace(trials=FakeTrials(), compiled=0)

    def compile_ahead(jobs: list[object], device: torch.device, *, seconds: float) -> None:
        state.compiled = len(jobs)

    monkeypatch.setattr(tune, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tune_device, "compile_ahead", compile_ahead)
    monkeypatch.setattr(tune_device, "DeviceTrials", lambda *arguments: state.trials)
    monkeypatch.setattr(tune_device, "name", lambda device: "Fake 9000")
    monkeypatch.setattr(tune_device, "why_lost", lambda device: None)
    yield state


def test_the_command_writes_a_table_and_says_where(
    fake_gpu: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tune.SOURCE.read_bytes()
    out = tmp_path / "new"
    assert main(["tune", "wna16", "--quick", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert f"written to {out / 'wna16_tuned.py'}" in captured.out and "W4 4096x4096" in captured.out
    assert fake_gpu.compiled > 0
    text = (out / "wna16_tuned.py").read_text()
    assert "Measured on one Fake 9000 (132 multiprocessors)" in " ".join(text.split())
    assert "Not measured then: 74 of the 83 rows" in " ".join(text.split())
    assert len(read(text, monkeypatch)) == 83
    assert tune.SOURCE.read_bytes() == source


def test_the_whole_table(fake_gpu: SimpleNamespace, tmp_path: Path) -> None:
    assert main(["tune", "wna16", "--out", str(tmp_path)]) == 0
    assert "Not measured then" not in (tmp_path / tune.FILE_NAME).read_text()


def test_write_replaces_the_table_in_use(
    fake_gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SOURCE", tmp_path / "in_use.py")
    assert main(["tune", "wna16", "--quick", "--write"]) == 0
    assert "TUNED" in (tmp_path / "in_use.py").read_text()


def test_a_wrong_configuration_makes_the_exit_code_one(
    fake_gpu: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_gpu.trials = FakeTrials(wrong=lambda config: config.block_n == 16)
    assert main(["tune", "wna16", "--quick", "--out", str(tmp_path)]) == 1
    assert "WRONG: W4 4096x4096 M=1 " in capsys.readouterr().err
    fake_gpu.trials = FakeTrials(wrong=lambda config: True)
    assert main(["tune", "wna16", "--quick", "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none" / tune.FILE_NAME).exists()
    assert "nothing is written" in capsys.readouterr().err


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_a_device_checks_against_float32_and_for_repeatability(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from qsun_bench import tune_device

    monkeypatch.setattr(tune_device, "copies_to_overflow", lambda size, device: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *arguments: None)
    trials = tune_device.DeviceTrials(4, 64, 512, 3, torch.device("cpu"))
    config = TilesConfig(8, 16, 128, 2, 2, 2, 1, ahead=False, prefetch=0)
    assert trials.check(1, config) is None and trials.check(3, config) is None
    first, last = trials._copies
    last.tensors[0][0, 0] ^= 0x1111
    assert trials.check(3, config) == "does not repeat"
    first.tensors[0][0, 0] ^= 0x1111
    assert str(trials.check(3, config)).startswith("error ")
    first.tensors[1].fill_(0x7FC07FC0)
    assert str(trials.check(3, config)).startswith("error nan")


@pytest.mark.gpu
@pytest.mark.triton
def test_one_configuration_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    from qsun_bench import tune_device

    device = torch.device("cuda", torch.cuda.current_device())
    config = TilesConfig(16, 64, 128, 1, 2, 4, 3, ahead=False, prefetch=0)
    tune_device.compile_ahead([(4, 16, 4096, 4096, config)], device, seconds=120)
    assert "1 of 1 kernels compiled ahead" in capsys.readouterr().err
    trials = tune_device.DeviceTrials(4, 4096, 4096, 16, device)
    assert trials.check(16, config) is None and trials.stress(16, config) is None
    glance, us = trials.glance(16, config), trials.time(16, config)
    assert 0.5 < glance / us < 2.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_compiled_ahead_has_the_shapes_of_a_prepared_weight(bits: int) -> None:
    pytest.importorskip("triton")
    from qsun_bench import tune_device
    from qsun_bench.random_weights import random_packed_weight

    cpu = torch.device("cpu")
    hollow = tune_device._hollow_weight(bits, 40, 384, cpu)
    spec, source = tune_device._spec(bits), torch.Generator().manual_seed(0)
    packed = random_packed_weight(40, 384, spec, torch.bfloat16, source)
    prepared = tune_device.implementation.prepare(packed, torch.bfloat16)
    assert [(t.shape, t.dtype) for t in hollow.tensors] == [(t.shape, t.dtype) for t in prepared.tensors]
    assert (hollow.layout, hollow.spec, hollow.dtype) == (prepared.layout, prepared.spec, prepared.dtype)


def test_one_kernel_is_compiled_once() -> None:
    pytest.importorskip("triton")
    from qsun_bench import tune_device

    config = TilesConfig(16, 64, 256, 1, 2, 4, 3, ahead=True, prefetch=0)
    key = tune_device._kernel_key(4, 16, 4096, 4096, config)
    assert key == tune_device._kernel_key(4, 8, 6144, 8192, replace(config, splits=8))
    assert key != tune_device._kernel_key(4, 16, 4096, 4096, replace(config, splits=1))
    assert key != tune_device._kernel_key(4, 16, 4096, 4096 + 128, config)


def test_options() -> None:
    arguments = build_parser().parse_args(["tune", "wna16", "--budget", "90", "--quick", "--out", "there"])
    assert (arguments.budget, arguments.quick, arguments.out) == (90.0, True, Path("there"))
    assert not build_parser().parse_args(["tune", "wna16"]).write


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "OPERATOR"),
        (["attention"], "invalid choice: 'attention'"),
        (["wna16", "--budget", "0"], "got '0', expected seconds above 0"),
        (["wna16", "--out", "x", "--write"], "not allowed with argument --out"),
        (["wna16", "--out", str(tune.SOURCE.parent)], "is the table in use, expected another folder"),
    ],
)
def test_usage_errors(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["tune", *arguments])
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "wna16", "--out", str(tmp_path / "new")]) == 4
    assert "backend 'triton' cannot run wna16_linear: no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
