"""Every kernel compiles to machine code, on a machine with or without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.triton

SCRIPT = Path(__file__).with_name("compile_launches.py")

SHARED_MEMORY_OF_SM_89 = 99 * 1024
"""Bytes a block of the smallest shared memory among the devices that sm_80 code runs on."""

KERNELS = {
    "apply_rope_kernel",
    "dequantize_kernel",
    "paged_attention_combine_kernel",
    "paged_attention_decode_kernel",
    "rms_norm_kernel",
    "silu_and_mul_kernel",
    "wna16_combine_kernel",
    "wna16_rows_kernel",
    "write_kv_cache_kernel",
}


def compile_cases(cases: str, arches: list[str], cache: Path) -> list[dict[str, Any]]:
    """What compile_launches.py reports, from a process of its own with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), cases, *arches],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        name = f"{report['kernel']} ({report['case']}, sm_{report['arch']})"
        # A word or two spilled outside the loop costs nothing; an accumulator inside it, everything.
        assert report["stack"] <= 16, f"{name} spills {report['stack']} bytes a thread"
        assert report["shared"] <= SHARED_MEMORY_OF_SM_89, f"{name} takes {report['shared']} bytes"
        # Whoever adds first decides the rounding: results would not repeat.
        assert report["atomics"] == [], f"{name} uses {report['atomics']}"
        is_product = report["kernel"] in ("wna16_rows_kernel", "paged_attention_decode_kernel")
        in_32_bits = any(word in report["case"] for word in ("fp32", "float32", "fp16 on bf16"))
        if is_product and not in_32_bits:
            assert report["tensor_cores"], f"{name} multiplies without tensor cores"


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    reports = compile_cases("quick", ["90"], tmp_path)
    assert {report["kernel"] for report in reports} == KERNELS
    check(reports)


@pytest.mark.slow
def test_what_launchers_pick_compiles_for_ampere_and_hopper(tmp_path: Path) -> None:
    reports = compile_cases("quick", ["80"], tmp_path) + compile_cases("more", ["80", "90"], tmp_path)
    assert {report["kernel"] for report in reports} == KERNELS
    assert {report["arch"] for report in reports} == {80, 90}
    check(reports)
