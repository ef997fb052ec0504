"""The doctor tells what a bug report needs, wherever it runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from qsun_kernels import doctor
from qsun_kernels.backends.problems import BACKENDS

OPERATORS = [
    "wna16_linear",
    "wna16_linear_rms_norm",
    "wna16_gate_up_silu",
    "paged_attention_decode",
    "write_kv_cache",
    "rms_norm",
    "apply_rope",
    "silu_and_mul",
    "dequantize",
    "sample_tokens",
]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "qsun_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_text_names_versions_backends_and_every_operator() -> None:
    text = run()
    for expected in (torch.__version__, "CUDA library", "nvidia driver", *BACKENDS, *OPERATORS):
        assert expected in text


def test_json_holds_one_chosen_backend_an_operator() -> None:
    report = json.loads(run("--json"))
    rows = report["operators"]
    assert {row["operator"] for row in rows} == set(OPERATORS)
    for operator in OPERATORS:
        assert [row["status"] for row in rows if row["operator"] == operator].count("chosen") == 1
    assert all(row["detail"] for row in rows)


def test_a_build_without_cuda_says_why(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"build": False, "reason": "built with QSUN_CUDA=off", "revision": "abc"}))
    monkeypatch.setattr(doctor, "BUILD_RECORD", record)
    assert doctor.build_facts()["CUDA library"] == "not built: built with QSUN_CUDA=off"


def test_a_tree_that_was_never_built_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BUILD_RECORD", tmp_path / "none.json")
    assert "no build record" in doctor.build_facts()["CUDA library"]


def test_environment_shows_what_changes_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSUN_BACKEND", "triton")
    assert doctor.environment_facts()["QSUN_BACKEND"] == "triton"


def test_import_is_light() -> None:
    """`import qsun_kernels` adds under half a second to `import torch`, and does not load triton."""
    code = (
        "import time, sys, torch; t = time.perf_counter(); import qsun_kernels; "
        "names = ('qsun_kernels.backends.triton', 'transformers'); "
        "print(time.perf_counter() - t, *(name in sys.modules for name in names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, triton, transformers = done.stdout.split()
    assert float(seconds) < 0.5
    assert (triton, transformers) == ("False", "False")
