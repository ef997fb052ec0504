"""A run that is recorded: under which name, and what is kept of one that is cut."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qsun_bench import commands, decode, measure, results
from qsun_bench.cli import main
from qsun_bench.results import Record
from qsun_bench.termination import Terminated, termination_is_noted, termination_raises
from qsun_kernels.testing import timing

SMOKE = ["--device", "cpu", "--smoke"]
RECORD = ["--record", "--commit", "0123456789ab"]


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of sources without git, as the working directory; the read bandwidth takes no time."""
    monkeypatch.setattr(timing, "_WARM_UP_S", 0.002)
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 256 << 10)
    monkeypatch.setattr(commands, "read_bandwidth", lambda device: 2e10)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return tmp_path


def made(index: int) -> Record:
    return Record("decode", f"m.b{index}", "cuda", 5.0, 4096, 0.5, True, {"batch": index})


def ask_to_end(after: int) -> Iterator[tuple[Record, str]]:
    """Outcomes of which the last never comes: the process is told to end while it is measured."""
    for index in range(after):
        yield made(index), ""
    os.kill(os.getpid(), signal.SIGTERM)
    torch.zeros(1)
    yield made(after), ""


def test_a_run_under_another_name_replaces_none(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "decode_records", lambda request, read: iter([(made(1), "")]))
    assert main(["decode", *SMOKE, *RECORD]) == 0
    monkeypatch.setattr(decode, "decode_records", lambda request, read: iter([(made(2), "")]))
    assert main(["decode", *SMOKE, *RECORD, "--as", "decode-kv"]) == 0
    folder = sources / "bench/results/cpu"
    assert [r.case for r in results.load(str(folder / "decode.json")).records] == ["m.b1"]
    assert [r.case for r in results.load(str(folder / "decode-kv.json")).records] == ["m.b2"]
    assert "decode-kv.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "Decode", "decode kv", "../decode", "decode-", "-kv"])
def test_a_name_that_no_block_could_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["decode", *SMOKE, *RECORD, f"--as={name}"])
    assert "argument --as: " in capsys.readouterr().err


def test_a_name_without_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["decode", *SMOKE, "--as", "decode-kv"])
    assert "--as: expected only with --record" in capsys.readouterr().err


def test_what_is_told_to_end_records_what_it_has(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(decode, "decode_records", lambda request, read: ask_to_end(2))
    assert main(["decode", *SMOKE, *RECORD]) == 0
    assert [r.case for r in results.load("bench/results/cpu/decode.json").records] == ["m.b0", "m.b1"]
    assert "not run: the rest (terminated)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_suite_of_operators_ends_likewise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = measure.measure

    def cut(*arguments: object, **named: object) -> Iterator[object]:
        for place, outcome in enumerate(real(*arguments, **named)):  # type: ignore[arg-type]
            if place == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                torch.zeros(1)
            yield outcome

    monkeypatch.setattr(measure, "measure", cut)
    options = ["wna16", *SMOKE, "--backend", "torch", "--seconds", "0.005"]
    assert main([*options, *RECORD]) == 0
    assert len(results.load("bench/results/cpu/wna16.json").records) == 2
    assert "(terminated)" in capsys.readouterr().err


def test_nothing_measured_replaces_nothing(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "decode_records", lambda request, read: iter([(made(1), "")]))
    assert main(["decode", *SMOKE, *RECORD]) == 0
    recorded = (sources / "bench/results/cpu/decode.json").read_text()
    monkeypatch.setattr(decode, "decode_records", lambda request, read: ask_to_end(0))
    assert main(["decode", *SMOKE, *RECORD]) == 3
    assert (sources / "bench/results/cpu/decode.json").read_text() == recorded
    assert "nothing was measured" in capsys.readouterr().err


def test_a_termination_is_raised_or_noted() -> None:
    with pytest.raises(Terminated), termination_raises():
        os.kill(os.getpid(), signal.SIGTERM)
        torch.zeros(1)
    with termination_is_noted() as noted:
        assert not noted()
        os.kill(os.getpid(), signal.SIGTERM)
        torch.zeros(1)
        assert noted()
