"""The scripts of examples/ run as they stand there."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from qsun_kernels.testing import timing

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.endswith("_user")}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_kernel_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("kernel_user.py", monkeypatch)
    out = capsys.readouterr().out
    assert "wna16_linear by " in out and "out (2, 8, 64), log-sum-exp (2, 8)" in out
    worst = float(out.split("dequantised layer: ")[1].split("%")[0])
    assert worst < 2


def test_engine_user(
    checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("engine_user.py", monkeypatch, str(checkpoints.base), f"poet={checkpoints.task}")
    out = capsys.readouterr().out
    assert "[base] (" in out and "[poet] (" in out and " decode steps, " in out


def test_engine_user_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"engine_user\.py BASE poet=PATH"):
        run("engine_user.py", monkeypatch)


def test_bench_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device: 256 << 10)
    run("bench_user.py", monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    mine = [line for line in lines if " mine " in line]
    assert len(mine) == 2 and all(line.endswith("GB/s") for line in mine)
