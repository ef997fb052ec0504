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
pytestmark = [pytest.mark.triton, pytest.mark.long]

SCRIPT = Path(__file__).with_name("compile_launches.py")

SHARED_MEMORY_OF_SM_89 = 99 * 1024
"""Bytes a block of the smallest shared memory among the devices that sm_80 code runs on."""

KERNELS = {
    "apply_rope_kernel",
    "dequantize_kernel",
    "paged_attention_decode_kernel",
    "paged_attention_merge_kernel",
    "paged_attention_plan_kernel",
    "rms_norm_kernel",
    "sample_tokens_kernel",
    "silu_and_mul_kernel",
    "wna16_combine_kernel",
    "wna16_linear_kernel",
    "wna16_rows_kernel",
    "write_kv_cache_kernel",
    "write_kv_cache_steps_kernel",
}

PRODUCTS = {"paged_attention_decode_kernel", "wna16_linear_kernel", "wna16_rows_kernel"}


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
        # Registers that tensor cores have yet to read, and memory likewise: results would be anything.
        assert report["unfinished_products"] == [], f"{name}: {report['unfinished_products']}"
        assert report["written_too_early"] == [], f"{name}: {report['written_too_early']}"
        # Their layout is made for going straight into the registers that tensor cores read. Before Hopper,
        # Triton spreads warps over tokens, too, where those are many.
        is_staged = report["staged_weights"] and report["arch"] >= 90
        assert not is_staged, f"{name} passes weights through shared memory"
        is_product = report["kernel"] in PRODUCTS
        in_32_bits = any(word in report["case"] for word in ("fp32", "float32", "fp16 on bf16"))
        if is_product and not in_32_bits:
            assert report["tensor_cores"], f"{name} multiplies without tensor cores"


def check_all_of(cases: str, arch: int, cache: Path) -> None:
    """Cases in which every kernel is compiled."""
    reports = compile_cases(cases, [str(arch)], cache)
    assert {report["kernel"] for report in reports} == KERNELS
    assert {report["arch"] for report in reports} == {arch}
    check(reports)


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    check_all_of("quick", 90, tmp_path)


def test_a_kernel_that_does_not_wait_for_its_products_is_found(tmp_path: Path) -> None:
    """Or `check` would pass for seeing nothing."""
    (report,) = compile_cases("unwaited", ["90"], tmp_path)
    assert any("registers" in line for line in report["unfinished_products"])
    with pytest.raises(AssertionError, match="groups with registers"):
        check([report])


@pytest.mark.slow
def test_every_tuned_kernel_for_hopper(tmp_path: Path) -> None:
    reports = compile_cases("tuned", ["90"], tmp_path)
    assert {report["kernel"] for report in reports} == {"wna16_linear_kernel"} and len(reports) > 1
    check([report | {"stack": 0, "shared": 0} for report in reports])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "arch"),
    [("quick", 80), *(pytest.param("more", arch, marks=pytest.mark.exhaustive) for arch in (80, 90))],
)
def test_what_launchers_pick_compiles_for_ampere_and_hopper(which: str, arch: int, tmp_path: Path) -> None:
    check_all_of(which, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", [80, 90])
def test_codes_of_every_kind_compile(arch: int, tmp_path: Path) -> None:
    reports = compile_cases("codes", [str(arch)], tmp_path)
    assert len(reports) > 30 and {report["arch"] for report in reports} == {arch}
    check(reports)
