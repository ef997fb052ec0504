"""`qsun doctor`."""

from __future__ import annotations

import json

import pytest
import torch

from qsun.cli import doctor, exits, main


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == exits.OK
    out = capsys.readouterr().out
    assert torch.__version__ in out and "wna16_linear" in out
    assert "engine packages" in out and "transformers" in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == exits.OK
    report = json.loads(capsys.readouterr().out)
    assert {"qsun", "build", "machine", "operators", "engine packages"} <= set(report)
    assert report["engine packages"]["safetensors"]
    assert {row["operator"] for row in report["operators"]} >= {"wna16_linear", "paged_attention_decode"}


def test_a_missing_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_ENGINE", ("no-such-package-of-qsun",))
    assert main(["doctor"]) == exits.OK
    assert "not installed: pip install 'qsun[engine]'" in capsys.readouterr().out
